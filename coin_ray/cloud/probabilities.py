"""From a service's scores to the class distributions that the method works with, and
how much each one was made up.

Tiers by what the service says of a box, best first. All give rows that sum to 1 with
background last, keep the label the best class, rise with the score, and for one class
are [s, 1 - s].

    native           a score for each class grouped          several labels on one box,
    or each class asked by itself; what is missing lies below the threshold asked for
    label_confusion  a label and a score; the rest is shared as measured on images where
    each class was scored label_prior      a label and a score; the rest is shared alike
    self_reported    the same, but the score is a number that a language model wrote
    precision        a label only; the score is the measured precision of that label
    assumed          a label only, and nothing measured; the score is
    ``ASSUMED_PRECISION`` published        the paper's own conversion: without
    background, and 1 where there is one class
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
from coin_ray.structures import Detections

ProbSource = Literal[
    "native",
    "grouped",
    "label_confusion",
    "label_prior",
    "self_reported",
    "precision",
    "assumed",
    "published",
]
JOINED_IOU = 0.8
BELOW_THRESHOLD = 0.25
"""Expected score of a class that was not reported, as a share of the lowest score asked
for."""
OTHERS_MAX = 0.95
"""No other class gets more than this share of the label's probability; what is over
goes to the background."""
NO_PRIOR = Prior()
T = TypeVar("T")


def to_detections(
    raw: RawDetections,
    kind: Literal["background", "published"],
    prior: Prior = NO_PRIOR,
    score_min: float = 0.0,
) -> Detections:
    """Detections sorted best first: scores = the best class score, probs [N, K+1] with
    background last.

    ``background``: background is the chance that no class is there, prod(1 - s_k); the
    rest is shared in proportion to s_k; a label alone keeps s, and the rest is shared
    by ``prior``. ``published``: s_k / sum(s), background 0; with one class every row is
    [1, 0] and only the score ranks. ``score_min``: the lowest score the service was
    asked for.
    """
    return converted(raw, kind, prior, score_min)[0]


def converted(
    raw: RawDetections,
    kind: Literal["background", "published"],
    prior: Prior = NO_PRIOR,
    score_min: float = 0.0,
    *,
    each_class_asked: bool = False,
) -> tuple[Detections, list[ProbSource]]:
    """``to_detections``, and the tier of each row.

    ``each_class_asked``: the service looks for each class by itself, so that also on a
    box with one label the others lie below ``score_min``.
    """
    class_scores = torch.from_numpy(raw.class_scores).double().clamp(0, 1)
    if raw.score_kind == "none":
        class_scores = class_scores * _precision(prior, class_scores.shape[1])
    best, labels = class_scores.max(1)
    several = (class_scores > 0).sum(1) > 1
    if each_class_asked and raw.score_kind == "label":
        several |= True
    if kind == "published":
        probs = _foreground_only(class_scores)
    elif raw.score_kind == "per_class":
        probs = _with_background(class_scores)
    else:
        alone = _with_prior(best, labels, _shares(prior, class_scores.shape[1]))
        probs = torch.where(
            several[:, None],
            _with_background(_censored(class_scores, best, score_min)),
            alone,
        )
    detections = Detections(
        torch.from_numpy(raw.boxes).float(), best.float(), labels, probs.float()
    )
    order = best.argsort(descending=True, stable=True)
    sources = [
        _source(raw, kind, prior, int(labels[i]), bool(several[i]))
        for i in order.tolist()
    ]
    return detections[order], sources


def joined(raw: RawDetections, iou: float = JOINED_IOU) -> RawDetections:
    """Boxes of different labels that overlap at least ``iou`` become the best one of
    them, with the best score of each label.

    Greedy from the best down. Services that score every class return a box once for
    each; answers with class vectors stay as they are.
    """
    if raw.score_kind == "per_class" or len(raw) < 2:
        return raw
    boxes, scores = torch.from_numpy(raw.boxes), torch.from_numpy(raw.class_scores)
    overlap = box_iou(boxes, boxes) >= iou
    free = torch.ones(len(boxes), dtype=torch.bool)
    kept, rows = [], []
    for i in scores.amax(1).argsort(descending=True, stable=True).tolist():
        if not free[i]:
            continue
        cluster = overlap[i] & free
        cluster[i] = True
        if len(set(scores[cluster].argmax(1).tolist())) == 1:
            cluster = torch.zeros_like(free).index_fill(0, torch.tensor([i]), True)
        free &= ~cluster
        kept.append(i)
        rows.append(scores[cluster].amax(0))
    return replace(raw, boxes=raw.boxes[kept], class_scores=torch.stack(rows).numpy())


def calibrated_confusion(
    measured: Iterable[Detections], classes: int, uniform: float = 1.0
) -> tuple[tuple[float, ...] | None, ...]:
    """``Prior.confusion`` from images where each class was scored (``native`` or
    ``grouped``): by label, where the other mass went.

    ``uniform``: weight of an even share, in boxes, so that few boxes don't decide; a
    label without any box is None.
    """
    mass, boxes = (
        torch.zeros(classes, classes + 1, dtype=torch.float64),
        torch.zeros(classes),
    )
    for detections in measured:
        mass.index_add_(0, detections.labels, detections.probs.double())
        boxes += torch.bincount(detections.labels, minlength=classes)
    own = torch.eye(classes, classes + 1, dtype=torch.bool)
    mass = (mass + uniform * _shares(NO_PRIOR, classes)).masked_fill(own, 0)
    rows = (mass / mass.sum(1, keepdim=True)).tolist()
    return tuple(
        tuple(row) if n else None for row, n in zip(rows, boxes.tolist(), strict=True)
    )


def fuse_duplicates(detections: Detections, iou: float) -> Detections:
    """Merge boxes of one class that overlap more than ``iou``: the best one's score and
    probs, the score-weighted mean box.

    Greedy from the best down, in two passes as published, since merged boxes move.
    Result sorted best first.
    """
    return fuse_rows(detections, iou)[0]


def fuse_rows(detections: Detections, iou: float) -> tuple[Detections, Tensor]:
    """``fuse_duplicates``, and for each result the row [M] of ``detections`` whose
    score and probs it has.
    """
    first, rows = _fuse_once(detections, iou)
    second, again = _fuse_once(first, iou)
    return second, rows[again]


def _source(
    raw: RawDetections, kind: str, prior: Prior, label: int, several: bool
) -> ProbSource:
    if kind == "published":
        return "published"
    if raw.score_kind == "per_class":
        return "native"
    if raw.score_kind == "none":
        return "assumed" if _of(prior.precision, label) is None else "precision"
    if raw.score_kind == "self_reported":
        return "self_reported"
    if several:
        return "grouped"
    return "label_prior" if _of(prior.confusion, label) is None else "label_confusion"


def _precision(prior: Prior, classes: int) -> Tensor:
    """[K]"""
    known = [_of(prior.precision, k) for k in range(classes)]
    return torch.tensor(
        [ASSUMED_PRECISION if p is None else p for p in known], dtype=torch.float64
    )


def _shares(prior: Prior, classes: int) -> Tensor:
    """[K, K+1]: how what the label's score leaves is shared among the other classes and
    the background; rows sum to 1, own share 0.
    """
    shares = torch.full(
        (classes, classes + 1), 1 / max(classes, 1), dtype=torch.float64
    )
    for k in range(classes):
        row = _of(prior.confusion, k)
        if row is not None:
            shares[k] = torch.tensor(row, dtype=torch.float64)
    shares = shares.masked_fill(torch.eye(classes, classes + 1, dtype=torch.bool), 0)
    total = shares.sum(1, keepdim=True)
    background = torch.zeros_like(shares).index_fill(1, torch.tensor([classes]), 1)
    return torch.where(total > 0, shares / total.clamp_min(1e-300), background)


def _of(values: Sequence[T | None], index: int) -> T | None:
    return values[index] if index < len(values) else None


def _with_prior(scores: Tensor, labels: Tensor, shares: Tensor) -> Tensor:
    """One score [N] for the label [N] -> [N, K+1]."""
    rest = (1 - scores)[:, None] * shares[labels]
    others = torch.minimum(rest[:, :-1], OTHERS_MAX * scores[:, None])
    foreground = others.scatter(1, labels[:, None], scores[:, None])
    return torch.cat(
        [foreground, (1 - foreground.sum(1, keepdim=True)).clamp_min(0)], 1
    )


def _censored(scores: Tensor, best: Tensor, score_min: float) -> Tensor:
    """Scores [N, K] with the expected score of a class that was not reported in place
    of 0; never near the best one.
    """
    expected = torch.minimum(
        torch.full_like(best, BELOW_THRESHOLD * score_min), best / 2
    )
    return torch.where(scores > 0, scores, expected[:, None])


def _with_background(scores: Tensor) -> Tensor:
    """Independent scores [N, K] -> [N, K+1]."""
    background = (1 - scores).prod(1, keepdim=True)
    share = scores / scores.sum(1, keepdim=True).clamp_min(1e-12)
    foreground = (1 - background) * share
    return torch.cat(
        [foreground, (1 - foreground.sum(1, keepdim=True)).clamp_min(0)], 1
    )


def _foreground_only(scores: Tensor) -> Tensor:
    """Independent scores [N, K] -> [N, K+1]; a box without any score is uniform."""
    total = scores.sum(1, keepdim=True)
    uniform = torch.full_like(scores, 1 / max(scores.shape[1], 1))
    foreground = torch.where(total > 0, scores / total.clamp_min(1e-300), uniform)
    return torch.cat([foreground, torch.zeros_like(total)], 1)


def _fuse_once(detections: Detections, iou: float) -> tuple[Detections, Tensor]:
    order = detections.scores.argsort(descending=True, stable=True)
    detections = detections[order]
    same = detections.labels[:, None] == detections.labels[None]
    joined = (box_iou(detections.boxes, detections.boxes) > iou) & same
    if not joined.triu(1).any():
        return detections, order
    free = torch.ones(len(detections), dtype=torch.bool)
    survivors, boxes = [], []
    for i in range(len(detections)):
        if not free[i]:
            continue
        cluster = joined[i] & free
        cluster[i] = True
        free &= ~cluster
        survivors.append(i)
        boxes.append(
            _weighted_mean(detections.boxes[cluster], detections.scores[cluster])
        )
    rows = torch.tensor(survivors, dtype=torch.int64)
    kept = detections[rows]
    return (kept.with_boxes(torch.stack(boxes)) if boxes else kept), order[rows]


def _weighted_mean(boxes: Tensor, weights: Tensor) -> Tensor:
    """Mean box [4] of boxes [M, 4], best first; the first one if all weights are 0."""
    total = weights.sum()
    return (boxes * weights[:, None]).sum(0) / total if total > 0 else boxes[0]
