"""Greedy clustering of overlapping boxes, and the merging of a cluster into one box.

Used for duplicates in a cloud's answer, for boxes that a cloud returned once per class
and for weighted box fusion of several ONNX detectors. The fusion of several clouds
(``coin_ray.cloud.ensemble``) follows another rule: its clusters grow around a moving
mean and hold at most one box of each cloud.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou

from coin_ray.structures import Detections


@dataclass(frozen=True, slots=True, eq=False)
class BoxCluster:
    """Boxes that overlap the best one of them.

    ``best``: row of the box with the highest score; ``members`` [M] int64: rows of all
    boxes, ascending, ``best`` included.
    """

    best: int
    members: Tensor


def greedy_clusters(
    overlapping: Tensor,
    scores: Tensor,
    can_merge: Callable[[Tensor], bool] = lambda _: True,
) -> Iterator[BoxCluster]:
    """Yield clusters that together hold each box once, from the highest score down.

    ``overlapping`` [N, N] bool, ``scores`` [N]. The best box that is in no cluster
    starts one, with all boxes that overlap it and are in no cluster. Where
    ``can_merge`` rejects these rows [M], the best box forms a cluster alone and the
    others stay available.
    """
    available = torch.ones(len(scores), dtype=torch.bool)
    for best in scores.argsort(descending=True, stable=True).tolist():
        if not available[best]:
            continue
        in_cluster = overlapping[best] & available
        in_cluster[best] = True
        members = in_cluster.nonzero()[:, 0]
        if not can_merge(members):
            members = torch.tensor([best])
        available[members] = False
        yield BoxCluster(best, members)


def score_weighted_mean(boxes: Tensor, scores: Tensor) -> Tensor:
    """Return the mean box [4] of ``boxes`` [M, 4] weighted by ``scores`` [M]; the first
    box if all scores are 0.
    """
    total = scores.sum()
    if total <= 0:
        return boxes[0]
    return (boxes * scores[:, None]).sum(0) / total


def merge_duplicates(
    detections: Detections, iou_threshold: float
) -> tuple[Detections, Tensor]:
    """Merge boxes of one class that overlap more than ``iou_threshold``.

    A merged detection has the score and probs of the best box and the score-weighted
    mean box. Two passes as published, since merged boxes move. Returns the detections
    sorted best first, and for each the row [M] of the input whose score and probs it
    has.
    """
    first_pass, first_rows = _merge_once(detections, iou_threshold)
    second_pass, second_rows = _merge_once(first_pass, iou_threshold)
    return second_pass, first_rows[second_rows]


def _merge_once(
    detections: Detections, iou_threshold: float
) -> tuple[Detections, Tensor]:
    order = detections.scores.argsort(descending=True, stable=True)
    detections = detections[order]
    same_class = detections.labels[:, None] == detections.labels[None]
    overlap = box_iou(detections.boxes, detections.boxes)
    duplicates = (overlap > iou_threshold) & same_class
    if not duplicates.triu(1).any():
        return detections, order
    clusters = list(greedy_clusters(duplicates, detections.scores))
    boxes = [
        score_weighted_mean(detections.boxes[c.members], detections.scores[c.members])
        for c in clusters
    ]
    best_rows = torch.tensor([c.best for c in clusters])
    merged = detections[best_rows].with_boxes(torch.stack(boxes))
    return merged, order[best_rows]
