from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou, roi_align

from coin_ray.config.co_detr import tiny
from coin_ray.models.co_detr.pyramid import place_anchors, rpn_anchors
from coin_ray.models.co_detr.rcnn import (
    BACKGROUND,
    UNUSED,
    Rcnn,
    assign_anchors,
    pool_levels,
    pooling_level,
    sample_regions,
)
from models.co_detr.scenes import (
    CLASSES,
    TWO_IMAGES,
    fill_zero_weights,
    make_targets,
    noise_maps,
    rand,
    seeded,
)


def _new_head(**changes: object) -> Rcnn:
    torch.manual_seed(0)
    return fill_zero_weights(Rcnn(tiny(**changes), CLASSES))


def _random_boxes(count: int, seed: int = 0) -> Tensor:
    corner = rand(count, 2, seed=seed) * 40
    return torch.cat([corner, corner + rand(count, 2, seed=seed + 1) * 20 + 4], 1)


def test_anchors_stand_for_what_they_overlap_most_and_every_object_has_one() -> None:
    maps = noise_maps(5)
    anchors = place_anchors(maps, [rpn_anchors(s) for s in maps.strides])
    boxes = torch.tensor([[4.0, 6, 40, 44], [50, 10, 90, 60]])
    assigned = assign_anchors(
        anchors.boxes, anchors.inside[0], boxes, torch.zeros(0, 4)
    )
    overlaps = box_iou(boxes, anchors.boxes)
    assert set(assigned[assigned >= 0].tolist()) == {0, 1}
    for number in range(2):
        assert int(assigned[overlaps[number].argmax()]) == number
        assert bool((overlaps[number, assigned == number] >= 0.3).all())
    assert bool((overlaps[:, assigned == BACKGROUND] < 0.3).all())
    assert bool((assigned[(overlaps >= 0.7).any(0)] >= 0).all())


def test_an_object_that_no_anchor_resembles_gets_none() -> None:
    maps = noise_maps(5)
    anchors = place_anchors(maps, [rpn_anchors(s) for s in maps.strides])
    tiny_box = torch.tensor([[3.0, 3, 5, 5]])
    assigned = assign_anchors(
        anchors.boxes, anchors.inside[0], tiny_box, torch.zeros(0, 4)
    )
    assert not bool((assigned >= 0).any())


def test_anchors_on_padding_are_unused() -> None:
    maps = noise_maps(5)
    anchors = place_anchors(maps, [rpn_anchors(s) for s in maps.strides])
    for boxes in (torch.tensor([[30.0, 6, 68, 44]]), torch.zeros(0, 4)):
        assigned = assign_anchors(
            anchors.boxes, anchors.inside[1], boxes, torch.zeros(0, 4)
        )
        assert bool((assigned[~anchors.inside[1]] == UNUSED).all())
        assert bool((assigned == BACKGROUND).any())


def test_proposals_lie_in_their_image_and_carry_no_gradient() -> None:
    maps = noise_maps(5)
    for level in maps.levels:
        level.requires_grad_()
    _, proposals = _new_head().proposals(maps, TWO_IMAGES, seeded())
    for boxes, (height, width) in zip(proposals, maps.sizes, strict=True):
        assert 0 < len(boxes) <= 100
        assert not boxes.requires_grad
        assert bool(
            (boxes >= 0).all() and (boxes[:, 2:] <= torch.tensor([width, height])).all()
        )
        assert bool((boxes[:, 2:] > boxes[:, :2]).all())


def test_objects_themselves_are_among_the_sampled_regions() -> None:
    config, target = tiny(roi_samples=20, roi_positive=0.5), TWO_IMAGES[0]
    sampled = sample_regions(_random_boxes(50), target, config, seeded())
    assert len(sampled.boxes) == 20
    assert 2 <= len(sampled.objects) <= 10
    overlaps = box_iou(target.boxes, sampled.boxes)
    assert bool(
        (overlaps[sampled.objects, torch.arange(len(sampled.objects))] >= 0.5).all()
    )
    assert bool((overlaps[:, len(sampled.objects) :] < 0.5).all())


