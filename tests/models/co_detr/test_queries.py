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


def _new_positives(count: int, seed: int = 0) -> Positives:
    corner = rand(count, 2, seed=seed) * 40
    boxes = torch.cat([corner, corner + 10], 1)
    return Positives(
        boxes,
        boxes + 1,
        torch.arange(count) % CLASSES,
        randn(count, 16, seed=seed),
        torch.ones(count),
    )


def _new_positive_queries(seed: int = 0) -> PositiveQueries:
    torch.manual_seed(seed)
    return fill_zero_weights(PositiveQueries(CONFIG, CLASSES))


def _main_queries() -> Queries:
    return Queries(
        randn(2, 6, 16, seed=5),
        randn(2, 6, 16, seed=6),
        rand(2, 6, 4, seed=7) * 0.5 + 0.2,
    )


def _new_memory() -> Memory:
    shapes = ((8, 12), (4, 6), (2, 3))
    count = sum(h * w for h, w in shapes)
    return Memory(
        randn(2, count, 16, seed=8),
        shapes,
        torch.zeros(2, count, dtype=torch.bool),
        torch.ones(2, 3, 2),
    )


def _decode(queries: Queries, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    decoded = fill_zero_weights(Decoder(CONFIG, CLASSES))(queries, _new_memory(), mask)
    return decoded.logits, decoded.boxes


def test_queries_have_their_objects_targets_and_start_at_their_box() -> None:
    positives = _new_positives(3)
    group = _new_positive_queries()([positives, _new_positives(0)], SIZES)
    assert group.targets.classes.tolist() == [[0, 1, 2], [CLASSES] * 3]
    assert group.targets.has_loss.tolist() == [[True] * 3, [False] * 3]
    scale = torch.tensor([96, 64, 96, 64])
    torch.testing.assert_close(
        group.queries.references[0, :, :2], (positives.boxes[:, :2] + 5) / scale[:2]
    )
    torch.testing.assert_close(
        group.targets.boxes[0, :, 2:], torch.full((3, 2), 10.0) / scale[2:]
    )


def test_more_positives_than_the_limit_are_drawn_at_random() -> None:
    positives = _new_positives(9)
    first, repeated, other = (
        _new_positive_queries()(
            [positives, _new_positives(2)], SIZES, seeded(s)
        ).queries.references
        for s in (0, 0, 1)
    )
    assert first.shape == (2, 5, 4)
    assert torch.equal(first, repeated)
    assert not torch.equal(first, other)


def test_content_depends_on_box_and_features_and_position_on_the_box_alone() -> None:
    positives = _new_positives(3)
    features = Positives(
        positives.boxes,
        positives.truth,
        positives.labels,
        positives.features + 1,
        positives.weights,
    )
    boxes = Positives(
        positives.boxes + 5,
        positives.truth,
        positives.labels,
        positives.features,
        positives.weights,
    )
    plain, with_other_features, with_other_boxes = (
        _new_positive_queries()([p, p], SIZES).queries
        for p in (positives, features, boxes)
    )
    assert torch.equal(plain.positions, with_other_features.positions)
    assert not torch.equal(plain.positions, with_other_boxes.positions)
    assert not torch.equal(plain.content, with_other_boxes.content)


def test_features_are_not_detached() -> None:
    positives = _new_positives(3)
    positives.features.requires_grad_()
    _new_positive_queries()(
        [positives, positives], SIZES
    ).queries.content.square().sum().backward()  # type: ignore[no-untyped-call]
    assert positives.features.grad is not None
    assert bool(positives.features.grad.any())


def test_groups_without_any_positive_are_empty() -> None:
    group = _new_positive_queries()([_new_positives(0), _new_positives(0)], SIZES)
    assert group.queries.content.shape == (2, 0, 16)
    queries, mask = concatenate_queries(_main_queries(), [group])
    assert all(bool(torch.isfinite(part).all()) for part in _decode(queries, mask))


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


def _two_groups() -> tuple[QueryGroup, QueryGroup]:
    return _new_positive_queries(0)(
        [_new_positives(4), _new_positives(2)], SIZES
    ), _new_positive_queries(1)([_new_positives(1, 3), _new_positives(3, 4)], SIZES)


def test_groups_decoded_together_equal_groups_decoded_alone() -> None:
    first, second = _two_groups()
    queries, mask = concatenate_queries(_main_queries(), [first, second])
    together = _decode(queries, mask)
    alone = [_decode(_main_queries(), None)]
    alone += [
        _decode(
            g.queries,
            group_mask(torch.zeros(2, 0, dtype=torch.bool), [g.targets.has_loss]),
        )
        for g in (first, second)
    ]
    for part, expected in zip(
        together, (torch.cat(p, 2) for p in zip(*alone, strict=True)), strict=True
    ):
        torch.testing.assert_close(part, expected, atol=1e-6, rtol=1e-6)


def test_the_content_of_a_group_does_not_reach_the_others() -> None:
    first, second = _two_groups()
    queries, mask = concatenate_queries(_main_queries(), [first, second])
    content = queries.content.clone()
    content[:, 6:10] += 10
    before = _decode(queries, mask)
    after = _decode(Queries(content, queries.positions, queries.references), mask)
    for a, b in zip(before, after, strict=True):
        others = [i for i in range(a.shape[2]) if not 6 <= i < 10]
        torch.testing.assert_close(
            a[:, :, others], b[:, :, others], atol=1e-6, rtol=1e-6
        )
        assert not torch.allclose(a[:, :, 6:10], b[:, :, 6:10], atol=1e-3)


def test_no_query_attends_to_padded_queries() -> None:
    """The second image has two real queries of four in the first group."""
    first, _ = _two_groups()
    queries, mask = concatenate_queries(_main_queries(), [first])
    content = queries.content.clone()
    content[1, 8:10] += 10
    before = _decode(queries, mask)
    after = _decode(Queries(content, queries.positions, queries.references), mask)
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a[:, 1, :8], b[:, 1, :8], atol=1e-6, rtol=1e-6)


def test_the_base_alone_needs_no_mask() -> None:
    queries = _main_queries()
    assert concatenate_queries(queries, []) == (queries, None)
