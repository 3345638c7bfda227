"""Set prediction losses: who of the queries stands for which object, and focal + L1 +
GIoU on it (DETR, Deformable DETR).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import (
    box_convert,
    generalized_box_iou,
    generalized_box_iou_loss,
    sigmoid_focal_loss,
)

from coin_ray.models.co_detr.targets import covered
from coin_ray.parallel import all_sum

ALPHA, GAMMA = 0.25, 2.0
WEIGHTS = {"class": 2.0, "l1": 5.0, "giou": 2.0}
"""Of the matching cost and of the losses alike."""


@dataclass(frozen=True, slots=True, eq=False)
class Assigned:
    """What queries should say: ``classes`` [B, Q] (C: no object), ``boxes`` [B, Q, 4]
    (cxcywh in 0..1), ``counts`` [B, Q] bool: False has no loss.

    ``weights`` [B, Q]: how much each query's losses count (None: 1).
    """

    classes: Tensor
    boxes: Tensor
    counts: Tensor
    weights: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Doubt:
    """Of one image: ``weights`` [N] of its objects, and ``ignored`` [M, 4] (cxcywh in
    0..1), where no query is background.
    """

    weights: Tensor
    ignored: Tensor


def hungarian(
    logits: Tensor,
    boxes: Tensor,
    labels: Sequence[Tensor],
    truth: Sequence[Tensor],
    usable: Tensor | None = None,
    doubts: Sequence[Doubt] = (),
) -> Assigned:
    """One-to-one assignment of least cost, image by image.

    ``logits`` [B, Q, C] and ``boxes`` [B, Q, 4] against ``labels`` [N] and ``truth``
    [N, 4] of each image; only queries in ``usable`` [B, Q] take part and have a loss.
    ``doubts``: one per image, or none at all.
    """
    classes = torch.full(logits.shape[:2], logits.shape[2], device=logits.device)
    targets = torch.zeros_like(boxes)
    counts = (
        torch.ones_like(classes, dtype=torch.bool) if usable is None else usable.clone()
    )
    weights = torch.ones_like(boxes[..., 0])
    for image, (own_labels, own_truth) in enumerate(zip(labels, truth, strict=True)):
        rows = counts[image].nonzero()[:, 0]
        costs = matching_cost(
            logits[image, rows], boxes[image, rows], own_labels, own_truth
        )
        query, found = (
            torch.as_tensor(i, device=rows.device)
            for i in linear_sum_assignment(costs.cpu().numpy())
        )
        classes[image, rows[query]] = own_labels[found]
        targets[image, rows[query]] = own_truth[found]
        if doubts:
            weights[image, rows[query]] = doubts[image].weights[found]
            background = classes[image] == logits.shape[2]
            counts[image] &= ~(
                background
                & covered(_corners(boxes[image]), _corners(doubts[image].ignored))
            )
    return Assigned(classes, targets, counts, weights)


def _corners(boxes: Tensor) -> Tensor:
    found: Tensor = box_convert(boxes.float(), "cxcywh", "xyxy")
    return found


@torch.no_grad()
def matching_cost(
    logits: Tensor, boxes: Tensor, labels: Tensor, truth: Tensor
) -> Tensor:
    """[Q, N]: 2 focal + 5 L1 - 2 GIoU of queries (``logits`` [Q, C], ``boxes`` [Q, 4])
    against objects (``labels`` [N], ``truth`` [N, 4]).
    """
    scores = logits.float().sigmoid()
    taken = -ALPHA * (1 - scores) ** GAMMA * F.logsigmoid(logits.float())
    left = -(1 - ALPHA) * scores**GAMMA * F.logsigmoid(-logits.float())
    giou = generalized_box_iou(_corners(boxes), _corners(truth))
    l1 = torch.cdist(boxes.float(), truth.float(), p=1)
    cost = (
        WEIGHTS["class"] * (taken - left)[:, labels]
        + WEIGHTS["l1"] * l1
        - WEIGHTS["giou"] * giou
    )
    return torch.nan_to_num(cost, nan=1e6, posinf=1e6, neginf=-1e6)


def set_losses(logits: Tensor, boxes: Tensor, assigned: Assigned) -> dict[str, Tensor]:
    """``class``, ``l1``, ``giou``, weighted: sums over queries ([B, Q, C], [B, Q, 4])
    divided by the number of objects assigned, at least 1.

    The number is a plain count, so that a batch of doubtful objects teaches less than
    one of sure ones.
    """
    classes = logits.shape[2]
    objects = assigned.counts & (assigned.classes < classes)
    count = at_least_one(objects.sum())
    wanted = F.one_hot(assigned.classes, classes + 1)[..., :classes].to(logits)
    weights = (
        assigned.counts.to(logits)
        if assigned.weights is None
        else assigned.counts * assigned.weights
    )
    focal = sigmoid_focal_loss(logits, wanted, ALPHA, GAMMA) * weights[..., None]
    found, truth, share = boxes[objects], assigned.boxes[objects], weights[objects]
    giou = generalized_box_iou_loss(_corners(found), _corners(truth)) * share
    sums = {
        "class": focal.sum(),
        "l1": ((found - truth).abs() * share[:, None]).sum(),
        "giou": giou.sum(),
    }
    return {name: WEIGHTS[name] * value / count for name, value in sums.items()}


def at_least_one(count: Tensor) -> Tensor:
    """A count over all workers, to divide by."""
    return all_sum(count.float()).clamp(min=1)
