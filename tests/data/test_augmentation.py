from __future__ import annotations

import random

import pytest
import torch
from builders import detections

from coin_ray.data.augmentation import (
    augment_strongly,
    mirror_image,
    resize_to_fit,
    transform_detections,
)

IMAGE = torch.zeros(3, 60, 120, dtype=torch.uint8)
IMAGE[:, 20:40, 30:60] = 255


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((60, 120), (30, 60)),
        ((120, 60), (60, 30)),
        ((60, 300), (10, 50)),
        ((30, 40), (30, 40)),
        ((15, 20), (30, 40)),
    ],
)
def test_resize_to_fit(size: tuple[int, int], expected: tuple[int, int]) -> None:
    """Short side 30, long side at most 50 (60 in the first two)."""
    long_side = 60 if max(size) == 120 else 50
    assert (
        tuple(
            resize_to_fit(
                torch.zeros(3, *size, dtype=torch.uint8), 30, long_side
            ).shape[1:]
        )
        == expected
    )


def test_an_image_that_fits_is_not_touched() -> None:
    assert resize_to_fit(IMAGE, 60, 120) is IMAGE


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("short_side", [60, 120, 30])
def test_boxes_follow_resize_and_mirror(mirrored: bool, short_side: int) -> None:
    """The box around the white block stays around the white block."""
    resized = resize_to_fit(IMAGE, short_side, 1000)
    resized = mirror_image(resized) if mirrored else resized
    moved = transform_detections(
        detections(([30, 20, 60, 40], 1, 0.9)),
        (120, 60),
        (resized.shape[2], resized.shape[1]),
        mirrored,
    )
    x1, y1, x2, y2 = (int(x) for x in moved.boxes[0].round())
    inside = resized[:, y1:y2, x1:x2]
    assert int(inside.min()) > 100
    assert int((resized > 127).sum()) == pytest.approx(inside.numel(), rel=0.15)
    assert moved.labels.tolist() == [1]


def test_boxes_by_hand() -> None:
    moved = transform_detections(
        detections(([30, 20, 60, 40], 1, 0.9)), (120, 60), (60, 90), True
    )
    assert moved.boxes.tolist() == [[30, 30, 45, 60]]


def test_strong_augmentation_keeps_shape_and_type_and_is_a_function_of_the_draw() -> (
    None
):
    image = torch.randint(
        0,
        256,
        (3, 40, 50),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(0),
    )
    views = [augment_strongly(image, random.Random(seed), 1.0) for seed in range(12)]
    assert {(v.shape, v.dtype) for v in views} == {(image.shape, torch.uint8)}
    assert sum(not torch.equal(v, image) for v in views) >= 8
    assert all(
        torch.equal(v, augment_strongly(image, random.Random(seed), 1.0))
        for seed, v in enumerate(views)
    )
    assert augment_strongly(image, random.Random(0), 0.0) is image
