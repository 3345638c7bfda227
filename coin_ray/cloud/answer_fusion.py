"""Weighted box fusion of several clouds' answers about one image. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coin_ray.cloud.label_map import ASSUMED_PRECISION, Prior
from coin_ray.cloud.protocol import NO_COUNTS, RawDetections, ScoreKind

WEIGHT_MIN = 1e-9
"""Weight of a box with score 0, so that a cluster of such boxes has a mean."""
SCORE_KINDS: tuple[ScoreKind, ...] = ("per_class", "label", "self_reported")
"""Best first; fused boxes are of the worst kind among them."""


def fuse_answers(
    answers: Sequence[RawDetections], reliability: Sequence[float], iou_threshold: float
) -> RawDetections:
    """Fuse the boxes of several clouds in one image; a single answer is returned as it
    is.

    From the box with the highest reliability x score down, whatever its class, each
    joins the fused box it overlaps most and at least ``iou_threshold``, or starts one;
    a fused box holds one box of each cloud. Its box is the mean weighted by
    reliability x score, its class scores are the mean over all answers weighted by
    reliability: a cloud that did not detect the object contributes zeros. Labels
    without score must be scored before (``score_labels``).
    """
    if len(answers) == 1:
        return answers[0]
    return fuse_with_members(answers, reliability, iou_threshold)[0]


def fuse_with_members(
    answers: Sequence[RawDetections], reliability: Sequence[float], iou_threshold: float
) -> tuple[RawDetections, NDArray[np.int64]]:
    """Fuse as ``fuse_answers``; return also, for each fused box and answer [M, A], the
    row of the answer's box in it, or -1.
    """
    order = sorted(
        range(len(answers)),
        key=lambda i: (reliability[i], *_content_key(answers[i])),
    )
    answers = [answers[i] for i in order]
    trust = np.sort(np.asarray(reliability, np.float64))
    boxes = np.concatenate([a.boxes for a in answers]).astype(np.float64)
    class_scores = np.concatenate([a.class_scores for a in answers]).astype(np.float64)
    clouds = np.repeat(np.arange(len(answers)), [len(a) for a in answers])
    weights = np.maximum(trust[clouds] * class_scores.max(1, initial=0), WEIGHT_MIN)
    fused_boxes, clusters = _cluster_boxes(boxes, weights, clouds, iou_threshold)
    shares = trust / trust.sum()
    fused_scores = np.array(
        [shares[clouds[rows]] @ class_scores[rows] for rows in clusters], np.float32
    ).reshape(len(clusters), class_scores.shape[1])
    best_first = np.argsort(-fused_scores.max(1, initial=0), kind="stable")
    row_in_answer = np.concatenate([np.arange(len(a)) for a in answers])
    members = np.full((len(clusters), len(answers)), -1, np.int64)
    for number, rows in enumerate(clusters):
        members[number, np.take(order, clouds[rows])] = row_in_answer[rows]
    fused = RawDetections(
        fused_boxes[best_first],
        fused_scores[best_first],
        _worst_score_kind(answers),
        tuple(name for a in answers for name in a.unmapped),
        sum((a.counts for a in answers), NO_COUNTS),
    )
    return fused, members[best_first]


def score_labels(raw: RawDetections, prior: Prior) -> RawDetections:
    """Give labels without score their measured precision as the score, or the assumed
    one.
    """
    if raw.score_kind != "none":
        return raw
    classes = raw.class_scores.shape[1]
    precision = np.full(classes, ASSUMED_PRECISION, np.float32)
    for label, measured in enumerate(prior.precision[:classes]):
        if measured is not None:
            precision[label] = measured
    return replace(
        raw, class_scores=raw.class_scores * precision, score_kind="self_reported"
    )


def _content_key(raw: RawDetections) -> tuple[Any, ...]:
    """Return a sort key, so that the result does not depend on the order in which the
    clouds are named, not even in ties.
    """
    return raw.boxes.tobytes(), raw.class_scores.tobytes(), raw.score_kind, raw.unmapped


def _worst_score_kind(answers: Sequence[RawDetections]) -> ScoreKind:
    kinds = {answer.score_kind for answer in answers}
    if "none" in kinds:
        return SCORE_KINDS[-1]
    return max(kinds, key=SCORE_KINDS.index)


def _cluster_boxes(
    boxes: NDArray[np.float64],
    weights: NDArray[np.float64],
    clouds: NDArray[np.int64],
    iou_threshold: float,
) -> tuple[NDArray[np.float32], list[list[int]]]:
    """Return fused boxes [M, 4], and the rows of ``boxes`` [N, 4] that each is the mean
    of.
    """
    clusters: list[list[int]] = []
    fused = np.zeros_like(boxes)
    has_cloud = np.zeros((len(boxes), int(clouds.max(initial=0)) + 1), bool)
    for row in np.argsort(-weights, kind="stable").tolist():
        count = len(clusters)
        overlaps = _ious(boxes[row], fused[:count])
        overlaps = overlaps * ~has_cloud[:count, clouds[row]]
        if overlaps.max(initial=0) >= iou_threshold:
            cluster = int(overlaps.argmax())
        else:
            cluster = count
            clusters.append([])
        rows = clusters[cluster]
        rows.append(row)
        has_cloud[cluster, clouds[row]] = True
        mean = np.average(boxes[rows], axis=0, weights=weights[rows])
        fused[cluster] = np.clip(mean, boxes[rows].min(0), boxes[rows].max(0))
    return fused[: len(clusters)].astype(np.float32), clusters


def _ious(box: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the IoU of one box with each of the others [M]."""
    top_left = np.maximum(box[:2], others[:, :2])
    bottom_right = np.minimum(box[2:], others[:, 2:])
    intersection = (bottom_right - top_left).clip(0).prod(1)
    box_area = (box[2:] - box[:2]).prod()
    other_areas = (others[:, 2:] - others[:, :2]).prod(1)
    union = box_area + other_areas - intersection
    ious: NDArray[np.float64] = np.divide(
        intersection, union, out=np.zeros_like(intersection), where=union > 0
    )
    return ious
