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
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal, TypeVar

import torch
from torch import Tensor
from torchvision.ops import box_iou

from coin_ray.cloud.label_map import ASSUMED_PRECISION, Prior
from coin_ray.cloud.protocol import RawDetections
from coin_ray.fusion.box_clusters import greedy_clusters
from coin_ray.structures import Detections

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


def to_detections(
    raw: RawDetections,
    prior: Prior = NO_PRIOR,
    score_min: float = 0.0,
    *,
    each_class_asked: bool = False,
) -> tuple[Detections, list[ProbSource]]:
    """Return detections sorted best first, and the tier of each row's probabilities.

    scores [N] = the best class score; probs [N, K+1] with background last: background
    is the chance that no class is there, prod(1 - s_k), and the rest is shared in
    proportion to s_k. A label without other scores keeps s, and the rest is shared by
    ``prior``. ``score_min``: the lowest score the service was asked for.
    ``each_class_asked``: the service looks for each class separately, so that the other
    classes of a box with one label lie below ``score_min``.
    """
    class_scores = torch.from_numpy(raw.class_scores).double().clamp(0, 1)
    if raw.score_kind == "none":
        class_scores = class_scores * _label_precision(prior, class_scores.shape[1])
    best_scores, labels = class_scores.max(1)
    is_grouped = (class_scores > 0).sum(1) > 1
    if each_class_asked and raw.score_kind == "label":
        is_grouped = torch.ones_like(is_grouped)
    if raw.score_kind == "per_class":
        probs = _with_background(class_scores)
    else:
        shares = _rest_shares(prior, class_scores.shape[1])
        label_probs = _share_rest(best_scores, labels, shares)
        completed = _complete_scores(class_scores, best_scores, score_min)
        probs = torch.where(
            is_grouped[:, None], _with_background(completed), label_probs
        )
    boxes = torch.from_numpy(raw.boxes).float()
    detections = Detections(boxes, best_scores.float(), labels, probs.float())
    order = best_scores.argsort(descending=True, stable=True)
    sources = [
        _prob_source(raw, prior, int(labels[row]), bool(is_grouped[row]))
        for row in order.tolist()
    ]
    return detections[order], sources


def merge_cross_class_duplicates(
    raw: RawDetections, iou_threshold: float = SAME_OBJECT_IOU
) -> RawDetections:
    """Merge boxes of different labels that overlap at least ``iou_threshold`` into the
    best one of them, with the best score of each label.

    Services that score every class return a box once for each; answers with class
    vectors are returned unchanged.
    """
    if raw.score_kind == "per_class" or len(raw) < 2:
        return raw
    boxes = torch.from_numpy(raw.boxes)
    class_scores = torch.from_numpy(raw.class_scores)
    best_scores = class_scores.amax(1)
    labels = class_scores.argmax(1)
    overlapping = box_iou(boxes, boxes) >= iou_threshold
    clusters = list(
        greedy_clusters(
            overlapping,
            best_scores,
            can_merge=lambda rows: bool((labels[rows] != labels[rows[0]]).any()),
        )
    )
    best_rows = [cluster.best for cluster in clusters]
    merged = [class_scores[cluster.members].amax(0) for cluster in clusters]
    return replace(
        raw, boxes=raw.boxes[best_rows], class_scores=torch.stack(merged).numpy()
    )


def calibrated_confusion(
    measured: Iterable[Detections], classes: int, uniform: float = 1.0
) -> tuple[tuple[float, ...] | None, ...]:
    """Measure ``Prior.confusion`` on images where each class was scored (``native`` or
    ``grouped``): for each label, where the other probability mass went.

    ``uniform``: weight of an even share, in boxes, so that few boxes have little
    influence. A label without any box is None.
    """
    mass = torch.zeros(classes, classes + 1, dtype=torch.float64)
    box_counts = torch.zeros(classes)
    for detections in measured:
        mass.index_add_(0, detections.labels, detections.probs.double())
        box_counts += torch.bincount(detections.labels, minlength=classes)
    diagonal = torch.eye(classes, classes + 1, dtype=torch.bool)
    even = uniform * _rest_shares(NO_PRIOR, classes)
    mass = (mass + even).masked_fill(diagonal, 0)
    rows = (mass / mass.sum(1, keepdim=True)).tolist()
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


def _label_precision(prior: Prior, classes: int) -> Tensor:
    """Return how often each label is right [K], measured or assumed."""
    measured = [_of_class(prior.precision, k) for k in range(classes)]
    precision = [ASSUMED_PRECISION if p is None else p for p in measured]
    return torch.tensor(precision, dtype=torch.float64)


def _rest_shares(prior: Prior, classes: int) -> Tensor:
    """Return how the probability that a label's score leaves is shared among the other
    classes and the background [K, K+1]; rows sum to 1, the label's own share is 0.
    """
    shares = torch.full(
        (classes, classes + 1), 1 / max(classes, 1), dtype=torch.float64
    )
    for k in range(classes):
        row = _of_class(prior.confusion, k)
        if row is not None:
            shares[k] = torch.tensor(row, dtype=torch.float64)
    diagonal = torch.eye(classes, classes + 1, dtype=torch.bool)
    shares = shares.masked_fill(diagonal, 0)
    total = shares.sum(1, keepdim=True)
    background = torch.zeros_like(shares).index_fill(1, torch.tensor([classes]), 1)
    return torch.where(total > 0, shares / total.clamp_min(1e-300), background)


def _of_class(by_class: Sequence[PerClass | None], label: int) -> PerClass | None:
    return by_class[label] if label < len(by_class) else None


def _share_rest(scores: Tensor, labels: Tensor, shares: Tensor) -> Tensor:
    """Return probabilities [N, K+1] for one score [N] of the label [N] each."""
    others = (1 - scores)[:, None] * shares[labels]
    limited = torch.minimum(others[:, :-1], OTHERS_MAX * scores[:, None])
    foreground = limited.scatter(1, labels[:, None], scores[:, None])
    return _append_background(foreground)


def _complete_scores(
    class_scores: Tensor, best_scores: Tensor, score_min: float
) -> Tensor:
    """Replace scores of 0 in [N, K] by the expected score of a class that was not
    reported, at most half of the best score [N].
    """
    below_threshold = torch.full_like(best_scores, BELOW_THRESHOLD * score_min)
    expected = torch.minimum(below_threshold, best_scores / 2)
    return torch.where(class_scores > 0, class_scores, expected[:, None])


def _with_background(class_scores: Tensor) -> Tensor:
    """Convert independent scores [N, K] to probabilities [N, K+1]."""
    background = (1 - class_scores).prod(1, keepdim=True)
    share = class_scores / class_scores.sum(1, keepdim=True).clamp_min(1e-12)
    return _append_background((1 - background) * share)


def _append_background(foreground: Tensor) -> Tensor:
    background = (1 - foreground.sum(1, keepdim=True)).clamp_min(0)
    return torch.cat([foreground, background], 1)
