"""Weak and strong views of an image with its boxes: same geometry, different colours
(mean teacher).
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
    """uint8 [3, H, W] resized so that the short side is ``short_side`` and the long one
    at most ``long_side``.
    """
    height, width = image.shape[1:]
    factor = min(short_side / min(height, width), long_side / max(height, width))
    size = [max(1, round(height * factor)), max(1, round(width * factor))]
    return image if size == [height, width] else V.resize(image, size, antialias=True)


def transform_detections(
    detections: Detections,
    original: tuple[int, int],
    view: tuple[int, int],
    mirrored: bool,
) -> Detections:
    """Detections of the original image (width, height) in the frame of a view (width,
    height).
    """
    boxes = box_ops.scale_boxes(
        detections.boxes, view[0] / original[0], view[1] / original[1]
    )
    return detections.with_boxes(
        box_ops.mirror_boxes(boxes, view[0]) if mirrored else boxes
    )


def augment_strongly(image: Tensor, draw: random.Random, strength: float) -> Tensor:
    """Published strong view of a uint8 image: colour jitter (.4, .4, .4, .1) p .8, grey
    p .2, blur p .5, solarise p .2; ``strength`` scales all.
    """
    if strength <= 0:
        return image
    if draw.random() < 0.8:
        image = _jitter(image, draw, strength)
    if draw.random() < 0.2 * strength:
        image = V.rgb_to_grayscale(image, 3)
    if draw.random() < 0.5 * strength:
        sigma = draw.uniform(0.1, 2.0)
        image = V.gaussian_blur(
            image, [2 * max(1, round(2 * sigma)) + 1] * 2, [sigma, sigma]
        )
    if draw.random() < 0.2 * strength:
        image = V.solarize(image, 128)
    return image


def _jitter(image: Tensor, draw: random.Random, strength: float) -> Tensor:
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda x: V.adjust_brightness(
            x, draw.uniform(1 - 0.4 * strength, 1 + 0.4 * strength)
        ),
        lambda x: V.adjust_contrast(
            x, draw.uniform(1 - 0.4 * strength, 1 + 0.4 * strength)
        ),
        lambda x: V.adjust_saturation(
            x, draw.uniform(1 - 0.4 * strength, 1 + 0.4 * strength)
        ),
        lambda x: V.adjust_hue(x, draw.uniform(-0.1 * strength, 0.1 * strength)),
    ]
    draw.shuffle(changes)
    for change in changes:
        image = change(image)
    return image


def mirror_image(image: Tensor) -> Tensor:
    return torch.flip(image, [-1])
