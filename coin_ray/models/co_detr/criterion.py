"""Set prediction losses: one-to-one matching of queries to objects, and focal + L1 +
GIoU on the matches (DETR, Deformable DETR).
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

from coin_ray.models.co_detr.targets import is_covered
from coin_ray.parallel import all_sum

ALPHA, GAMMA = 0.25, 2.0
WEIGHTS = {"class": 2.0, "l1": 5.0, "giou": 2.0}
"""Weights of the matching cost and of the losses alike."""


@dataclass(frozen=True, slots=True, eq=False)
class QueryTargets:
    """Targets of queries: ``classes`` [B, Q] (C: no object), ``boxes`` [B, Q, 4]
    (cxcywh in 0..1), ``has_loss`` [B, Q] bool.

    ``weights`` [B, Q]: how much each query's losses count (None: 1).
    """

    classes: Tensor
    boxes: Tensor
    has_loss: Tensor
    weights: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ObjectWeights:
    """``weights`` [N] of one image's objects, and ``ignored`` [M, 4] (cxcywh in 0..1):
    regions in which no query is background.
    """

    weights: Tensor
    ignored: Tensor


def match_hungarian(
    logits: Tensor,
    boxes: Tensor,
    labels: Sequence[Tensor],
    truth: Sequence[Tensor],
    usable: Tensor | None = None,
    object_weights: Sequence[ObjectWeights] = (),
) -> QueryTargets:
    """Match queries to objects one to one with least cost, image by image.

    ``logits`` [B, Q, C] and ``boxes`` [B, Q, 4] against ``labels`` [N] and ``truth``
    [N, 4] of each image; only queries in ``usable`` [B, Q] take part and have a loss.
    ``object_weights``: one per image, or none at all.
    """
    no_object = logits.shape[2]
    classes = torch.full(logits.shape[:2], no_object, device=logits.device)
    target_boxes = torch.zeros_like(boxes)
    all_queries = torch.ones_like(classes, dtype=torch.bool)
    has_loss = all_queries if usable is None else usable.clone()
    weights = torch.ones_like(boxes[..., 0])
    for image, (image_labels, image_truth) in enumerate(
        zip(labels, truth, strict=True)
    ):
        candidates = has_loss[image].nonzero()[:, 0]
        costs = matching_cost(
            logits[image, candidates],
            boxes[image, candidates],
            image_labels,
            image_truth,
        )
        matches = linear_sum_assignment(costs.cpu().numpy())
        rows, objects = (torch.as_tensor(m, device=boxes.device) for m in matches)
        queries = candidates[rows]
        classes[image, queries] = image_labels[objects]
        target_boxes[image, queries] = image_truth[objects]
        if object_weights:
            weights[image, queries] = object_weights[image].weights[objects]
            ignored = _corners(object_weights[image].ignored)
            is_ignored = is_covered(_corners(boxes[image]), ignored)
            is_background = classes[image] == no_object
            has_loss[image] &= ~(is_background & is_ignored)
    return QueryTargets(classes, target_boxes, has_loss, weights)


def _corners(boxes: Tensor) -> Tensor:
    corners: Tensor = box_convert(boxes.float(), "cxcywh", "xyxy")
    return corners


@torch.no_grad()
def matching_cost(
    logits: Tensor, boxes: Tensor, labels: Tensor, truth: Tensor
) -> Tensor:
    """Return costs [Q, N]: 2 focal + 5 L1 - 2 GIoU of queries (``logits`` [Q, C],
    ``boxes`` [Q, 4]) against objects (``labels`` [N], ``truth`` [N, 4]).
    """
    scores = logits.float().sigmoid()
    positive_cost = -ALPHA * (1 - scores) ** GAMMA * F.logsigmoid(logits.float())
    negative_cost = -(1 - ALPHA) * scores**GAMMA * F.logsigmoid(-logits.float())
    giou = generalized_box_iou(_corners(boxes), _corners(truth))
    l1 = torch.cdist(boxes.float(), truth.float(), p=1)
    cost = (
        WEIGHTS["class"] * (positive_cost - negative_cost)[:, labels]
        + WEIGHTS["l1"] * l1
        - WEIGHTS["giou"] * giou
    )
    return torch.nan_to_num(cost, nan=1e6, posinf=1e6, neginf=-1e6)


def set_losses(
    logits: Tensor, boxes: Tensor, targets: QueryTargets
) -> dict[str, Tensor]:
    """Return ``class``, ``l1``, ``giou``, weighted: sums over queries ([B, Q, C],
    [B, Q, 4]) divided by the number of objects assigned, at least 1.

    The number does not depend on the objects' weights, so that a batch of objects with
    low weights has lower losses.
    """
    classes = logits.shape[2]
    is_object = targets.has_loss & (targets.classes < classes)
    count = count_over_workers(is_object.sum())
    one_hot = F.one_hot(targets.classes, classes + 1)[..., :classes].to(logits)
    if targets.weights is None:
        weights = targets.has_loss.to(logits)
    else:
        weights = targets.has_loss * targets.weights
    focal = sigmoid_focal_loss(logits, one_hot, ALPHA, GAMMA) * weights[..., None]
    predicted, truth = boxes[is_object], targets.boxes[is_object]
    object_weights = weights[is_object]
    giou = generalized_box_iou_loss(_corners(predicted), _corners(truth))
    l1 = (predicted - truth).abs() * object_weights[:, None]
    sums = {
        "class": focal.sum(),
        "l1": l1.sum(),
        "giou": (giou * object_weights).sum(),
    }
    return {name: WEIGHTS[name] * loss / count for name, loss in sums.items()}


def count_over_workers(count: Tensor) -> Tensor:
    """Sum a count over all workers, at least 1, so that it can be a divisor."""
    return all_sum(count.float()).clamp(min=1)
