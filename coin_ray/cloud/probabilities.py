"""Conversion of a service's class scores to the class distributions that the method
works with, and how much of each distribution had to be assumed.

Tiers by what the service returns for a box, best first. All give rows that sum to 1
with background last, keep the label the best class, rise with the score, and are
[s, 1 - s] for one class.

    native           a score for each class
    grouped          several labels on one box, or each class asked for separately; the
                     missing scores lie below the threshold of the request
    label_confusion  a label and a score; the rest is shared as measured on images where
                     each class was scored
    label_prior      a label and a score; the rest is shared equally
    self_reported    the same, but the score is a number that a language model wrote
    precision        a label only; the score is the measured precision of that label
    assumed          a label only, and nothing measured; the score is
                     ``ASSUMED_PRECISION``

Imports no torch: an actor that only asks clouds does without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from coin_ray.cloud.label_map import ASSUMED_PRECISION, Prior
from coin_ray.cloud.protocol import RawDetections
from coin_ray.fusion.box_clusters import greedy_clusters, pairwise_ious

ProbSource = Literal[
    "native",
    "grouped",
    "label_confusion",
    "label_prior",
    "self_reported",
    "precision",
    "assumed",
]
SAME_OBJECT_IOU = 0.8
"""Least IoU at which boxes of different labels count as one object."""
BELOW_THRESHOLD = 0.25
"""Expected score of a class that was not reported, as a share of the lowest score asked
for."""
OTHERS_MAX = 0.95
"""No other class gets more than this share of the label's probability; the excess goes
to the background."""
NO_PRIOR = Prior()
PerClass = TypeVar("PerClass")
Matrix = NDArray[np.float64]
"""Scores, shares or probabilities, in double precision until all is computed."""


@dataclass(frozen=True, slots=True, eq=False)
class CloudDetections:
    """A cloud's detections in one image, best first.

    boxes [N, 4] float32 xyxy pixels, scores [N] float32 in 0..1, labels [N] int64,
    probs [N, K+1] float32 whose rows sum to 1, background last; ``prob_sources``: for
    each row, how its probabilities came about.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    probs: NDArray[np.float32]
    prob_sources: tuple[ProbSource, ...]

    def __len__(self) -> int:
        return len(self.boxes)

    @classmethod
    def empty(cls, num_classes: int) -> CloudDetections:
        """Return no detections, of K = ``num_classes`` classes."""
        no_rows = np.zeros((0, 4), np.float32)
        no_probs = np.zeros((0, num_classes + 1), np.float32)
        return cls(no_rows, no_rows[:, 0], np.zeros(0, np.int64), no_probs, ())


def to_detections(
    raw: RawDetections,
    prior: Prior = NO_PRIOR,
    score_min: float = 0.0,
    *,
    each_class_asked: bool = False,
) -> CloudDetections:
    """Return detections sorted best first, with the tier of each row's probabilities.

    scores [N] = the best class score; probs [N, K+1] with background last: background
    is the chance that no class is there, prod(1 - s_k), and the rest is shared in
    proportion to s_k. A label without other scores keeps s, and the rest is shared by
    ``prior``. ``score_min``: the lowest score the service was asked for.
    ``each_class_asked``: the service looks for each class separately, so that the other
    classes of a box with one label lie below ``score_min``.
    """
    classes = raw.class_scores.shape[1]
    if not len(raw):
        return CloudDetections.empty(classes)
    class_scores = raw.class_scores.astype(np.float64).clip(0, 1)
    if raw.score_kind == "none":
        class_scores = class_scores * _label_precision(prior, classes)
    labels = class_scores.argmax(1)
    best_scores = class_scores[np.arange(len(labels)), labels]
    is_grouped = np.count_nonzero(class_scores > 0, 1) > 1
    if each_class_asked and raw.score_kind == "label":
        is_grouped[:] = True
    if raw.score_kind == "per_class":
        probs = _with_background(class_scores)
    else:
        probs = _share_rest(best_scores, labels, _rest_shares(prior, classes))
        if is_grouped.any():
            completed = _complete_scores(class_scores, best_scores, score_min)
            grouped_probs = _with_background(completed)
            probs = np.where(is_grouped[:, None], grouped_probs, probs)
    order = np.argsort(-best_scores, kind="stable")
    return CloudDetections(
        raw.boxes[order].astype(np.float32, copy=False),
        best_scores[order].astype(np.float32),
        labels[order],
        probs[order].astype(np.float32),
        tuple(
            _prob_source(raw, prior, int(labels[row]), bool(is_grouped[row]))
            for row in order
        ),
    )


