"""Transform, average and encode xyxy boxes. IoU, NMS and clipping are torchvision's."""

from __future__ import annotations

import torch
from torch import Tensor

DELTA_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
"""Scale of box regression targets (Faster R-CNN)."""
LARGEST_LOG_SCALE = 4.135
"""log(1000 / 16): predicted boxes grow at most this much."""


def mirror_boxes(boxes: Tensor, width: float) -> Tensor:
    """Mirror boxes [N, 4] left to right in an image of ``width``: x' = width - x."""
    x1, y1, x2, y2 = boxes.unbind(1)
    return torch.stack([width - x2, y1, width - x1, y2], 1)


def scale_boxes(boxes: Tensor, x: float, y: float) -> Tensor:
    """Multiply the two axes of boxes [N, 4] by ``x`` and ``y``."""
    return boxes * boxes.new_tensor([x, y, x, y])


def weighted_mean_boxes(
    a: Tensor, b: Tensor, weight_a: Tensor, weight_b: Tensor
) -> Tensor:
    """Average boxes a, b [N, 4] row by row with weights [N] (paper: the fused box of a
    matched pair).
    """
    total = (weight_a + weight_b).clamp(min=1e-6)
    return (a * weight_a[:, None] + b * weight_b[:, None]) / total[:, None]


def encode_boxes(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Return regression targets [N, 4] that move ``anchors`` onto ``boxes`` (Faster
    R-CNN, eq. 2).
    """
    anchor_size = anchors[:, 2:] - anchors[:, :2]
    box_size = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1e-3)
    box_corner_sum = boxes[:, :2] + boxes[:, 2:]
    anchor_corner_sum = anchors[:, :2] + anchors[:, 2:]
    shift = (box_corner_sum - anchor_corner_sum) / 2 / anchor_size
    log_scale = (box_size / anchor_size).log()
    return torch.cat([shift, log_scale], 1) * boxes.new_tensor(DELTA_WEIGHTS)


def decode_boxes(deltas: Tensor, anchors: Tensor) -> Tensor:
    """Invert ``encode_boxes``; growth is limited to exp(LARGEST_LOG_SCALE)."""
    deltas = deltas / deltas.new_tensor(DELTA_WEIGHTS)
    size = anchors[:, 2:] - anchors[:, :2]
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2 + deltas[:, :2] * size
    half_size = size * deltas[:, 2:].clamp(max=LARGEST_LOG_SCALE).exp() / 2
    return torch.cat([centre - half_size, centre + half_size], 1)
