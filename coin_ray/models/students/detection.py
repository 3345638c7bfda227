"""From images to detections, the same way for every student of this package."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import batched_nms
from torchvision.transforms.v2 import functional as V

from coin_ray import boxes as box_ops
from coin_ray.data.augmentation import resize_to_fit
from coin_ray.models.students.base import (
    InputFormat,
    PostProcess,
    StudentRendering,
)
from coin_ray.structures import Detections

BRIGHTNESS_WEIGHTS = (0.299, 0.587, 0.114)
"""Of red, green and blue (ITU-R BT.601), as Pillow converts to grey."""


MIN_SIDE = 0.5
"""Sides of a box in the network's input below which it is none."""


class TensorDetector(Protocol):
    """The part of ``DetectorStudent`` that detection needs."""

    @property
    def input_format(self) -> InputFormat: ...

    @property
    def post_process(self) -> PostProcess: ...

    def detect_tensors(self, pixels: Tensor) -> tuple[Tensor, Tensor]: ...


@torch.no_grad()
def detect_objects(
    detector: TensorDetector, images: Sequence[Tensor], device: torch.device
) -> list[Detections]:
    """Return the detections of uint8 images [3, H, W] in their own pixels, best first,
    on ``device``. Images of one size go through the network together.
    """
    resized = [resize_image(image, detector.input_format) for image in images]
    rows_by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row, image in enumerate(resized):
        rows_by_size[padded_size([image], detector.input_format)].append(row)
    detections: dict[int, Detections] = {}
    for size, rows in rows_by_size.items():
        batch = [resized[row].to(device) for row in rows]
        pixels = make_pixels(batch, size, detector.input_format)
        boxes, scores = detector.detect_tensors(pixels)
        for index, row in enumerate(rows):
            in_input = select_detections(
                boxes[index].float(),
                scores[index].float(),
                resized[row].shape[-2:],
                detector.post_process,
            )
            detections[row] = _scale(in_input, resized[row], images[row])
    return [detections[row] for row in range(len(images))]


def resize_image(image: Tensor, input_format: InputFormat) -> Tensor:
    """Resize a uint8 image [3, H, W] to the size inside the network's input."""
    side = input_format.side
    if input_format.keep_ratio:
        return resize_to_fit(image, side, side)
    resized: Tensor = V.resize(image, [side, side], antialias=True)
    return resized


def padded_size(images: Sequence[Tensor], input_format: InputFormat) -> tuple[int, int]:
    """Return the (height, width) of an input that holds all images [3, h, w]."""
    multiple = input_format.multiple
    height = max(image.shape[1] for image in images)
    width = max(image.shape[2] for image in images)
    return height + -height % multiple, width + -width % multiple


def make_pixels(
    images: Sequence[Tensor], size: tuple[int, int], input_format: InputFormat
) -> Tensor:
    """Return resized uint8 images [3, h, w] as the network's input [B, 3, *size]."""
    pad_value = input_format.pad_value
    padded = [
        F.pad(
            image.float(),
            (0, size[1] - image.shape[2], 0, size[0] - image.shape[1]),
            value=pad_value,
        )
        for image in images
    ]
    return normalise_pixels(torch.stack(padded), input_format)


def normalise_pixels(pixels: Tensor, input_format: InputFormat) -> Tensor:
    """Render and normalise padded RGB pixels [B, 3, h, w] in 0..255, and order their
    channels.
    """
    pixels = render_pixels(pixels, input_format.rendering)
    if any(input_format.mean) or set(input_format.std) != {1.0}:
        mean, std = (
            torch.tensor(numbers, device=pixels.device).view(3, 1, 1)
            for numbers in (input_format.mean, input_format.std)
        )
        pixels = (pixels - mean) / std
    return pixels.flip(1) if input_format.bgr else pixels


def render_pixels(pixels: Tensor, rendering: StudentRendering) -> Tensor:
    """Return RGB pixels [B, 3, h, w] in 0..255 in a rendering."""
    if rendering == "plain":
        return pixels
    weights = torch.tensor(BRIGHTNESS_WEIGHTS, device=pixels.device).view(3, 1, 1)
    brightness = (pixels * weights).sum(1, keepdim=True).expand(-1, 3, -1, -1)
    return brightness if rendering == "grey" else 255 - brightness


def select_detections(
    boxes: Tensor, scores: Tensor, size: Sequence[int], settings: PostProcess
) -> Detections:
    """Return the detections, best first, of the boxes [A, 4] and scores [A, K] of an
    image of ``size`` (height, width) inside the input.
    """
    limits = torch.tensor([size[1], size[0]] * 2, device=boxes.device)
    boxes = torch.minimum(boxes.clamp(min=0), limits)
    # a box in the padding has no area left
    has_area = (boxes[:, 2:] - boxes[:, :2]).amin(1) >= MIN_SIDE
    is_likely = (scores > settings.score_min) & has_area[:, None]
    if settings.best_class_only:
        labels = scores.argmax(1)
        rows = is_likely.any(1).nonzero()[:, 0]
        labels = labels[rows]
    else:
        rows, labels = is_likely.nonzero().unbind(1)
    boxes = boxes[rows]
    label_scores = scores[rows, labels]
    if settings.nms < 1:
        order = batched_nms(boxes, label_scores, labels, settings.nms)
    else:
        order = label_scores.argsort(descending=True, stable=True)
    order = order[: settings.detections]
    probs = class_distributions(scores[rows[order]])
    return Detections(boxes[order], label_scores[order], labels[order], probs)


def class_distributions(scores: Tensor) -> Tensor:
    """Return [N, K+1] distributions, background last, of independent scores [N, K]: the
    scores, divided by their sum if it exceeds 1, and what they leave for background.
    """
    foreground = scores / scores.sum(1, keepdim=True).clamp(min=1.0)
    background = (1 - foreground.sum(1, keepdim=True)).clamp(min=0.0)
    return torch.cat([foreground, background], 1)


def _scale(detections: Detections, resized: Tensor, image: Tensor) -> Detections:
    x_factor = image.shape[2] / resized.shape[2]
    y_factor = image.shape[1] / resized.shape[1]
    boxes = box_ops.scale_boxes(detections.boxes, x_factor, y_factor)
    return detections.with_boxes(boxes)
