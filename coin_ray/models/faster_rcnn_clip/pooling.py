"""RoIAlign. It is linear and separable: on small maps one matrix product per image does
it, several times faster on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align

SMALL_MAP = 1024
"""Cells of a feature map up to which the product is faster on a CPU."""


def pool_regions(
    features: Tensor, boxes: Sequence[Tensor], side: int, stride: int, samples: int
) -> Tensor:
    """RoIAlign (aligned) of ``features`` [B, C, H, W] on each image's boxes [R, 4] in
    pixels -> [sum R, C, side, side].

    ``samples`` per side of a bin; 0: as many as the bin has cells.
    """
    height, width = features.shape[2:]
    if features.device.type != "cpu" or samples == 0 or height * width > SMALL_MAP:
        pooled: Tensor = roi_align(
            features, list(boxes), side, 1 / stride, samples, aligned=True
        )
        return pooled
    return torch.cat(
        [
            _pool_image(image, own / stride - 0.5, side, samples)
            for image, own in zip(features, boxes, strict=True)
        ]
    )


def _pool_image(features: Tensor, boxes: Tensor, side: int, samples: int) -> Tensor:
    """``features`` [C, H, W], boxes [R, 4] in cells -> [R, C, side, side]."""
    channels, height, width = features.shape
    rows = _bin_weights(boxes[:, 1], boxes[:, 3], height, side, samples)
    columns = _bin_weights(boxes[:, 0], boxes[:, 2], width, side, samples)
    weights = torch.einsum("riy,rjx->rijyx", rows, columns).reshape(-1, height * width)
    pooled = weights @ features.permute(1, 2, 0).reshape(height * width, channels)
    return pooled.view(len(boxes), side, side, channels).permute(0, 3, 1, 2)


def _bin_weights(
    start: Tensor, end: Tensor, size: int, side: int, samples: int
) -> Tensor:
    """[R, side, size]: how much of each cell along one axis a bin of each box takes, by
    linear interpolation at its samples.
    """
    place = start[:, None] + (end - start)[:, None] * (
        torch.arange(side * samples) + 0.5
    ) / (side * samples)
    near: Tensor = 1 - (place.clamp(0, size - 1)[..., None] - torch.arange(size)).abs()
    inside = ((place >= -1) & (place <= size))[..., None]
    return (near.clamp(min=0) * inside).view(len(start), side, samples, size).mean(2)
