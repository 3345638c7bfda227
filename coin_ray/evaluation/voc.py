"""PASCAL VOC average precision: area under the precision-recall curve over all points
(VOC 2010 and later).

The protocol of COIN section 7: a detection is judged against the truth box of its class
and image that it overlaps most. It is right if that overlap is *strictly* above the
limit and no better detection was matched to the same box. Detections matched to a
``difficult`` box are neither right nor wrong, and such boxes are not required.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from coin_ray.structures import Detections
from coin_ray.tables import Truth

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class PrecisionRecallCurve:
    """Precision and recall [D] of one class after each of its D detections, best score
    first; difficult matches left out.
    """

    precision: Floats
    recall: Floats


@dataclass(frozen=True, slots=True, eq=False)
class MatchedDetections:
    """The D detections of one class, best score first, difficult matches left out:
    score, number of the image (in the order of the sorted ids) and whether it is
    correct [D]; ``required`` [I]: truth boxes of each image.
    """

    score: Floats
    image: Integers
    correct: Mask
    required: Integers


@dataclass(frozen=True, slots=True, eq=False)
class VocReport:
    """``ap`` [K] in 0..1, NaN where a class has no truth; ``truth`` [K] counts it
    (difficult left out); ``curves``: one per class.
    """

    ap: Floats
    truth: Integers
    curves: tuple[PrecisionRecallCurve, ...]

    @property
    def map(self) -> float:
        """Unweighted mean over the classes that have truth; NaN if none has."""
        return mean_over_classes(self.ap)


def average_precision(
    predictions: Mapping[str, Detections],
    truth: Mapping[str, Truth],
    num_classes: int,
    iou: float = 0.5,
    plus_one: bool = False,
) -> VocReport:
    """Compute the VOC AP of every class, over the images in ``truth`` (by image id).

    Images without predictions count as empty; predictions for other images are not
    used. Boxes are xyxy pixels; ``plus_one`` measures a box as ``right - left + 1``
    pixels wide, as the paper's evaluation does. Equal scores are ordered by image id,
    then by box, so the order of the inputs never matters.
    """
    images = sorted(truth)
    annotated = _concatenate_truth(images, truth)
    detected = _sort_detections(images, predictions, annotated, plus_one)
    matched = detected.overlap > iou
    required_labels = annotated.labels[~annotated.difficult]
    required = np.bincount(required_labels, minlength=num_classes)[:num_classes]
    curves = []
    for label in range(num_classes):
        _, correct = _match_class(detected, matched, annotated.difficult, label)
        curves.append(_curve(correct, int(required[label])))
    ap = [
        _area(curve) if count else np.nan
        for curve, count in zip(curves, required, strict=True)
    ]
    return VocReport(np.array(ap, np.float64), required.astype(np.int64), tuple(curves))


def match_detections(
    predictions: Mapping[str, Detections],
    truth: Mapping[str, Truth],
    num_classes: int,
    iou: float = 0.5,
    plus_one: bool = False,
) -> tuple[MatchedDetections, ...]:
    """Match every detection of each class as ``average_precision`` does, over the
    images in ``truth``.
    """
    images = sorted(truth)
    annotated = _concatenate_truth(images, truth)
    detected = _sort_detections(images, predictions, annotated, plus_one)
    matched = detected.overlap > iou
    image_of_truth = np.repeat(np.arange(len(images)), np.diff(annotated.starts))
    classes = []
    for label in range(num_classes):
        rows, correct = _match_class(detected, matched, annotated.difficult, label)
        is_required = (annotated.labels == label) & ~annotated.difficult
        required = np.bincount(image_of_truth[is_required], minlength=len(images))
        classes.append(
            MatchedDetections(
                detected.scores[rows],
                detected.images[rows],
                correct,
                required.astype(np.int64),
            )
        )
    return tuple(classes)


def mean_over_classes(figures: Floats) -> float:
    """Average the entries that are not NaN; NaN if all are."""
    defined = figures[~np.isnan(figures)]
    return float(defined.mean()) if len(defined) else float("nan")


def pairwise_iou(boxes: Floats, others: Floats, plus_one: bool = False) -> Floats:
    """Compute intersection over union [N, M] of boxes [N, 4] and [M, 4], xyxy pixels; 0
    where the union is empty.
    """
    extra = 1.0 if plus_one else 0.0
    left_top = np.maximum(boxes[:, None, :2], others[None, :, :2])
    right_bottom = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = (right_bottom - left_top + extra).clip(min=0).prod(-1)
    area = (boxes[:, 2:] - boxes[:, :2] + extra).clip(min=0).prod(-1)
    other_area = (others[:, 2:] - others[:, :2] + extra).clip(min=0).prod(-1)
    union = area[:, None] + other_area[None] - shared
    zeros = np.zeros_like(shared)
    overlap: Floats = np.divide(shared, union, out=zeros, where=union > 0)
    return overlap


def to_float64(tensor: torch.Tensor) -> Floats:
    """Copy to the CPU as float64: overlaps of exactly the limit stay exact."""
    return np.asarray(tensor.detach().cpu().numpy(), np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class _AllTruth:
    """All truth, one row per box, images in the order of their ids; image i owns rows
    ``starts[i]`` to ``starts[i + 1]``.
    """

    boxes: Floats
    labels: Integers
    difficult: Mask
    starts: Integers


@dataclass(frozen=True, slots=True, eq=False)
class _AllDetections:
    """All detections, best score first: label, the truth row of its class it overlaps
    most, and that overlap (-1: none).
    """

    labels: Integers
    rows: Integers
    overlap: Floats
    scores: Floats
    images: Integers


def _concatenate_truth(images: Sequence[str], truth: Mapping[str, Truth]) -> _AllTruth:
    boxes, labels = [np.zeros((0, 4))], [np.zeros(0, np.int64)]
    difficult, counts = [np.zeros(0, np.bool_)], [0]
    for name in images:
        image_boxes, image_labels, image_difficult = _sort_truth(truth[name])
        boxes.append(image_boxes)
        labels.append(image_labels)
        difficult.append(image_difficult)
        counts.append(len(image_boxes))
    return _AllTruth(
        np.concatenate(boxes),
        np.concatenate(labels),
        np.concatenate(difficult),
        np.cumsum(counts),
    )


def _sort_truth(truth: Truth) -> tuple[Floats, Integers, Mask]:
    """Sort boxes, labels and difficult, so that the order of the input does not decide
    between equal overlaps.
    """
    boxes = to_float64(truth.boxes)
    labels, difficult = truth.labels.cpu().numpy(), truth.difficult.cpu().numpy()
    order = np.lexsort((difficult, *boxes.T))
    return boxes[order], labels[order], difficult[order]


def _sort_detections(
    images: Sequence[str],
    predictions: Mapping[str, Detections],
    annotated: _AllTruth,
    plus_one: bool,
) -> _AllDetections:
    numbers = [number for number, name in enumerate(images) if name in predictions]
    if not numbers:
        empty = np.zeros(0, np.int64)
        return _AllDetections(empty, empty, np.zeros(0), np.zeros(0), empty)
    by_image = [predictions[images[number]] for number in numbers]
    cpu = torch.device("cpu")
    detections = Detections.cat(
        [image_detections.to(cpu) for image_detections in by_image]
    )
    boxes, scores = to_float64(detections.boxes), to_float64(detections.scores)
    labels = detections.labels.numpy()
    counts = [len(image_detections) for image_detections in by_image]
    image_numbers = np.repeat(np.array(numbers, np.int64), counts)
    rows, overlap = _best_truth(boxes, labels, image_numbers, annotated, plus_one)
    order = np.lexsort((*boxes.T, image_numbers, -scores))
    return _AllDetections(
        labels[order], rows[order], overlap[order], scores[order], image_numbers[order]
    )


def _best_truth(
    boxes: Floats,
    labels: Integers,
    image_numbers: Integers,
    annotated: _AllTruth,
    plus_one: bool,
) -> tuple[Integers, Floats]:
    """Return for each detection the truth row of its image and class with the largest
    overlap, and that overlap; -1 where there is none.
    """
    rows, overlap = np.full(len(boxes), -1), np.full(len(boxes), -1.0)
    starts = np.searchsorted(image_numbers, np.arange(len(annotated.starts)))
    for image in range(len(annotated.starts) - 1):
        detections = slice(starts[image], starts[image + 1])
        truth = slice(annotated.starts[image], annotated.starts[image + 1])
        if truth.start == truth.stop or detections.start == detections.stop:
            continue
        shared = pairwise_iou(boxes[detections], annotated.boxes[truth], plus_one)
        shared[labels[detections, None] != annotated.labels[None, truth]] = -1
        rows[detections] = truth.start + shared.argmax(1)
        overlap[detections] = shared.max(1)
    return rows, overlap


def _match_class(
    detected: _AllDetections, matched: Mask, difficult: Mask, label: int
) -> tuple[Integers, Mask]:
    """Return the rows of a class's detections without difficult matches, and which of
    them are correct.
    """
    class_rows = np.flatnonzero(detected.labels == label)
    truth_rows, hit = detected.rows[class_rows], matched[class_rows]
    ignored = np.zeros_like(hit)
    ignored[hit] = difficult[truth_rows[hit]]
    correct = _first_of_each(truth_rows, hit)
    return class_rows[~ignored], correct[~ignored]


def _first_of_each(truth_rows: Integers, hit: Mask) -> Mask:
    """Mark the first (best) detection matched to each truth row."""
    first = np.zeros_like(hit)
    positions = np.flatnonzero(hit)
    _, first_index = np.unique(truth_rows[positions], return_index=True)
    first[positions[first_index]] = True
    return first


def _curve(correct: Mask, required: int) -> PrecisionRecallCurve:
    true_positives = correct.cumsum()
    precision = true_positives / np.arange(1, len(correct) + 1)
    return PrecisionRecallCurve(precision, true_positives / max(required, 1))


def _area(curve: PrecisionRecallCurve) -> float:
    """Compute the area under the curve after precision is made to fall with recall."""
    envelope = np.maximum.accumulate(curve.precision[::-1])[::-1]
    return float((np.diff(curve.recall, prepend=0.0) * envelope).sum())
