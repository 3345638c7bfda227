"""Weak and strong augmentation of an image with its boxes: same geometry, different
colours (mean teacher).
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as V

from coin_ray import boxes as box_ops
from coin_ray.structures import Detections


def resize_to_fit(image: Tensor, short_side: int, long_side: int) -> Tensor:
    """Resize a uint8 image [3, H, W] so that the short side is ``short_side`` and the
    long one at most ``long_side``.
    """
    height, width = image.shape[1:]
    factor = min(short_side / min(height, width), long_side / max(height, width))
    size = [max(1, round(height * factor)), max(1, round(width * factor))]
    return image if size == [height, width] else V.resize(image, size, antialias=True)


def transform_detections(
    detections: Detections,
    original_size: tuple[int, int],
    input_size: tuple[int, int],
    mirrored: bool,
) -> Detections:
    """Move detections from the original image (width, height) into the frame of the
    resized, perhaps mirrored, input image (width, height).
    """
    width, height = input_size
    x_scale, y_scale = width / original_size[0], height / original_size[1]
    boxes = box_ops.scale_boxes(detections.boxes, x_scale, y_scale)
    if mirrored:
        boxes = box_ops.mirror_boxes(boxes, width)
    return detections.with_boxes(boxes)


def augment_strongly(image: Tensor, draw: random.Random, strength: float) -> Tensor:
    """Apply the published strong augmentation to a uint8 image: colour jitter (.4, .4,
    .4, .1) p .8, grey p .2, blur p .5, solarise p .2; ``strength`` scales all.
    """
    if strength <= 0:
        return image
    if draw.random() < 0.8:
        image = _jitter_colours(image, draw, strength)
    if draw.random() < 0.2 * strength:
        image = V.rgb_to_grayscale(image, 3)
    if draw.random() < 0.5 * strength:
        sigma = draw.uniform(0.1, 2.0)
        kernel_side = 2 * max(1, round(2 * sigma)) + 1
        image = V.gaussian_blur(image, [kernel_side, kernel_side], [sigma, sigma])
    if draw.random() < 0.2 * strength:
        image = V.solarize(image, 128)
    return image


def _jitter_colours(image: Tensor, draw: random.Random, strength: float) -> Tensor:
    """Adjust brightness, contrast, saturation and hue in random order."""

    def draw_factor() -> float:
        return draw.uniform(1 - 0.4 * strength, 1 + 0.4 * strength)

    def draw_hue() -> float:
        return draw.uniform(-0.1 * strength, 0.1 * strength)

    adjustments: list[Callable[[Tensor], Tensor]] = [
        lambda x: V.adjust_brightness(x, draw_factor()),
        lambda x: V.adjust_contrast(x, draw_factor()),
        lambda x: V.adjust_saturation(x, draw_factor()),
        lambda x: V.adjust_hue(x, draw_hue()),
    ]
    draw.shuffle(adjustments)
    for adjust in adjustments:
        image = adjust(image)
    return image


def mirror_image(image: Tensor) -> Tensor:
    """Flip an image [3, H, W] left to right."""
    return torch.flip(image, [-1])
