"""Pure algebra on xyxy boxes. Everything torchvision has (IoU, NMS, clipping) is used
from there.
"""

from __future__ import annotations

import torch
from torch import Tensor

DELTA_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
"""Scale of box regression targets (Faster R-CNN)."""
LARGEST_LOG_SCALE = 4.135
"""log(1000 / 16): predicted boxes grow at most this much."""


def mirror_boxes(boxes: Tensor, width: float) -> Tensor:
    """Boxes [N, 4] in the image of ``width`` mirrored left to right: x' = width - x."""
    return torch.stack(
        [width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1
    )


def scale_boxes(boxes: Tensor, x: float, y: float) -> Tensor:
    """Boxes [N, 4] with the two axes multiplied by ``x`` and ``y``."""
    return boxes * boxes.new_tensor([x, y, x, y])


def weighted_mean_boxes(
    a: Tensor, b: Tensor, weight_a: Tensor, weight_b: Tensor
) -> Tensor:
    """Row-wise mean of boxes a, b [N, 4] with weights [N] (paper: the fused box of a
    matched pair).
    """
    total = (weight_a + weight_b).clamp(min=1e-6)
    return (a * weight_a[:, None] + b * weight_b[:, None]) / total[:, None]


def encode_boxes(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Regression targets [N, 4] that move ``anchors`` onto ``boxes`` (Faster R-CNN, eq.
    2).
    """
    anchor_size, box_size = (
        anchors[:, 2:] - anchors[:, :2],
        (boxes[:, 2:] - boxes[:, :2]).clamp(min=1e-3),
    )
    shift = (
        ((boxes[:, :2] + boxes[:, 2:]) - (anchors[:, :2] + anchors[:, 2:]))
        / 2
        / anchor_size
    )
    return torch.cat([shift, (box_size / anchor_size).log()], 1) * boxes.new_tensor(
        DELTA_WEIGHTS
    )


def decode_boxes(deltas: Tensor, anchors: Tensor) -> Tensor:
    """Inverse of ``encode_boxes``; growth is limited to exp(LARGEST_LOG_SCALE)."""
    deltas = deltas / deltas.new_tensor(DELTA_WEIGHTS)
    size = anchors[:, 2:] - anchors[:, :2]
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2 + deltas[:, :2] * size
    half = size * deltas[:, 2:].clamp(max=LARGEST_LOG_SCALE).exp() / 2
    return torch.cat([centre - half, centre + half], 1)
