"""Detection losses against boxes with one label each: consistent knowledge, CLIP
labels, or truth. ``count``: see ``mean``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss

from coin_ray import boxes as box_ops
from coin_ray.losses.mean import mean


def anchor_objectness(
    logits: Tensor, is_object: Tensor, count: float | None = None
) -> Tensor:
    """Return the binary cross-entropy of sampled anchors [A] against 0/1 [A]."""
    targets = is_object.to(logits)
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return mean(losses, count)


def anchor_boxes(
    deltas: Tensor,
    anchors: Tensor,
    boxes: Tensor,
    sampled: float,
    weights: Sequence[float] = box_ops.DELTA_WEIGHTS,
) -> Tensor:
    """Return the L1 distance of predicted deltas [P, 4] of positive anchors to their
    boxes, divided by the number of all ``sampled`` anchors.

    ``weights``: scale of the deltas along x, y, width, height.
    """
    scale = deltas.new_tensor(weights) / deltas.new_tensor(box_ops.DELTA_WEIGHTS)
    targets = box_ops.encode_boxes(boxes, anchors) * scale
    return mean((deltas - targets).abs(), sampled)


def region_class(
    logits: Tensor, labels: Tensor, background_weight: float, count: float | None = None
) -> Tensor:
    """Return the cross-entropy of RoIs [R, K+1] against labels [R]; background rows
    (label K) count ``background_weight``, the sum is divided by R.

    In the published code the weight scales the term, not the denominator.
    """
    losses = F.cross_entropy(logits.float(), labels, reduction="none")
    weights = torch.where(labels == logits.shape[1] - 1, background_weight, 1.0)
    return mean(losses * weights, count)


def region_soft_class(
    logits: Tensor, targets: Tensor, count: float | None = None
) -> Tensor:
    """Return the cross-entropy of RoIs [R, K+1] against probability vectors [R, K+1]."""
    log_probabilities = logits.float().log_softmax(-1)
    return mean(-(targets * log_probabilities).sum(-1), count)


def region_boxes(
    deltas: Tensor, proposals: Tensor, boxes: Tensor, sampled: float, kind: str
) -> Tensor:
    """Return the distance of regressed proposals [P, 4] to their boxes, divided by the
    number of all ``sampled`` RoIs: L1 of deltas, or 1 - GIoU.
    """
    deltas = deltas.float()
    if kind == "l1":
        targets = box_ops.encode_boxes(boxes, proposals)
        return mean((deltas - targets).abs(), sampled)
    regressed = box_ops.decode_boxes(deltas, proposals)
    return mean(generalized_box_iou_loss(regressed, boxes), sampled)
