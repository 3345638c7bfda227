"""From a service's independent class scores to the class distributions that the method works with."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torchvision.ops import box_iou

from coin_ray.cloud.protocol import RawDetections
from coin_ray.structures import Detections


def to_detections(raw: RawDetections, kind: Literal["background", "published"]) -> Detections:
    """Detections sorted best first: scores = the best class score, probs [N, K+1] with background last.

    ``background``: background is the chance that no class is there, prod(1 - s_k); the rest is shared in proportion to
    s_k. ``published``: s_k / sum(s), background 0; with one class every row is [1, 0] and only the score ranks.
    """
    class_scores = torch.from_numpy(raw.class_scores).double().clamp(0, 1)
    best, labels = class_scores.max(1)
    probs = _with_background(class_scores) if kind == "background" else _foreground_only(class_scores)
    detections = Detections(torch.from_numpy(raw.boxes).float(), best.float(), labels, probs.float())
    return detections[best.argsort(descending=True, stable=True)]


def fuse_duplicates(detections: Detections, iou: float) -> Detections:
    """Merge boxes of one class that overlap more than ``iou``: the best one's score and probs, the score-weighted mean box.

    Greedy from the best down, in two passes as published, since merged boxes move. Result sorted best first.
    """
    return _fuse_once(_fuse_once(detections, iou), iou)


def _with_background(scores: Tensor) -> Tensor:
    """Independent scores [N, K] -> [N, K+1]."""
    background = (1 - scores).prod(1, keepdim=True)
    share = scores / scores.sum(1, keepdim=True).clamp_min(1e-12)
    foreground = (1 - background) * share
    return torch.cat([foreground, 1 - foreground.sum(1, keepdim=True)], 1)


def _foreground_only(scores: Tensor) -> Tensor:
    """Independent scores [N, K] -> [N, K+1]; a box without any score is uniform."""
    total = scores.sum(1, keepdim=True)
    uniform = torch.full_like(scores, 1 / max(scores.shape[1], 1))
    foreground = torch.where(total > 0, scores / total.clamp_min(1e-300), uniform)
    return torch.cat([foreground, torch.zeros_like(total)], 1)


def _fuse_once(detections: Detections, iou: float) -> Detections:
    detections = detections[detections.scores.argsort(descending=True, stable=True)]
    same = detections.labels[:, None] == detections.labels[None]
    joined = (box_iou(detections.boxes, detections.boxes) > iou) & same
    free = torch.ones(len(detections), dtype=torch.bool)
    survivors, boxes = [], []
    for i in range(len(detections)):
        if not free[i]:
            continue
        cluster = joined[i] & free
        cluster[i] = True
        free &= ~cluster
        survivors.append(i)
        boxes.append(_weighted_mean(detections.boxes[cluster], detections.scores[cluster]))
    kept = detections[torch.tensor(survivors, dtype=torch.int64)]
    return kept.with_boxes(torch.stack(boxes)) if boxes else kept


def _weighted_mean(boxes: Tensor, weights: Tensor) -> Tensor:
    """Mean box [4] of boxes [M, 4], best first; the first one if all weights are 0."""
    total = weights.sum()
    return (boxes * weights[:, None]).sum(0) / total if total > 0 else boxes[0]
