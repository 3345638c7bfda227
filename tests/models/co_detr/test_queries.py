from __future__ import annotations

import torch
from torch import Tensor

from coin_ray.config.co_detr import tiny
from coin_ray.models.co_detr.auxiliary import Positives
from coin_ray.models.co_detr.decoder import Decoder, Queries
from coin_ray.models.co_detr.encoder import Memory
from coin_ray.models.co_detr.queries import (
    PositiveQueries,
    QueryGroup,
    concatenate_queries,
    group_mask,
)
from models.co_detr.scenes import CLASSES, fill_zero_weights, rand, randn, seeded

SIZES = ((64, 96), (50, 70))
CONFIG = tiny(width=16, heads=4, levels=3, feedforward=24, queries=6, max_positives=5)


def positives(count: int, seed: int = 0) -> Positives:
    corner = rand(count, 2, seed=seed) * 40
    boxes = torch.cat([corner, corner + 10], 1)
    return Positives(
        boxes,
        boxes + 1,
        torch.arange(count) % CLASSES,
        randn(count, 16, seed=seed),
        torch.ones(count),
    )


def make(seed: int = 0) -> PositiveQueries:
    torch.manual_seed(seed)
    return fill_zero_weights(PositiveQueries(CONFIG, CLASSES))


def main() -> Queries:
    return Queries(
        randn(2, 6, 16, seed=5),
        randn(2, 6, 16, seed=6),
        rand(2, 6, 4, seed=7) * 0.5 + 0.2,
    )


def memory() -> Memory:
    shapes = ((8, 12), (4, 6), (2, 3))
    count = sum(h * w for h, w in shapes)
    return Memory(
        randn(2, count, 16, seed=8),
        shapes,
        torch.zeros(2, count, dtype=torch.bool),
        torch.ones(2, 3, 2),
    )


def decode(queries: Queries, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    decoded = fill_zero_weights(Decoder(CONFIG, CLASSES))(queries, memory(), mask)
    return decoded.logits, decoded.boxes


def test_queries_know_their_object_and_start_at_their_box() -> None:
    own = positives(3)
    group = make()([own, positives(0)], SIZES)
    assert group.targets.classes.tolist() == [[0, 1, 2], [CLASSES] * 3]
    assert group.targets.has_loss.tolist() == [[True] * 3, [False] * 3]
    scale = torch.tensor([96, 64, 96, 64])
    torch.testing.assert_close(
        group.queries.references[0, :, :2], (own.boxes[:, :2] + 5) / scale[:2]
    )
    torch.testing.assert_close(
        group.targets.boxes[0, :, 2:], torch.full((3, 2), 10.0) / scale[2:]
    )


def test_more_positives_than_the_limit_are_drawn_at_random() -> None:
    own = positives(9)
    first, again, other = (
        make()([own, positives(2)], SIZES, seeded(s)).queries.references
        for s in (0, 0, 1)
    )
    assert first.shape == (2, 5, 4)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_box_and_what_lies_there_both_make_the_content_and_only_the_box_makes_the_position() -> (
    None
):
    own = positives(3)
    features = Positives(
        own.boxes, own.truth, own.labels, own.features + 1, own.weights
    )
    boxes = Positives(own.boxes + 5, own.truth, own.labels, own.features, own.weights)
    plain, fed, moved = (make()([p, p], SIZES).queries for p in (own, features, boxes))
    assert torch.equal(plain.positions, fed.positions)
    assert not torch.equal(plain.positions, moved.positions)
    assert not torch.equal(plain.content, moved.content)


def test_features_are_not_detached() -> None:
    own = positives(3)
    own.features.requires_grad_()
    make()([own, own], SIZES).queries.content.square().sum().backward()  # type: ignore[no-untyped-call]
    assert own.features.grad is not None
    assert bool(own.features.grad.any())


def test_groups_without_any_positive_are_empty() -> None:
    group = make()([positives(0), positives(0)], SIZES)
    assert group.queries.content.shape == (2, 0, 16)
    queries, mask = concatenate_queries(main(), [group])
    assert all(bool(torch.isfinite(part).all()) for part in decode(queries, mask))


def test_a_query_sees_the_real_queries_of_its_group_and_itself() -> None:
    mask = group_mask(
        torch.ones(1, 2, dtype=torch.bool),
        [torch.tensor([[True, False]]), torch.tensor([[True]])],
    )
    assert mask[0].int().tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]


def groups() -> tuple[QueryGroup, QueryGroup]:
    return make(0)([positives(4), positives(2)], SIZES), make(1)(
        [positives(1, 3), positives(3, 4)], SIZES
    )


def test_groups_decoded_together_equal_groups_decoded_alone() -> None:
    first, second = groups()
    queries, mask = concatenate_queries(main(), [first, second])
    together = decode(queries, mask)
    alone = [decode(main(), None)]
    alone += [
        decode(
            g.queries,
            group_mask(torch.zeros(2, 0, dtype=torch.bool), [g.targets.has_loss]),
        )
        for g in (first, second)
    ]
    for part, expected in zip(
        together, (torch.cat(p, 2) for p in zip(*alone, strict=True)), strict=True
    ):
        torch.testing.assert_close(part, expected, atol=1e-6, rtol=1e-6)


def test_what_a_group_holds_does_not_reach_the_others() -> None:
    first, second = groups()
    queries, mask = concatenate_queries(main(), [first, second])
    content = queries.content.clone()
    content[:, 6:10] += 10
    before, after = (
        decode(queries, mask),
        decode(Queries(content, queries.positions, queries.references), mask),
    )
    for a, b in zip(before, after, strict=True):
        others = [i for i in range(a.shape[2]) if not 6 <= i < 10]
        torch.testing.assert_close(
            a[:, :, others], b[:, :, others], atol=1e-6, rtol=1e-6
        )
        assert not torch.allclose(a[:, :, 6:10], b[:, :, 6:10], atol=1e-3)


def test_padded_queries_are_seen_by_none() -> None:
    """The second image has two real queries of four in the first group."""
    first, _ = groups()
    queries, mask = concatenate_queries(main(), [first])
    content = queries.content.clone()
    content[1, 8:10] += 10
    before, after = (
        decode(queries, mask),
        decode(Queries(content, queries.positions, queries.references), mask),
    )
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a[:, 1, :8], b[:, 1, :8], atol=1e-6, rtol=1e-6)


def test_the_base_alone_needs_no_mask() -> None:
    queries = main()
    assert concatenate_queries(queries, []) == (queries, None)
