"""Set prediction losses against class vectors that may be unsure: one-hot for what both
teachers agree on, probabilities for the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_convert, generalized_box_iou

ALPHA, GAMMA = 0.25, 2.0
WEIGHTS = {"class": 2.0, "l1": 5.0, "giou": 2.0}
"""Of the matching cost and of the losses alike (Deformable DETR)."""


def soft_focal(logits: Tensor, targets: Tensor) -> Tensor:
    """Focal loss [..., K] of ``logits`` against probabilities ``targets``, least where
    both are equal (arXiv 2006.04388, eq. 10, with alpha).

    For targets of 0 and 1 it is the sigmoid focal loss.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    share = ALPHA * targets + (1 - ALPHA) * (1 - targets)
    return share * (logits.sigmoid() - targets).abs() ** GAMMA * entropy


@torch.no_grad()
def matching_cost(
    logits: Tensor, boxes: Tensor, targets: Tensor, truth: Tensor
) -> Tensor:
    """[Q, N]: 2 focal + 5 L1 - 2 GIoU of queries (``logits`` [Q, K], ``boxes`` [Q, 4])
    against objects (``targets`` [N, K], ``truth`` [N, 4]).

    Boxes are cxcywh in 0..1. The focal part is the one expected under the object's
    class vector.
    """
    scores = logits.sigmoid()
    taken = -ALPHA * (1 - scores) ** GAMMA * F.logsigmoid(logits)
    left = -(1 - ALPHA) * scores**GAMMA * F.logsigmoid(-logits)
    giou = generalized_box_iou(
        box_convert(boxes, "cxcywh", "xyxy"), box_convert(truth, "cxcywh", "xyxy")
    )
    l1 = torch.cdist(boxes, truth, p=1)
    cost = (
        WEIGHTS["class"] * (taken - left) @ targets.T
        + WEIGHTS["l1"] * l1
        - WEIGHTS["giou"] * giou
    )
    return torch.nan_to_num(cost, nan=1e6, posinf=1e6, neginf=-1e6)
