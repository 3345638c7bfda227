"""Weighted box fusion of two labellers for many images at once: what
``answer_fusion.fuse_with_members`` does with two answers of equal reliability.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coin_ray.cloud.answer_fusion import WEIGHT_MIN
from coin_ray.data.formats.ragged import (
    Integers,
    image_of_boxes,
    rows_of_images,
    starts_of,
)

Floats = NDArray[np.float32]
SHARE = 0.5
"""Weight of each of the two in scores."""
PAIRS_AT_ONCE = 1 << 20
"""Pairs of boxes that are compared together."""


@dataclass(frozen=True, slots=True, eq=False)
class LabelledBoxes:
    """Boxes of images: those of image i are the rows ``starts[i]`` up to ``starts[i +
    1]`` of ``boxes`` [M, 4] xyxy, ``scores`` [M] and ``labels`` [M].
    """

    starts: Integers
    boxes: Floats
    scores: Floats
    labels: Integers


@dataclass(frozen=True, slots=True, eq=False)
class FusedBoxes:
    """Fused boxes of the same images, best first in each; ``members`` [M, 2]: the row
    of the box of the first and of the second labeller in each, or -1.
    """

    starts: Integers
    boxes: Floats
    scores: Floats
    labels: Integers
    members: Integers


def fuse_boxes(
    first: LabelledBoxes, second: LabelledBoxes, iou_threshold: float
) -> FusedBoxes:
    """Fuse the boxes of two labellers, whose images are the same.

    A fused box holds at most one box of each, so that the boxes are pairs and lone
    ones: from the surest box down, each joins the box of the other labeller that it
    overlaps most, at least by ``iou_threshold``, and that has no partner.
    """
    count = len(first.scores)
    image = np.concatenate(
        [image_of_boxes(first.starts), image_of_boxes(second.starts)]
    )
    boxes = np.concatenate([first.boxes, second.boxes]).astype(np.float64)
    scores = np.concatenate([first.scores, second.scores]).astype(np.float64)
    labels = np.concatenate([first.labels, second.labels])
    weights = np.maximum(scores, WEIGHT_MIN)
    ranks = _ranks(first, second, image, weights)
    partners = _match_boxes(first, second, boxes, ranks, iou_threshold)
    # the surer box of a pair stands for it
    is_founder = (partners < 0) | (ranks < ranks[partners])
    founders = np.flatnonzero(is_founder)
    others = partners[founders]
    has_other = others >= 0
    fused_boxes = _mean_boxes(boxes, weights, founders, others)
    fused_scores, fused_labels = _fuse_scores(scores, labels, founders, others)
    members = np.full((len(founders), 2), -1, np.int64)
    is_second = (founders >= count).astype(int)
    numbers = np.arange(len(founders))
    members[numbers, is_second] = founders - count * is_second
    members[numbers[has_other], 1 - is_second[has_other]] = others[
        has_other
    ] - count * (1 - is_second[has_other])
    order = np.lexsort((ranks[founders], -fused_scores, image[founders]))
    image_counts = np.bincount(image[founders], minlength=len(first.starts) - 1)
    return FusedBoxes(
        starts_of(image_counts),
        fused_boxes[order],
        fused_scores[order],
        fused_labels[order],
        members[order],
    )


def _ranks(
    first: LabelledBoxes,
    second: LabelledBoxes,
    image: Integers,
    weights: NDArray[np.float64],
) -> Integers:
    """Return the place of each box in the order of images and falling weights."""
    count = len(first.scores)
    is_second = np.arange(len(image)) >= count
    # ties do not depend on which labeller is named first
    is_swapped = _second_goes_first(first, second)[image]
    order = np.lexsort((is_second != is_swapped, -weights, image))
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order))
    return ranks


def _second_goes_first(
    first: LabelledBoxes, second: LabelledBoxes
) -> NDArray[np.bool_]:
    """Return for each image whether the second's boxes come first by their content."""
    first_starts, second_starts = first.starts.tolist(), second.starts.tolist()
    width = 1 + int(max(first.labels.max(initial=0), second.labels.max(initial=0)))
    marks = []
    for number in range(len(first_starts) - 1):
        rows = slice(first_starts[number], first_starts[number + 1])
        other_rows = slice(second_starts[number], second_starts[number + 1])
        content = first.boxes[rows].tobytes()
        other_content = second.boxes[other_rows].tobytes()
        if content == other_content:
            content = _score_content(first, rows, width)
            other_content = _score_content(second, other_rows, width)
        marks.append(other_content < content)
    return np.array(marks, np.bool_)


