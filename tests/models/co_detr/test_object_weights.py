"""Weights of objects, and regions in which nothing is background, in every assigner."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from coin_ray.config.co_detr import tiny
from coin_ray.errors import InputError
from coin_ray.models.co_detr.rcnn import UNUSED, assign_anchors, sample_regions
from coin_ray.models.co_detr.targets import DetrTargets, is_covered
from models.co_detr.scenes import (
    TWO_IMAGES,
    make_targets,
    new_collaborative,
    noise_batch,
    objective_losses,
    rand,
    seeded,
)


def _with_weights(weight: float) -> list[DetrTargets]:
    return [
        replace(t, weights=torch.full((len(t.labels),), weight)) for t in TWO_IMAGES
    ]


def test_weights_of_one_change_nothing() -> None:
    model = new_collaborative(tiny(denoising=4))
    weighted = objective_losses(model, _with_weights(1.0))
    assert weighted == objective_losses(model, TWO_IMAGES)


def test_every_box_loss_is_in_proportion_to_its_objects_weights() -> None:
    model = new_collaborative(tiny(denoising=4))
    whole = objective_losses(model, TWO_IMAGES)
    half = objective_losses(model, _with_weights(0.5))
    boxes = [name for name in whole if name.endswith(("l1", "giou", "centerness"))]
    assert len(boxes) == 22
    for name in boxes:
        assert half[name] == pytest.approx(whole[name] / 2, rel=1e-5), name
    for name in set(whole) - set(boxes):
        assert half[name] < whole[name], name


def test_objects_of_weight_zero_teach_no_weight_of_a_box_branch() -> None:
    model = new_collaborative()
    objective = model.objective(noise_batch(), _with_weights(0.0), seeded())
    objective.total.backward()  # type: ignore[no-untyped-call]
    for branch in (*model.base.decoder.regress, model.base.two_stage.regress):
        assert all(
            p.grad is None or not bool(p.grad.any()) for p in branch.parameters()
        )


EVERYWHERE = torch.tensor([[0.0, 0, 96, 64]])


def test_without_objects_an_ignored_image_has_no_loss_at_all() -> None:
    empty = [replace(make_targets(), ignored=EVERYWHERE) for _ in range(2)]
    losses = objective_losses(new_collaborative(tiny(denoising=4)), empty)
    # anchors reach beyond the ignored region
    other_losses = {
        name: loss
        for name, loss in losses.items()
        if name not in ("atss_class", "rcnn_proposal_class")
    }
    assert set(other_losses.values()) == {0.0}
    not_ignored = objective_losses(
        new_collaborative(tiny(denoising=4)), [make_targets(), make_targets()]
    )
    assert losses["atss_class"] < not_ignored["atss_class"]


def test_ignored_regions_leave_the_objects_to_be_learned() -> None:
    model = new_collaborative()
    plain = objective_losses(model, TWO_IMAGES)
    ignored = objective_losses(
        model, [replace(t, ignored=EVERYWHERE) for t in TWO_IMAGES]
    )
    assert all(
        0 < ignored[name] < plain[name]
        for name in plain
        if name.endswith("class") and not name.startswith(("rcnn", "atss_q"))
    )
    assert all(
        ignored[name] == plain[name]
        for name in plain
        if name.startswith("decoder") and not name.endswith("class")
    )


@given(st.integers(0, 10_000), st.integers(0, 3))
def test_covered_boxes_have_half_their_area_in_one_region(
    seed: int, count: int
) -> None:
    corner = rand(5 + count, 2, seed=seed).double() * 10
    size = rand(5 + count, 2, seed=seed + 1).double() * 10 + 0.1
    rows = torch.cat([corner, corner + size], 1)
    boxes, regions = rows[:5], rows[5:]

    def covered_share(box: Tensor, region: Tensor) -> float:
        width = min(box[2], region[2]) - max(box[0], region[0])
        height = min(box[3], region[3]) - max(box[1], region[1])
        area = (box[2] - box[0]) * (box[3] - box[1])
        return float(max(width, 0) * max(height, 0) / area)

    assert is_covered(boxes, regions).tolist() == [
        any(covered_share(b, r) >= 0.5 for r in regions) for b in boxes
    ]


def test_anchors_and_proposals_in_ignored_regions_are_no_background() -> None:
    anchors = torch.tensor([[0.0, 0, 10, 10], [40, 0, 50, 10], [20, 20, 30, 30]])
    inside = torch.ones(3, dtype=torch.bool)
    box, region = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[0.0, 0, 60, 15]])
    assert assign_anchors(anchors, inside, box, region).tolist() == [0, UNUSED, -1]
    assert assign_anchors(anchors, inside, box[:0], region).tolist() == [
        UNUSED,
        UNUSED,
        -1,
    ]
    sampled = sample_regions(
        anchors,
        DetrTargets(box, torch.zeros(1).long(), None, region),
        tiny(roi_positive=1.0),
        seeded(),
    )
    assert sorted(sampled.boxes.tolist()) == sorted(
        [box[0].tolist(), anchors[0].tolist(), anchors[2].tolist()]
    )


@pytest.mark.parametrize(
    "weights",
    [torch.ones(3), torch.tensor([float("nan"), 1.0]), torch.tensor([-0.1, 1.0])],
)
def test_impossible_weights_are_reported(weights: Tensor) -> None:
    targets = [replace(TWO_IMAGES[0], weights=weights), TWO_IMAGES[1]]
    message = "expected a finite weight of at least 0 for each of 2 objects"
    with pytest.raises(InputError, match=message):
        new_collaborative().objective(noise_batch(), targets)
