"""Denoising queries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from coin_ray.config.co_detr import tiny
from coin_ray.models.co_detr.denoising import Denoising
from coin_ray.models.co_detr.queries import concatenate_queries
from coin_ray.models.co_detr.two_stage import BoxEmbedding
from models.co_detr.scenes import (
    CLASSES,
    TWO_IMAGES,
    make_crowd,
    make_targets,
    new_collaborative,
    new_detr,
    noise_batch,
    objective_losses,
    rand,
    seeded,
)

SIZES = ((64, 96), (50, 70))


def _new_denoising(**changes: Any) -> Denoising:
    torch.manual_seed(0)
    return Denoising(tiny(**({"denoising": 6} | changes)), CLASSES)


def _new_embedding() -> BoxEmbedding:
    torch.manual_seed(1)
    return BoxEmbedding(64)


def test_each_part_holds_every_object_near_and_far() -> None:
    group = _new_denoising(denoising_labels=0.0)(
        TWO_IMAGES, SIZES, _new_embedding(), seeded()
    )
    assert group.parts == 3
    assert group.targets.classes[0].tolist() == [0, 2, CLASSES, CLASSES] * 3
    assert group.targets.has_loss[0].tolist() == [True] * 12
    assert group.targets.has_loss[1].tolist() == [True, False] * 6
    truth = TWO_IMAGES[0].normalised_boxes(SIZES[0])
    torch.testing.assert_close(group.targets.boxes[0], truth.repeat(6, 1))


@given(st.integers(0, 10_000))
def test_corners_move_by_less_than_half_a_side_or_by_one_to_two(seed: int) -> None:
    # far from the border, where corners are clamped
    middle = [make_targets((40, 28, 48, 36, 0), (50, 30, 54, 34, 1))]
    group = _new_denoising()(middle, SIZES[:1], _new_embedding(), seeded(seed))
    moved = group.queries.references[0].view(3, 2, 2, 4)
    truth = middle[0].normalised_boxes(SIZES[0])
    near, far = moved[:, 0], moved[:, 1]

    def corners(boxes: Tensor) -> Tensor:
        half = boxes[..., 2:] / 2
        return torch.cat([boxes[..., :2] - half, boxes[..., :2] + half], -1)

    half = truth[:, 2:].repeat(1, 2) / 2
    assert bool(((corners(near) - corners(truth)).abs() <= half + 1e-5).all())
    assert bool(((corners(far) - corners(truth)).abs() <= 3 * half + 1e-5).all())
    assert bool((moved[..., 2:] > 0).all())


def test_half_of_the_share_of_labels_is_replaced() -> None:
    module = _new_denoising(denoising_labels=1.0)
    noisy_labels = module._add_label_noise(
        torch.zeros(1, 9000, dtype=torch.int64), seeded()
    )
    assert float((noisy_labels != 0).float().mean()) == pytest.approx(
        0.5 * (CLASSES - 1) / CLASSES, abs=0.02
    )


def test_denoising_queries_are_unseen_by_all_others_and_see_only_their_part() -> None:
    main = new_detr().two_stage.queries_at(rand(2, 5, 4) * 0.5 + 0.2)
    group = _new_denoising()(TWO_IMAGES, SIZES, _new_embedding(), seeded())
    mask = concatenate_queries(main, [group])[1]
    assert mask is not None
    assert not bool(mask[:, :5, 5:].any())
    assert not bool(mask[:, 5:, :5].any())
    assert bool(mask[0, 5:9, 5:9].all())
    assert not bool(mask[0, 5:9, 9:].any())


def test_denoising_changes_no_other_loss_and_no_exported_weight() -> None:
    plain = new_collaborative(tiny(auxiliary=()))
    noisy = new_collaborative(tiny(auxiliary=(), denoising=6))
    noisy.load_state_dict(plain.state_dict(), strict=False)
    before = objective_losses(plain, TWO_IMAGES)
    after = objective_losses(noisy, TWO_IMAGES)
    for name, loss in before.items():
        assert after[name] == pytest.approx(loss, rel=1e-5), name
    assert set(after) - set(before) == {
        f"denoising_{layer}_{part}"
        for layer in (0, 1)
        for part in ("class", "l1", "giou")
    }
    assert {n for n in noisy.state_dict() if not n.startswith("base.")} == {
        "denoising.labels.weight"
    }


def test_a_batch_without_objects_has_no_denoising_query() -> None:
    group = _new_denoising()(
        [make_targets(), make_targets()], SIZES, _new_embedding(), seeded()
    )
    assert group.queries.content.shape == (2, 0, 64)
    losses = objective_losses(
        new_collaborative(tiny(denoising=6)), [make_targets(), make_targets()]
    )
    denoising_losses = {
        loss for name, loss in losses.items() if name.startswith("denoising")
    }
    assert denoising_losses == {0.0}


def test_eighty_objects_make_one_part() -> None:
    crowd = make_crowd()
    model = new_collaborative(tiny(denoising=6))
    objective = model.objective(noise_batch(), [crowd, make_targets()], seeded())
    assert bool(torch.isfinite(objective.total))
    assert model.denoising is not None
    targets = [crowd, make_targets()]
    group = model.denoising(targets, SIZES, _new_embedding(), seeded())
    assert group.queries.content.shape == (2, 160, 64)
