"""Set prediction losses: who of the queries stands for which object, and focal + L1 + GIoU on it (DETR, Deformable DETR)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_convert, generalized_box_iou, generalized_box_iou_loss, sigmoid_focal_loss

from coin_ray.parallel import all_sum

ALPHA, GAMMA = 0.25, 2.0
WEIGHTS = {"class": 2.0, "l1": 5.0, "giou": 2.0}
"""Of the matching cost and of the losses alike."""


@dataclass(frozen=True, slots=True, eq=False)
class Assigned:
    """What queries should say: ``classes`` [B, Q] (C: no object), ``boxes`` [B, Q, 4] (cxcywh in 0..1), ``counts`` [B, Q] bool: False has no loss."""

    classes: Tensor
    boxes: Tensor
    counts: Tensor


def hungarian(logits: Tensor, boxes: Tensor, labels: Sequence[Tensor], truth: Sequence[Tensor], usable: Tensor | None = None) -> Assigned:
    """One-to-one assignment of least cost, image by image.

    ``logits`` [B, Q, C] and ``boxes`` [B, Q, 4] against ``labels`` [N] and ``truth`` [N, 4] of each image; only queries in
    ``usable`` [B, Q] take part and have a loss.
    """
    classes = torch.full(logits.shape[:2], logits.shape[2], device=logits.device)
    targets = torch.zeros_like(boxes)
    counts = torch.ones_like(classes, dtype=torch.bool) if usable is None else usable
    for image, (own_labels, own_truth) in enumerate(zip(labels, truth, strict=True)):
        rows = counts[image].nonzero()[:, 0]
        costs = matching_cost(logits[image, rows], boxes[image, rows], own_labels, own_truth)
        query, found = (torch.as_tensor(i, device=rows.device) for i in linear_sum_assignment(costs.cpu().numpy()))
        classes[image, rows[query]] = own_labels[found]
        targets[image, rows[query]] = own_truth[found]
    return Assigned(classes, targets, counts)


@torch.no_grad()
def matching_cost(logits: Tensor, boxes: Tensor, labels: Tensor, truth: Tensor) -> Tensor:
    """[Q, N]: 2 focal + 5 L1 - 2 GIoU of queries (``logits`` [Q, C], ``boxes`` [Q, 4]) against objects (``labels`` [N], ``truth`` [N, 4])."""
    scores = logits.float().sigmoid()
    taken = -ALPHA * (1 - scores) ** GAMMA * F.logsigmoid(logits.float())
    left = -(1 - ALPHA) * scores**GAMMA * F.logsigmoid(-logits.float())
    giou = generalized_box_iou(box_convert(boxes.float(), "cxcywh", "xyxy"), box_convert(truth.float(), "cxcywh", "xyxy"))
    l1 = torch.cdist(boxes.float(), truth.float(), p=1)
    cost = WEIGHTS["class"] * (taken - left)[:, labels] + WEIGHTS["l1"] * l1 - WEIGHTS["giou"] * giou
    return torch.nan_to_num(cost, nan=1e6, posinf=1e6, neginf=-1e6)


def set_losses(logits: Tensor, boxes: Tensor, assigned: Assigned) -> dict[str, Tensor]:
    """``class``, ``l1``, ``giou``, weighted: sums over queries ([B, Q, C], [B, Q, 4]) divided by the number of objects assigned, at least 1."""
    classes = logits.shape[2]
    objects = assigned.counts & (assigned.classes < classes)
    count = at_least_one(objects.sum())
    wanted = F.one_hot(assigned.classes, classes + 1)[..., :classes].to(logits)
    focal = sigmoid_focal_loss(logits, wanted, ALPHA, GAMMA) * assigned.counts[..., None]
    found, truth = boxes[objects], assigned.boxes[objects]
    giou = generalized_box_iou_loss(box_convert(found, "cxcywh", "xyxy"), box_convert(truth, "cxcywh", "xyxy"))
    sums = {"class": focal.sum(), "l1": (found - truth).abs().sum(), "giou": giou.sum()}
    return {name: WEIGHTS[name] * value / count for name, value in sums.items()}


def at_least_one(count: Tensor) -> Tensor:
    """A count over all workers, to divide by."""
    return all_sum(count.float()).clamp(min=1)