def merge_cross_class_duplicates(
    raw: RawDetections, iou_threshold: float = SAME_OBJECT_IOU
) -> RawDetections:
    """Merge boxes of different labels that overlap at least ``iou_threshold`` into the
    best one of them, with the best score of each label. Boxes are sorted best first.

    Services that score every class return a box once for each; answers with class
    vectors are returned unchanged.
    """
    if raw.score_kind == "per_class" or len(raw) < 2:
        return raw
    class_scores = raw.class_scores
    best_scores = class_scores.max(1)
    labels = class_scores.argmax(1)
    overlapping = pairwise_ious(raw.boxes) >= iou_threshold
    if not (overlapping & (labels[:, None] != labels)).any():
        order = np.argsort(-best_scores, kind="stable")
        return replace(raw, boxes=raw.boxes[order], class_scores=class_scores[order])
    clusters = list(
        greedy_clusters(
            overlapping,
            best_scores,
            can_merge=lambda rows: bool((labels[rows] != labels[rows[0]]).any()),
        )
    )
    best_rows = [cluster.best for cluster in clusters]
    merged = [class_scores[cluster.members].max(0) for cluster in clusters]
    return replace(raw, boxes=raw.boxes[best_rows], class_scores=np.stack(merged))


def calibrated_confusion(
    measured: Iterable[CloudDetections], classes: int, uniform: float = 1.0
) -> tuple[tuple[float, ...] | None, ...]:
    """Measure ``Prior.confusion`` on images where each class was scored (``native`` or
    ``grouped``): for each label, where the other probability mass went.

    ``uniform``: weight of an even share, in boxes, so that few boxes have little
    influence. A label without any box is None.
    """
    mass = np.zeros((classes, classes + 1))
    box_counts = np.zeros(classes, np.int64)
    for detections in measured:
        np.add.at(mass, detections.labels, detections.probs.astype(np.float64))
        box_counts += np.bincount(detections.labels, minlength=classes)
    mass += uniform * _rest_shares(NO_PRIOR, classes)
    np.fill_diagonal(mass, 0)
    rows = (mass / mass.sum(1, keepdims=True)).tolist()
    return tuple(
        tuple(row) if count else None
        for row, count in zip(rows, box_counts.tolist(), strict=True)
    )


def _prob_source(
    raw: RawDetections, prior: Prior, label: int, is_grouped: bool
) -> ProbSource:
    if raw.score_kind == "per_class":
        return "native"
    if raw.score_kind == "none":
        has_precision = _of_class(prior.precision, label) is not None
        return "precision" if has_precision else "assumed"
    if raw.score_kind == "self_reported":
        return "self_reported"
    if is_grouped:
        return "grouped"
    has_confusion = _of_class(prior.confusion, label) is not None
    return "label_confusion" if has_confusion else "label_prior"


def _label_precision(prior: Prior, classes: int) -> Matrix:
    """Return how often each label is right [K], measured or assumed."""
    measured = [_of_class(prior.precision, k) for k in range(classes)]
    return np.array([ASSUMED_PRECISION if p is None else p for p in measured])


@lru_cache(maxsize=16)
def _rest_shares(prior: Prior, classes: int) -> Matrix:
    """Return how the probability that a label's score leaves is shared among the other
    classes and the background [K, K+1]; rows sum to 1, the label's own share is 0.
    """
    shares = np.full((classes, classes + 1), 1 / max(classes, 1))
    for k in range(classes):
        row = _of_class(prior.confusion, k)
        if row is not None:
            shares[k] = row
    np.fill_diagonal(shares, 0)
    total = shares.sum(1, keepdims=True)
    background = np.zeros_like(shares)
    background[:, classes] = 1
    return np.where(total > 0, shares / np.maximum(total, 1e-300), background)


def _of_class(by_class: Sequence[PerClass | None], label: int) -> PerClass | None:
    return by_class[label] if label < len(by_class) else None


def _share_rest(scores: Matrix, labels: NDArray[np.int64], shares: Matrix) -> Matrix:
    """Return probabilities [N, K+1] for one score [N] of the label [N] each."""
    others = (1 - scores)[:, None] * shares[labels]
    foreground = np.minimum(others[:, :-1], OTHERS_MAX * scores[:, None])
    foreground[np.arange(len(labels)), labels] = scores
    return _append_background(foreground)


def _complete_scores(
    class_scores: Matrix, best_scores: Matrix, score_min: float
) -> Matrix:
    """Replace scores of 0 in [N, K] by the expected score of a class that was not
    reported, at most half of the best score [N].
    """
    expected = np.minimum(BELOW_THRESHOLD * score_min, best_scores / 2)
    return np.where(class_scores > 0, class_scores, expected[:, None])


def _with_background(class_scores: Matrix) -> Matrix:
    """Convert independent scores [N, K] to probabilities [N, K+1]."""
    background = (1 - class_scores).prod(1, keepdims=True)
    share = class_scores / np.maximum(class_scores.sum(1, keepdims=True), 1e-12)
    return _append_background((1 - background) * share)


def _append_background(foreground: Matrix) -> Matrix:
    background = np.maximum(1 - foreground.sum(1, keepdims=True), 0)
    return np.concatenate([foreground, background], 1)
