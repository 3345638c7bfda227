from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import box_iou

from coin_ray.config.co_detr import tiny
from coin_ray.models.co_detr.atss import NO_OBJECT, Atss, assign_objects, centerness
from coin_ray.models.co_detr.pyramid import (
    Anchors,
    Maps,
    atss_anchor,
    place_anchors,
    rpn_anchors,
)
from models.co_detr.scenes import (
    CLASSES,
    TWO_IMAGES,
    fill_zero_weights,
    make_targets,
    noise_maps,
    rand,
)


def _square_anchors(side: int = 128, levels: int = 5) -> Anchors:
    cells = [max(-(-side // (8 * 2**level)), 1) for level in range(levels)]
    strides = [8 * 2**level for level in range(levels)]
    maps = Maps([torch.zeros(1, 1, c, c) for c in cells], strides, ((side, side),))
    return place_anchors(maps, [atss_anchor(s) for s in strides])


def _assigned_objects(boxes: Tensor, side: int = 128) -> Tensor:
    anchors = _square_anchors(side)
    return assign_objects(
        anchors.boxes, anchors.levels, anchors.inside[:1], [boxes], 9
    )[0]


def _random_boxes(count: int, seed: int, side: int = 128) -> Tensor:
    corner = rand(count, 2, seed=seed) * side * 0.6
    size = rand(count, 2, seed=seed + 1) * side * 0.35 + 4
    return torch.cat([corner, corner + size], 1)


many = given(st.integers(0, 10_000), st.integers(1, 6))


@many
def test_centres_of_positives_lie_in_their_object(seed: int, count: int) -> None:
    boxes = _random_boxes(count, seed)
    objects_of_anchors = _assigned_objects(boxes)
    rows = objects_of_anchors != NO_OBJECT
    positive_anchors = _square_anchors().boxes[rows]
    centres = (positive_anchors[:, :2] + positive_anchors[:, 2:]) / 2
    objects = boxes[objects_of_anchors[rows]]
    is_inside = (centres > objects[:, :2]) & (centres < objects[:, 2:])
    assert bool(is_inside.all())


@many
def test_permuting_objects_permutes_the_assignment(seed: int, count: int) -> None:
    boxes = _random_boxes(count, seed)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    first, second = _assigned_objects(boxes), _assigned_objects(boxes[order])
    assert torch.equal(first != NO_OBJECT, second != NO_OBJECT)
    assert torch.equal(
        boxes[first[first != NO_OBJECT]], boxes[order][second[second != NO_OBJECT]]
    )


@settings(max_examples=10, deadline=None)
@many
def test_the_assignment_equals_loops(seed: int, count: int) -> None:
    anchors, boxes = _square_anchors(64, 3), _random_boxes(count, seed, 64)
    owner = [NO_OBJECT] * len(anchors.boxes)
    best = [-1.0] * len(anchors.boxes)
    centres = (anchors.boxes[:, :2] + anchors.boxes[:, 2:]) / 2
    for number, box in enumerate(boxes):
        candidates: list[int] = []
        for level in range(3):
            rows = [i for i in range(len(owner)) if int(anchors.levels[i]) == level]
            centre = (box[:2] + box[2:]) / 2
            distances = {i: float((centres[i] - centre).norm()) for i in rows}
            candidates += sorted(rows, key=distances.__getitem__)[:9]
        iou = box_iou(box[None], anchors.boxes[candidates])[0]
        for row, overlap in zip(candidates, iou, strict=True):
            x, y = centres[row].tolist()
            inside = box[0] < x < box[2] and box[1] < y < box[3]
            if overlap >= iou.mean() + iou.std() and inside and overlap > best[row]:
                owner[row], best[row] = number, float(overlap)
    objects_of_anchors = assign_objects(
        anchors.boxes, anchors.levels, anchors.inside[:1], [boxes], 9
    )[0]
    different = sum(
        a != b for a, b in zip(objects_of_anchors.tolist(), owner, strict=True)
    )
    assert different <= count  # rounding may decide at each object's limit


def test_an_object_gets_several_anchors_of_about_its_size() -> None:
    objects_of_anchors = _assigned_objects(
        torch.tensor([[20.0, 20, 90, 90], [64, 64, 128, 128]])
    )
    levels = _square_anchors().levels
    counts = [int((objects_of_anchors == number).sum()) for number in range(2)]
    assert counts == pytest.approx([9, 9], abs=5)
    assert set(levels[objects_of_anchors != NO_OBJECT].tolist()) <= {0, 1}


def test_no_object_leaves_no_positive() -> None:
    assert bool((_assigned_objects(torch.zeros(0, 4)) == NO_OBJECT).all())


def test_anchors_on_padding_are_never_taken() -> None:
    anchors = _square_anchors()
    centres = (anchors.boxes[:, :2] + anchors.boxes[:, 2:]) / 2
    inside = centres[:, 0] < 64
    box = torch.tensor([[40.0, 20, 100, 90]])
    objects_of_anchors = assign_objects(
        anchors.boxes, anchors.levels, inside[None], [box], 9
    )[0]
    assert bool((objects_of_anchors != NO_OBJECT).any())
    assert not bool(((objects_of_anchors != NO_OBJECT) & ~inside).any())


def test_centerness_falls_from_the_middle_to_the_border() -> None:
    box = torch.tensor([[0.0, 0, 100, 100]]).expand(3, -1)
    centre = torch.tensor([[50.0, 50], [20, 50], [0, 50]])
    torch.testing.assert_close(
        centerness(torch.cat([centre - 4, centre + 4], 1), box),
        torch.tensor([1.0, 0.5, 0.0]),
    )


@pytest.mark.parametrize(("height", "width"), [(800, 1333), (96, 96), (64, 200)])
def test_anchors_lie_at_fixed_strides_whatever_the_size_of_the_image(
    height: int, width: int
) -> None:
    strides = [8, 16, 32, 64, 128]
    cells = [(-(-height // s), -(-width // s)) for s in strides]
    maps = Maps([torch.zeros(1, 1, *c) for c in cells], strides, ((height, width),))
    anchors = place_anchors(maps, [atss_anchor(s) for s in strides])
    assert [int((anchors.levels == n).sum()) for n in range(5)] == [
        h * w for h, w in cells
    ]
    for level, (stride, (_, columns)) in enumerate(zip(strides, cells, strict=True)):
        level_boxes = anchors.boxes[anchors.levels == level]
        centres = (level_boxes[:, :2] + level_boxes[:, 2:]) / 2
        assert (
            centres[:2].tolist() == [[0, 0], [stride, 0]][: len(centres)]
            or columns == 1
        )
        assert centres[-1].tolist() == [
            (columns - 1) * stride,
            (len(level_boxes) // columns - 1) * stride,
        ]
        assert bool((level_boxes[:, 2:] - level_boxes[:, :2] == 8 * stride).all())
    assert bool(anchors.inside.all())


def test_nine_anchors_have_three_areas_and_three_shapes() -> None:
    sides = rpn_anchors(8)[:, 2:] - rpn_anchors(8)[:, :2]
    torch.testing.assert_close(
        sides.prod(1).sqrt().view(3, 3),
        torch.tensor([32.0, 40.3175, 50.7968]).expand(3, 3),
        atol=1e-3,
        rtol=0,
    )
    torch.testing.assert_close(
        (sides[:, 1] / sides[:, 0]).view(3, 3)[:, 0], torch.tensor([0.5, 1.0, 2.0])
    )


def _new_head() -> Atss:
    torch.manual_seed(0)
    return fill_zero_weights(Atss(tiny(levels=4), CLASSES))


def test_anchors_on_padding_have_no_loss() -> None:
    """Convolutions and norms see it, so only the outputs there are changed."""
    head, maps = _new_head(), noise_maps(5)
    anchors = place_anchors(maps, [atss_anchor(s) for s in maps.strides])
    objects_of_anchors = assign_objects(
        anchors.boxes, anchors.levels, anchors.inside, [t.boxes for t in TWO_IMAGES], 9
    )
    logits, deltas, centre = head._predict(maps)
    changed = logits.masked_fill(~anchors.inside[..., None], 20.0), deltas, centre
    head._predict = lambda maps: changed  # type: ignore[method-assign]
    after = head._losses(maps, anchors, objects_of_anchors, TWO_IMAGES)
    head._predict = lambda maps: (logits, deltas, centre)  # type: ignore[method-assign]
    before = head._losses(maps, anchors, objects_of_anchors, TWO_IMAGES)
    assert not bool(anchors.inside.all())
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_positives_carry_the_token_of_their_anchor() -> None:
    maps = noise_maps(5)
    head_outputs = _new_head()(maps, TWO_IMAGES)
    anchors = place_anchors(maps, [atss_anchor(s) for s in maps.strides])
    tokens = maps.tokens()
    for image, positives in enumerate(head_outputs.positives):
        assert len(positives) > 0
        for box, feature in zip(positives.boxes, positives.features, strict=True):
            rows = (anchors.boxes == box).all(1).nonzero()[:, 0]
            assert any(torch.equal(tokens[image, row], feature) for row in rows)


def test_an_image_without_objects_leaves_the_others_box_losses_alone() -> None:
    head, maps = _new_head(), noise_maps(5)
    first = Maps([m[:1] for m in maps.levels], maps.strides, maps.sizes[:1])
    alone = head(first, TWO_IMAGES[:1]).losses
    together = head(maps, [TWO_IMAGES[0], make_targets()]).losses
    positives = len(head(first, TWO_IMAGES[:1]).positives[0])
    torch.testing.assert_close(together["giou"], alone["giou"])
    torch.testing.assert_close(
        together["centerness"] * (positives + 1), alone["centerness"] * positives
    )