def test_sampling_repeats_with_its_generator() -> None:
    config, proposals = tiny(roi_samples=10), _random_boxes(50)
    first, repeated, other = (
        sample_regions(proposals, TWO_IMAGES[0], config, seeded(s)).boxes
        for s in (3, 3, 4)
    )
    assert torch.equal(first, repeated)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("side", "level"),
    [
        (1, 0),
        (111, 0),
        (112, 0),
        (223, 0),
        (224, 1),
        (447, 1),
        (448, 2),
        (900, 3),
        (5000, 3),
    ],
)
def test_large_boxes_are_pooled_from_coarse_levels(side: float, level: int) -> None:
    box = torch.tensor([[7.0, 9, 7 + side, 9 + side]])
    assert pooling_level(box, 8, 4).tolist() == [level]


def test_pooling_keeps_the_order_of_boxes() -> None:
    maps = noise_maps(5)
    boxes = [
        torch.tensor([[0.0, 0, 900, 900], [3, 3, 20, 30], [0, 0, 300, 300]]),
        torch.tensor([[5.0, 5, 50, 50]]),
    ]
    pooled = pool_levels(maps, boxes, 7, 2)
    for row, (image, box, level) in enumerate(
        [
            (0, boxes[0][0], 3),
            (0, boxes[0][1], 0),
            (0, boxes[0][2], 1),
            (1, boxes[1][0], 0),
        ]
    ):
        alone = roi_align(
            maps.levels[level][image : image + 1],
            [box[None]],
            7,
            1 / (8 * 2**level),
            2,
            aligned=True,
        )
        torch.testing.assert_close(pooled[row], alone[0])


def test_no_box_at_all_pools_to_nothing() -> None:
    pooled = pool_levels(noise_maps(5), [torch.zeros(0, 4)] * 2, 7, 2)
    assert pooled.shape == (0, 64, 7, 7)


@pytest.mark.parametrize(
    ("boxes", "columns"), [("per_class", CLASSES), ("agnostic", 1)]
)
def test_box_deltas_are_of_the_regions_class_or_of_all(
    boxes: str, columns: int
) -> None:
    module, maps = _new_head(roi_boxes=boxes), noise_maps(5)
    logits, deltas = module.regions(torch.rand(6, 64, 5, 5))
    assert (logits.shape, deltas.shape) == ((6, CLASSES + 1), (6, columns, 4))
    only = [make_targets((4, 6, 40, 44, 1))] * 2
    module(maps, only, seeded()).losses["giou"].backward()
    gradient = module.regions.regress.weight.grad
    assert gradient is not None
    assert gradient.view(columns, 4, -1).any(-1).any(-1).tolist() == (
        [True] if columns == 1 else [False, True, False]
    )


def test_positives_are_proposals_on_objects_with_their_mean_feature() -> None:
    maps = noise_maps(5)
    head_outputs = _new_head()(maps, TWO_IMAGES, seeded())
    for positives, target in zip(head_outputs.positives, TWO_IMAGES, strict=True):
        assert len(positives) >= len(target.boxes)
        overlaps = box_iou(positives.boxes, positives.truth).diagonal()
        assert bool((overlaps >= 0.5).all())
    positives = head_outputs.positives[1]
    boxes = [torch.zeros(0, 4), positives.boxes]
    torch.testing.assert_close(
        positives.features, pool_levels(maps, boxes, 5, 1).mean((2, 3))
    )


def test_samples_without_objects_are_all_background() -> None:
    head_outputs = _new_head()(
        noise_maps(5), [make_targets(), make_targets()], seeded()
    )
    assert [len(p) for p in head_outputs.positives] == [0, 0]
    assert head_outputs.losses["giou"].item() == 0.0
    assert head_outputs.losses["proposal_l1"].item() == 0.0
    assert head_outputs.losses["class"].item() > 0
