"""Show a student its training images at random sizes: scale jitter, as detectors are
trained with (torchvision's ``ScaleJitter`` and ``RandomZoomOut``).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from coin_ray.structures import Targets

GREY = 114
"""Value of pixels around an image that was made smaller."""
VISIBLE_SHARE = 0.35
"""Boxes of which less is left after the crop are not learned."""
SIDE_MIN = 2.0
"""Nor are those with a shorter side, in pixels."""


def zoom_randomly(
    image: Tensor,
    targets: Targets,
    zoom: tuple[float, float],
    generator: torch.Generator,
) -> tuple[Tensor, Targets]:
    """Scale a uint8 image [3, H, W] and its targets by a factor drawn from ``zoom``, at
    a random place of an image of the same size. What is too large is cropped, what is
    left over is grey.
    """
    lowest, highest = zoom
    if lowest == highest == 1:
        return image, targets
    draws = torch.rand(3, generator=generator).tolist()
    factor = lowest + (highest - lowest) * draws[0]
    height, width = image.shape[1:]
    new_height = max(1, round(height * factor))
    new_width = max(1, round(width * factor))
    left = round(draws[1] * (width - new_width))
    top = round(draws[2] * (height - new_height))
    scaled = _resize(image, new_height, new_width)
    canvas = _paste(scaled, height, width, left, top)
    factors = new_width / width, new_height / height
    return canvas, _move_targets(targets, factors, (left, top), (width, height))


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    resized = F.interpolate(
        image[None].float(),
        (height, width),
        mode="bilinear",
        antialias=True,
        align_corners=False,
    )
    return resized[0].round().clamp(0, 255).to(torch.uint8)


def _paste(image: Tensor, height: int, width: int, left: int, top: int) -> Tensor:
    """Return a grey image [3, height, width] with ``image`` at (left, top), which may be
    negative.
    """
    canvas = image.new_full((3, height, width), GREY)
    first_x, first_y = max(0, left), max(0, top)
    end_x = min(width, left + image.shape[2])
    end_y = min(height, top + image.shape[1])
    canvas[:, first_y:end_y, first_x:end_x] = image[
        :, first_y - top : end_y - top, first_x - left : end_x - left
    ]
    return canvas


def _move_targets(
    targets: Targets,
    factors: tuple[float, float],
    offset: tuple[int, int],
    size: tuple[int, int],
) -> Targets:
    boxes, is_visible = _move_boxes(targets.boxes, factors, offset, size)
    ignored, is_ignored = _move_boxes(targets.ignored, factors, offset, size)
    return Targets(
        boxes[is_visible],
        targets.probs[is_visible],
        targets.weights[is_visible],
        ignored[is_ignored],
    )


def _move_boxes(
    boxes: Tensor,
    factors: tuple[float, float],
    offset: tuple[int, int],
    size: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Return boxes [N, 4] in the new image, cut at its edges, and [N] whether enough of
    each is left.
    """
    moved = boxes * boxes.new_tensor(factors * 2) + boxes.new_tensor(offset * 2)
    cut = torch.minimum(moved.clamp(min=0), boxes.new_tensor(size * 2))
    sides = cut[:, 2:] - cut[:, :2]
    area_before = (moved[:, 2:] - moved[:, :2]).prod(1)
    is_visible = sides.prod(1) >= VISIBLE_SHARE * area_before
    return cut, is_visible & (sides.amin(1) >= SIDE_MIN)
