"""Scale jitter: a box stays on its object, whatever the size and place of the image."""

from __future__ import annotations

import pytest
import torch
from builders import detections

from coin_ray.config import Distill, Separate, TargetSettings
from coin_ray.errors import ConfigError
from coin_ray.fusion.rules import average
from coin_ray.fusion.separate import separate_knowledge
from coin_ray.structures import Targets
from coin_ray.training.separation_targets import make_targets
from coin_ray.training.zoom import zoom_randomly, zoom_separation_randomly

WIDTH, HEIGHT = 64, 48


def bright_square(left: int, top: int, side: int) -> torch.Tensor:
    image = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8)
    image[:, top : top + side, left : left + side] = 255
    return image


def square_target(left: int, top: int, side: int) -> Targets:
    box = torch.tensor([[left, top, left + side, top + side]], dtype=torch.float32)
    return Targets.from_labels(box, torch.tensor([0]), 2, ignored=box.clone())


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bright_extent(image: torch.Tensor) -> list[float]:
    rows, columns = (image[0] > 190).nonzero(as_tuple=True)
    return [
        float(columns.min()),
        float(rows.min()),
        float(columns.max()) + 1,
        float(rows.max()) + 1,
    ]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("zoom", [(0.4, 0.9), (1.0, 1.0), (1.0, 1.5)])
def test_the_box_is_where_the_object_is(zoom: tuple[float, float], seed: int) -> None:
    image, target = bright_square(24, 18, 16), square_target(24, 18, 16)
    zoomed, moved = zoom_randomly(image, target, zoom, generator(seed))
    assert zoomed.shape == image.shape
    assert zoomed.dtype == torch.uint8
    assert len(moved) == 1
    assert moved.boxes[0].tolist() == pytest.approx(bright_extent(zoomed), abs=1.1)
    assert torch.equal(moved.ignored, moved.boxes)
    assert torch.equal(moved.probs, target.probs)


def test_what_a_smaller_image_leaves_over_is_grey() -> None:
    image = torch.full((3, HEIGHT, WIDTH), 10, dtype=torch.uint8)
    zoomed, _ = zoom_randomly(image, square_target(0, 0, 8), (0.5, 0.5), generator(0))
    assert int((zoomed == 10).sum()) == 3 * (HEIGHT // 2) * (WIDTH // 2)
    assert int((zoomed == 114).sum()) == zoomed.numel() * 3 // 4


def test_boxes_cropped_to_a_small_part_are_dropped() -> None:
    """At twice the size, a quarter of the image stays: of four boxes in its corners, one
    at most is whole, and what is left of the others must be at least 35 %.
    """
    corners = [[0, 0], [56, 0], [0, 40], [56, 40]]
    boxes = torch.tensor([[x, y, x + 8, y + 8] for x, y in corners]).float()
    targets = Targets.from_labels(boxes, torch.tensor([0, 1, 0, 1]), 2)
    image = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8)
    for seed in range(20):
        _, moved = zoom_randomly(image, targets, (2.0, 2.0), generator(seed))
        assert len(moved) <= 1
        sides = moved.boxes[:, 2:] - moved.boxes[:, :2]
        assert bool((sides.prod(1) >= 0.35 * 16 * 16).all())
        assert bool((moved.boxes >= 0).all())
        assert bool((moved.boxes <= torch.tensor([64.0, 48, 64, 48])).all())


def test_other_students_refuse_a_zoom() -> None:
    """They would be trained without it, unnoticed."""
    with pytest.raises(ConfigError, match="student_zoom"):
        Distill(student="faster-rcnn", student_zoom=(0.5, 1.25))


def test_a_zoom_of_one_changes_nothing_and_draws_nothing() -> None:
    image, target = bright_square(3, 4, 9), square_target(3, 4, 9)
    draws = generator(0)
    zoomed, moved = zoom_randomly(image, target, (1.0, 1.0), draws)
    assert zoomed is image
    assert moved is target
    assert torch.equal(draws.get_state(), generator(0).get_state())


@pytest.mark.parametrize("seed", range(8))
def test_a_separation_is_zoomed_as_its_targets_are(seed: int) -> None:
    cloud = detections(((2, 2, 20, 20), 0, 0.9), ((30, 30, 60, 60), 1, 0.8))
    clip = detections(((2, 2, 20, 20), 0, 0.9), ((40, 2, 62, 30), 2, 0.95))
    separation = separate_knowledge(
        cloud,
        clip,
        Separate(clip_score_min=0.05),
        fuse_boxes=True,
        generator=torch.Generator(),
    )
    settings = TargetSettings(private_clip="learn")
    image = torch.randint(256, (3, 64, 64), dtype=torch.uint8)
    zoom = (0.5, 3.0)
    expected_image, expected = zoom_randomly(
        image, make_targets(separation, settings, average), zoom, generator(seed)
    )
    zoomed, moved = zoom_separation_randomly(image, separation, zoom, generator(seed))
    made = make_targets(moved, settings, average)
    assert torch.equal(zoomed, expected_image)
    for name in ("boxes", "probs", "weights", "ignored"):
        assert torch.equal(getattr(made, name), getattr(expected, name)), name
