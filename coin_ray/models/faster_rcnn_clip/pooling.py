"""RoIAlign. It is linear and separable: on small maps it is one matrix product per
image, several times faster on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align

SMALL_MAP = 1024
"""Cells of a feature map up to which the matrix product is faster on a CPU."""


def pool_regions(
    features: Tensor, boxes: Sequence[Tensor], side: int, stride: int, samples: int
) -> Tensor:
    """Apply RoIAlign (aligned) to ``features`` [B, C, H, W] and each image's boxes [R,
    4] in pixels; returns [sum R, C, side, side].

    ``samples`` per side of a bin; 0: as many as the bin has cells.
    """
    height, width = features.shape[2:]
    if features.device.type != "cpu" or samples == 0 or height * width > SMALL_MAP:
        pooled: Tensor = roi_align(
            features, list(boxes), side, 1 / stride, samples, aligned=True
        )
        return pooled
    pooled_images = [
        _pool_image(image_features, image_boxes / stride - 0.5, side, samples)
        for image_features, image_boxes in zip(features, boxes, strict=True)
    ]
    return torch.cat(pooled_images)


def _pool_image(features: Tensor, boxes: Tensor, side: int, samples: int) -> Tensor:
    """Pool ``features`` [C, H, W] of boxes [R, 4] in cells; returns [R, C, side,
    side].
    """
    channels, height, width = features.shape
    rows = _bin_weights(boxes[:, 1], boxes[:, 3], height, side, samples)
    columns = _bin_weights(boxes[:, 0], boxes[:, 2], width, side, samples)
    weights = torch.einsum("riy,rjx->rijyx", rows, columns).reshape(-1, height * width)
    pooled = weights @ features.permute(1, 2, 0).reshape(height * width, channels)
    return pooled.view(len(boxes), side, side, channels).permute(0, 3, 1, 2)


def _bin_weights(
    start: Tensor, end: Tensor, size: int, side: int, samples: int
) -> Tensor:
    """Return the weights [R, side, size] of each cell along one axis in each bin of each
    box, by linear interpolation at the bin's samples.
    """
    count = side * samples
    length = (end - start)[:, None]
    positions = start[:, None] + length * (torch.arange(count) + 0.5) / count
    clamped = positions.clamp(0, size - 1)[..., None]
    weights: Tensor = 1 - (clamped - torch.arange(size)).abs()
    is_inside = ((positions >= -1) & (positions <= size))[..., None]
    weights = weights.clamp(min=0) * is_inside
    return weights.view(len(start), side, samples, size).mean(2)
