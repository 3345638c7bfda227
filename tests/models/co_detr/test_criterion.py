from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from coin_ray.errors import InputError
from coin_ray.models.co_detr.criterion import (
    QueryTargets,
    match_hungarian,
    matching_cost,
    set_losses,
)
from coin_ray.models.co_detr.targets import (
    DetrTargets,
    denormalise,
    normalise,
    validate_targets,
)
from models.co_detr.scenes import make_targets, rand, randn


def _random_boxes(*shape: int, seed: int = 0) -> Tensor:
    return torch.cat(
        [
            rand(*shape, 2, seed=seed) * 0.5 + 0.25,
            rand(*shape, 2, seed=seed + 1) * 0.3 + 0.1,
        ],
        -1,
    )


@given(st.integers(0, 1000), st.integers(1, 5), st.integers(0, 4))
def test_the_assignment_costs_no_more_than_any_other(
    seed: int, count: int, truth: int
) -> None:
    logits = randn(1, count, 3, seed=seed)
    predicted = _random_boxes(1, count, seed=seed)
    labels = torch.arange(truth) % 3
    truth_boxes = _random_boxes(truth, seed=seed + 7)
    query_targets = match_hungarian(logits, predicted, [labels], [truth_boxes])
    costs = matching_cost(logits[0], predicted[0], labels, truth_boxes)
    pairs = min(count, truth)
    rows, columns = range(count), range(truth)
    matchings = (
        zip(r, c, strict=True)
        for r in itertools.permutations(rows, pairs)
        for c in itertools.combinations(columns, pairs)
    )
    least = min(sum(float(costs[q, n]) for q, n in matching) for matching in matchings)
    matched_queries = (query_targets.classes[0] < 3).nonzero()[:, 0]
    matched_objects = [
        (truth_boxes == query_targets.boxes[0, q]).all(1).nonzero()[0, 0]
        for q in matched_queries
    ]
    assert len(matched_queries) == pairs
    assert sum(
        float(costs[q, n])
        for q, n in zip(matched_queries, matched_objects, strict=True)
    ) == pytest.approx(least, abs=1e-5)


def test_the_cost_is_written_out_for_one_pair() -> None:
    """Logit 0 at the label: focal cost 0.25 * 0.25 * ln 2 - 0.75 * 0.25 * ln 2; L1 0.4;
    GIoU of disjoint halves of one square: 0 - 0."""
    predicted = torch.tensor([[0.25, 0.5, 0.5, 1.0]])
    truth = torch.tensor([[0.75, 0.5, 0.5, 1.0]])
    cost = matching_cost(torch.zeros(1, 2), predicted, torch.tensor([1]), truth)
    focal = (0.25 - 0.75) * 0.25 * 0.693147
    assert float(cost) == pytest.approx(2 * focal + 5 * 0.5 - 2 * 0.0, abs=1e-5)


def test_losses_are_written_out() -> None:
    """Two queries, one of them on an object 0.1 to its left: L1 0.1; boxes share 0.1 *
    0.2 of 0.3 * 0.2, which is also the hull."""
    predicted = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]]])
    truth = torch.tensor([[[0.4, 0.5, 0.2, 0.2], [0.0, 0.0, 0.0, 0.0]]])
    query_targets = QueryTargets(
        torch.tensor([[0, 1]]), truth, torch.ones(1, 2, dtype=torch.bool)
    )
    losses = set_losses(torch.zeros(1, 2, 1), predicted, query_targets)
    assert float(losses["l1"]) == pytest.approx(5 * 0.1, abs=1e-6)
    assert float(losses["giou"]) == pytest.approx(2 * (1 - 1 / 3), abs=1e-5)
    assert float(losses["class"]) == pytest.approx(
        2 * (0.25 + 0.75) * 0.25 * 0.693147, abs=1e-5
    )


def test_masked_queries_have_no_loss_and_no_gradient() -> None:
    logits = randn(1, 4, 3).requires_grad_()
    predicted = _random_boxes(1, 4).requires_grad_()
    has_loss = torch.tensor([[True, False, True, False]])
    losses = set_losses(
        logits,
        predicted,
        QueryTargets(
            torch.tensor([[0, 1, 2, 3]]), _random_boxes(1, 4, seed=5), has_loss
        ),
    )
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert predicted.grad is not None
    assert (
        (logits.grad != 0).any(-1).tolist()
        == (predicted.grad != 0).any(-1).tolist()
        == has_loss.tolist()
    )


def test_only_usable_queries_are_assigned() -> None:
    usable = torch.tensor([[False, True, True, False]])
    query_targets = match_hungarian(
        randn(1, 4, 3),
        _random_boxes(1, 4),
        [torch.tensor([1])],
        [_random_boxes(1, seed=4)],
        usable,
    )
    assert (query_targets.classes < 3).sum() == 1
    assert not bool((query_targets.classes[~usable] < 3).any())


def test_the_order_of_objects_does_not_matter() -> None:
    logits = randn(1, 8, 3)
    predicted = _random_boxes(1, 8)
    labels = torch.tensor([0, 2, 1])
    truth = _random_boxes(3, seed=4)
    first = match_hungarian(logits, predicted, [labels], [truth])
    second = match_hungarian(logits, predicted, [labels.flip(0)], [truth.flip(0)])
    assert torch.equal(first.classes, second.classes)
    assert torch.equal(first.boxes, second.boxes)


def test_no_object_leaves_only_the_class_loss() -> None:
    losses = set_losses(
        randn(2, 4, 3),
        _random_boxes(2, 4),
        match_hungarian(
            randn(2, 4, 3),
            _random_boxes(2, 4),
            [torch.zeros(0).long()] * 2,
            [torch.zeros(0, 4)] * 2,
        ),
    )
    assert float(losses["class"]) > 0
    assert (float(losses["l1"]), float(losses["giou"])) == (0.0, 0.0)


def test_denormalise_inverts_normalise_inside_the_image() -> None:
    given_boxes = torch.tensor([[10.0, 5, 60, 45], [0, 0, 80, 50]])
    torch.testing.assert_close(
        denormalise(normalise(given_boxes, (50, 80)), (50, 80)), given_boxes
    )
    assert normalise(given_boxes, (50, 80))[1].tolist() == [0.5, 0.5, 1.0, 1.0]


def test_boxes_are_cut_at_the_border() -> None:
    (clipped,) = validate_targets([make_targets((-5, -5, 30, 90, 0))], [(50, 80)], 1)
    assert clipped.boxes.tolist() == [[0, 0, 30, 50]]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            [make_targets((1, 1, 9, 9, 3))],
            r"labels must lie in 0\.\.2 for 3 classes; got 3\.\.3",
        ),
        ([make_targets((1, 1, 9, 9, -1))], r"got -1\.\.-1"),
        ([make_targets((5, 5, 5, 9, 0))], "no area inside the image"),
        ([make_targets((90, 5, 99, 9, 0))], "no area inside the image"),
        ([make_targets((float("nan"), 5, 99, 9, 0))], "no area inside the image"),
        (
            [DetrTargets(torch.zeros(2, 4), torch.zeros(1).long())],
            r"expected boxes \[1, 4\]",
        ),
        ([], "expected targets for each of the 1 images; got 0"),
    ],
)
def test_impossible_targets_are_reported(
    targets: list[DetrTargets], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        validate_targets(targets, [(50, 80)], 3)
