"""Greedy clustering of overlapping boxes, and the merging of a cluster into one box.

Used for duplicates in a cloud's answer, for boxes that a cloud returned once per class
and for weighted box fusion of several ONNX detectors. The fusion of several clouds
(``coin_ray.cloud.ensemble``) follows another rule: its clusters grow around a moving
mean and hold at most one box of each cloud. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class BoxCluster:
    """Boxes that overlap the best one of them.

    ``best``: row of the box with the highest score; ``members`` [M] int64: rows of all
    boxes, ascending, ``best`` included.
    """

    best: int
    members: Rows


def pairwise_ious(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the IoU [N, N] of each two boxes [N, 4] xyxy; NaN for two without area."""
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    top_left = np.maximum(boxes[:, None, :2], boxes[:, :2])
    bottom_right = np.minimum(boxes[:, None, 2:], boxes[:, 2:])
    sides = np.maximum(bottom_right - top_left, 0)
    intersections = sides[..., 0] * sides[..., 1]
    unions = areas[:, None] + areas - intersections
    with np.errstate(invalid="ignore", divide="ignore"):
        ious: NDArray[np.float32] = intersections / unions
    return ious


def greedy_clusters(
    overlapping: NDArray[np.bool_],
    scores: NDArray[np.float32],
    can_merge: Callable[[Rows], bool] = lambda _: True,
) -> Iterator[BoxCluster]:
    """Yield clusters that together hold each box once, from the highest score down.

    ``overlapping`` [N, N] bool, ``scores`` [N]. The best box that is in no cluster
    starts one, with all boxes that overlap it and are in no cluster. Where
    ``can_merge`` rejects these rows [M], the best box forms a cluster alone and the
    others stay available.
    """
    available = np.ones(len(scores), bool)
    for best in np.argsort(-scores, kind="stable").tolist():
        if not available[best]:
            continue
        in_cluster = overlapping[best] & available
        in_cluster[best] = True
        members = np.flatnonzero(in_cluster)
        if not can_merge(members):
            members = np.array([best])
        available[members] = False
        yield BoxCluster(best, members)


def score_weighted_mean(
    boxes: NDArray[np.float32], scores: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return the mean box [4] of ``boxes`` [M, 4] weighted by ``scores`` [M]; the first
    box if all scores are 0.
    """
    total = scores.sum()
    if total <= 0:
        first: NDArray[np.float32] = boxes[0]
        return first
    mean: NDArray[np.float32] = (boxes * scores[:, None]).sum(0) / total
    return mean


def merge_duplicates(
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    labels: NDArray[np.int64],
    iou_threshold: float,
) -> tuple[NDArray[np.float32], Rows]:
    """Merge boxes of one class that overlap more than ``iou_threshold``.

    A merged box is the score-weighted mean; its score is that of the best box. Two
    passes as published, since merged boxes move. Returns the boxes [M, 4] sorted best
    first, and for each the row [M] of the input whose score it has.
    """
    boxes, rows = _merge_once(boxes, scores, labels, iou_threshold)
    if len(rows) == len(scores):  # nothing was merged, so nothing has moved
        return boxes, rows
    boxes, merged_rows = _merge_once(boxes, scores[rows], labels[rows], iou_threshold)
    return boxes, rows[merged_rows]


def _merge_once(
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    labels: NDArray[np.int64],
    iou_threshold: float,
) -> tuple[NDArray[np.float32], Rows]:
    order = np.argsort(-scores, kind="stable")
    boxes = boxes[order]
    if len(order) < 2:
        return boxes, order
    scores, labels = scores[order], labels[order]
    duplicates = pairwise_ious(boxes) > iou_threshold
    duplicates &= labels[:, None] == labels
    if np.count_nonzero(duplicates) <= len(order):  # each overlaps itself alone
        return boxes, order
    clusters = list(greedy_clusters(duplicates, scores))
    means = [
        score_weighted_mean(boxes[cluster.members], scores[cluster.members])
        for cluster in clusters
    ]
    best_rows = np.array([cluster.best for cluster in clusters])
    return np.stack(means), order[best_rows]
