"""Weights of objects and regions in which nothing is background, in every assigner;
denoising queries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coin_ray.config.co_detr import tiny
from coin_ray.errors import InputError
from coin_ray.models.co_detr.collaborative import CollaborativeDetr
from coin_ray.models.co_detr.denoising import Denoising
from coin_ray.models.co_detr.queries import concatenate_queries
from coin_ray.models.co_detr.rcnn import UNUSED, assign_anchors, sample_regions
from coin_ray.models.co_detr.targets import Targets, is_covered
from coin_ray.models.co_detr.two_stage import BoxEmbedding
from models.co_detr.scenes import (
    CLASSES,
    TWO_IMAGES,
    make_targets,
    new_collaborative,
    new_detr,
    noise_batch,
    rand,
    seeded,
)

SIZES = ((64, 96), (50, 70))


def losses(model: CollaborativeDetr, targets: list[Targets]) -> dict[str, float]:
    return {
        name: float(v.detach())
        for name, v in model.objective(noise_batch(), targets, seeded()).losses.items()
    }


def weighted(weight: float) -> list[Targets]:
    return [
        replace(t, weights=torch.full((len(t.labels),), weight)) for t in TWO_IMAGES
    ]


def test_weights_of_one_change_nothing() -> None:
    model = new_collaborative(tiny(denoising=4))
    assert losses(model, weighted(1.0)) == losses(model, TWO_IMAGES)


def test_every_box_loss_is_in_proportion_to_its_objects_weights() -> None:
    model = new_collaborative(tiny(denoising=4))
    whole, half = losses(model, TWO_IMAGES), losses(model, weighted(0.5))
    boxes = [name for name in whole if name.endswith(("l1", "giou", "centerness"))]
    assert len(boxes) == 22
    for name in boxes:
        assert half[name] == pytest.approx(whole[name] / 2, rel=1e-5), name
    for name in set(whole) - set(boxes):
        assert half[name] < whole[name], name


def test_objects_of_weight_zero_teach_no_weight_of_a_box_branch() -> None:
    model = new_collaborative()
    model.objective(noise_batch(), weighted(0.0), seeded()).total.backward()  # type: ignore[no-untyped-call]
    for branch in (*model.base.decoder.regress, model.base.two_stage.regress):
        assert all(
            p.grad is None or not bool(p.grad.any()) for p in branch.parameters()
        )


EVERYWHERE = torch.tensor([[0.0, 0, 96, 64]])


def test_without_objects_an_ignored_image_has_no_loss_at_all() -> None:
    empty = [replace(make_targets(), ignored=EVERYWHERE) for _ in range(2)]
    found = losses(new_collaborative(tiny(denoising=4)), empty)
    # anchors stand out
    inside = {
        name: value
        for name, value in found.items()
        if name not in ("atss_class", "rcnn_proposal_class")
    }
    assert set(inside.values()) == {0.0}
    assert (
        found["atss_class"]
        < losses(
            new_collaborative(tiny(denoising=4)), [make_targets(), make_targets()]
        )["atss_class"]
    )


def test_ignored_regions_leave_the_objects_to_be_learned() -> None:
    model = new_collaborative()
    plain, ignored = (
        losses(model, TWO_IMAGES),
        losses(model, [replace(t, ignored=EVERYWHERE) for t in TWO_IMAGES]),
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


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 3))
def test_covered_boxes_have_half_their_area_in_one_region(
    seed: int, count: int
) -> None:
    corner = rand(5 + count, 2, seed=seed).double() * 10
    rows = torch.cat(
        [corner, corner + rand(5 + count, 2, seed=seed + 1).double() * 10 + 0.1], 1
    )
    boxes, regions = rows[:5], rows[5:]

    def share(box: Tensor, region: Tensor) -> float:
        width = min(box[2], region[2]) - max(box[0], region[0])
        height = min(box[3], region[3]) - max(box[1], region[1])
        return float(
            max(width, 0) * max(height, 0) / ((box[2] - box[0]) * (box[3] - box[1]))
        )

    assert is_covered(boxes, regions).tolist() == [
        any(share(b, r) >= 0.5 for r in regions) for b in boxes
    ]


def test_anchors_and_proposals_in_ignored_regions_are_no_background() -> None:
    anchors, inside = (
        torch.tensor([[0.0, 0, 10, 10], [40, 0, 50, 10], [20, 20, 30, 30]]),
        torch.ones(3, dtype=torch.bool),
    )
    box, region = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[0.0, 0, 60, 15]])
    assert assign_anchors(anchors, inside, box, region).tolist() == [0, UNUSED, -1]
    assert assign_anchors(anchors, inside, box[:0], region).tolist() == [
        UNUSED,
        UNUSED,
        -1,
    ]
    sampled = sample_regions(
        anchors,
        Targets(box, torch.zeros(1).long(), None, region),
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
def test_impossible_weights_are_told(weights: Tensor) -> None:
    with pytest.raises(
        InputError, match="expected a finite weight of at least 0 for each of 2 objects"
    ):
        new_collaborative().objective(
            noise_batch(), [replace(TWO_IMAGES[0], weights=weights), TWO_IMAGES[1]]
        )


def denoising(**changes: Any) -> Denoising:
    torch.manual_seed(0)
    return Denoising(tiny(**({"denoising": 6} | changes)), CLASSES)


def embedding() -> BoxEmbedding:
    torch.manual_seed(1)
    return BoxEmbedding(64)


def test_each_part_holds_every_object_near_and_far() -> None:
    group = denoising(denoising_labels=0.0)(TWO_IMAGES, SIZES, embedding(), seeded())
    assert group.parts == 3
    assert group.targets.classes[0].tolist() == [0, 2, CLASSES, CLASSES] * 3
    assert group.targets.has_loss[0].tolist() == [True] * 12
    assert group.targets.has_loss[1].tolist() == [True, False] * 6
    truth = TWO_IMAGES[0].normalised_boxes(SIZES[0])
    torch.testing.assert_close(group.targets.boxes[0], truth.repeat(6, 1))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_corners_move_by_less_than_half_a_side_or_by_one_to_two(seed: int) -> None:
    # far from the border, where corners are held
    middle = [make_targets((40, 28, 48, 36, 0), (50, 30, 54, 34, 1))]
    moved = (
        denoising()(middle, SIZES[:1], embedding(), seeded(seed))
        .queries.references[0]
        .view(3, 2, 2, 4)
    )
    truth = middle[0].normalised_boxes(SIZES[0])
    near, far = (moved[:, kind] for kind in (0, 1))

    def corners(boxes: Tensor) -> Tensor:
        half = boxes[..., 2:] / 2
        return torch.cat([boxes[..., :2] - half, boxes[..., :2] + half], -1)

    half = truth[:, 2:].repeat(1, 2) / 2
    assert bool(((corners(near) - corners(truth)).abs() <= half + 1e-5).all())
    assert bool(((corners(far) - corners(truth)).abs() <= 3 * half + 1e-5).all())
    assert bool((moved[..., 2:] > 0).all())


def test_half_of_the_share_of_labels_is_drawn_anew() -> None:
    module = denoising(denoising_labels=1.0)
    renamed = module._add_label_noise(torch.zeros(1, 9000, dtype=torch.int64), seeded())
    assert float((renamed != 0).float().mean()) == pytest.approx(
        0.5 * (CLASSES - 1) / CLASSES, abs=0.02
    )


def test_denoising_queries_are_unseen_by_all_others_and_see_only_their_part() -> None:
    main = new_detr().two_stage.queries_at(rand(2, 5, 4) * 0.5 + 0.2)
    group = denoising()(TWO_IMAGES, SIZES, embedding(), seeded())
    mask = concatenate_queries(main, [group])[1]
    assert mask is not None
    assert not bool(mask[:, :5, 5:].any())
    assert not bool(mask[:, 5:, :5].any())
    assert bool(mask[0, 5:9, 5:9].all())
    assert not bool(mask[0, 5:9, 9:].any())


def test_denoising_changes_no_other_loss_and_nothing_of_what_is_shipped() -> None:
    plain, noisy = (
        new_collaborative(tiny(auxiliary=())),
        new_collaborative(tiny(auxiliary=(), denoising=6)),
    )
    noisy.load_state_dict(plain.state_dict(), strict=False)
    before, after = losses(plain, TWO_IMAGES), losses(noisy, TWO_IMAGES)
    for name, value in before.items():
        assert after[name] == pytest.approx(value, rel=1e-5), name
    assert set(after) - set(before) == {
        f"denoising_{layer}_{part}"
        for layer in (0, 1)
        for part in ("class", "l1", "giou")
    }
    assert {n for n in noisy.state_dict() if not n.startswith("base.")} == {
        "denoising.labels.weight"
    }


def test_a_batch_without_objects_has_no_denoising_query() -> None:
    group = denoising()([make_targets(), make_targets()], SIZES, embedding(), seeded())
    assert group.queries.content.shape == (2, 0, 64)
    found = losses(
        new_collaborative(tiny(denoising=6)), [make_targets(), make_targets()]
    )
    assert {value for name, value in found.items() if name.startswith("denoising")} == {
        0.0
    }


def test_eighty_objects_make_one_part() -> None:
    crowd = make_targets(
        *(
            (i % 10 * 9.0, i // 10 * 7.0, i % 10 * 9 + 8.0, i // 10 * 7 + 6.0, i % 3)
            for i in range(80)
        )
    )
    model = new_collaborative(tiny(denoising=6))
    found = model.objective(noise_batch(), [crowd, make_targets()], seeded())
    assert bool(torch.isfinite(found.total))
    assert model.denoising is not None
    assert model.denoising(
        [crowd, make_targets()], SIZES, embedding(), seeded()
    ).queries.content.shape == (2, 160, 64)


def test_checkpointed_layers_give_the_same_losses_and_gradients() -> None:
    kept, again = new_collaborative(), new_collaborative(tiny(checkpoint_layers=True))
    found = []
    for model in (kept, again):
        total = model.objective(noise_batch(), TWO_IMAGES, seeded()).total
        total.backward()  # type: ignore[no-untyped-call]
        found.append(
            (
                float(total.detach()),
                [p.grad.clone() for p in model.parameters() if p.grad is not None],
            )
        )
    assert found[0][0] == found[1][0]
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
