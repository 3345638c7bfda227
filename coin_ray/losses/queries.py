"""Set prediction losses against class vectors: one-hot where both teachers agree,
probabilities elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_convert, generalized_box_iou

ALPHA, GAMMA = 0.25, 2.0
WEIGHTS = {"class": 2.0, "l1": 5.0, "giou": 2.0}
"""Weights of the matching cost, and of the losses (Deformable DETR)."""


def soft_focal(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the focal loss [..., K] of ``logits`` against probabilities ``targets``;
    its minimum is where both are equal (arXiv 2006.04388, eq. 10, with alpha).

    For targets of 0 and 1 it is the sigmoid focal loss.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    weight = ALPHA * targets + (1 - ALPHA) * (1 - targets)
    distance = (logits.sigmoid() - targets).abs()
    return weight * distance**GAMMA * entropy


@torch.no_grad()
def soft_matching_cost(
    logits: Tensor, boxes: Tensor, targets: Tensor, truth: Tensor
) -> Tensor:
    """Return the cost [Q, N] 2 focal + 5 L1 - 2 GIoU of queries (``logits`` [Q, K],
    ``boxes`` [Q, 4]) against objects (``targets`` [N, K], ``truth`` [N, 4]).

    Boxes are cxcywh in 0..1. The focal part is its expectation under the object's
    class vector.
    """
    scores = logits.sigmoid()
    positive_cost = -ALPHA * (1 - scores) ** GAMMA * F.logsigmoid(logits)
    negative_cost = -(1 - ALPHA) * scores**GAMMA * F.logsigmoid(-logits)
    boxes_xyxy = box_convert(boxes, "cxcywh", "xyxy")
    truth_xyxy = box_convert(truth, "cxcywh", "xyxy")
    giou = generalized_box_iou(boxes_xyxy, truth_xyxy)
    l1 = torch.cdist(boxes, truth, p=1)
    cost = (
        WEIGHTS["class"] * (positive_cost - negative_cost) @ targets.T
        + WEIGHTS["l1"] * l1
        - WEIGHTS["giou"] * giou
    )
    return torch.nan_to_num(cost, nan=1e6, posinf=1e6, neginf=-1e6)