def _score_content(labelled: LabelledBoxes, rows: slice, width: int) -> bytes:
    """Return the scores by class [N, width] as bytes."""
    labels, scores = labelled.labels[rows], labelled.scores[rows]
    class_scores = np.zeros((len(scores), width), np.float32)
    class_scores[np.arange(len(scores)), labels] = scores
    return class_scores.tobytes()


def _match_boxes(
    first: LabelledBoxes,
    second: LabelledBoxes,
    boxes: NDArray[np.float64],
    ranks: Integers,
    iou_threshold: float,
) -> Integers:
    """Return the partner of each box, -1 without one."""
    rows, other_rows, ious = _overlapping_pairs(first, second, boxes, iou_threshold)
    other_rows = other_rows + len(first.scores)
    is_later = ranks[rows] > ranks[other_rows]
    later = np.where(is_later, rows, other_rows)
    earlier = np.where(is_later, other_rows, rows)
    order = np.lexsort((ranks[earlier], -ious, ranks[later]))
    partners = np.full(len(boxes), -1, np.int64)
    pairs = zip(later[order].tolist(), earlier[order].tolist(), strict=True)
    for row, other in pairs:
        if partners[row] < 0 and partners[other] < 0:
            partners[row], partners[other] = other, row
    return partners


def _overlapping_pairs(
    first: LabelledBoxes,
    second: LabelledBoxes,
    boxes: NDArray[np.float64],
    iou_threshold: float,
) -> tuple[Integers, Integers, NDArray[np.float64]]:
    """Return the rows of the pairs of both labellers' boxes in an image that overlap by
    the threshold, and by how much.
    """
    images = image_of_boxes(first.starts)
    pair_ends = np.cumsum(np.diff(second.starts)[images])
    second_boxes = boxes[len(first.scores) :]
    parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    start = 0
    while start < len(images):
        # as many boxes as make PAIRS_AT_ONCE pairs, at least one
        limit = (pair_ends[start - 1] if start else 0) + PAIRS_AT_ONCE
        end = max(start + 1, int(np.searchsorted(pair_ends, limit, "right")))
        local_rows = image_of_boxes(
            starts_of(np.diff(second.starts)[images[start:end]])
        )
        rows = start + local_rows
        other_rows = rows_of_images(second.starts, images[start:end])
        ious = _pairwise_ious(boxes[rows], second_boxes[other_rows])
        is_pair = ious >= iou_threshold
        parts.append((rows[is_pair], other_rows[is_pair], ious[is_pair]))
        start = end
    rows, other_rows, ious = (np.concatenate(part) for part in zip(*parts, strict=True))
    return rows, other_rows, ious


def _pairwise_ious(
    boxes: NDArray[np.float64], others: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the IoU of each box [P, 4] with the other one in its row."""
    sides = np.minimum(boxes[:, 2:], others[:, 2:])
    sides -= np.maximum(boxes[:, :2], others[:, :2])
    intersection = sides.clip(0).prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    union = areas + (others[:, 2:] - others[:, :2]).prod(1) - intersection
    ious: NDArray[np.float64] = np.divide(
        intersection, union, out=np.zeros_like(intersection), where=union > 0
    )
    return ious


def _mean_boxes(
    boxes: NDArray[np.float64],
    weights: NDArray[np.float64],
    founders: Integers,
    others: Integers,
) -> Floats:
    """Return the mean of each pair by weight; lone boxes as they are."""
    means = boxes[founders]
    pairs = np.flatnonzero(others >= 0)
    rows, other_rows = founders[pairs], others[pairs]
    weight, other_weight = weights[rows][:, None], weights[other_rows][:, None]
    sums = boxes[rows] * weight + boxes[other_rows] * other_weight
    low = np.minimum(boxes[rows], boxes[other_rows])
    high = np.maximum(boxes[rows], boxes[other_rows])
    means[pairs] = np.clip(sums / (weight + other_weight), low, high)
    return means.astype(np.float32)


def _fuse_scores(
    scores: NDArray[np.float64],
    labels: Integers,
    founders: Integers,
    others: Integers,
) -> tuple[Floats, Integers]:
    """Return the best score and its class: each labeller gives half its score to its
    own class.
    """
    score = SHARE * scores[founders]
    other_score = np.where(others >= 0, SHARE * scores[others], 0)
    label, other_label = labels[founders], labels[others]
    is_same = (others >= 0) & (label == other_label)
    total = (score + other_score).astype(np.float32)
    score, other_score = score.astype(np.float32), other_score.astype(np.float32)
    is_other = (other_score > score) | ((other_score == score) & (other_label < label))
    best = np.where(is_same, total, np.maximum(score, other_score))
    best_label = np.where(is_other & ~is_same & (others >= 0), other_label, label)
    # without any score the classes are equal, and the first one counts
    return best, np.where(best > 0, best_label, 0)
