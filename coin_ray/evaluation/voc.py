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
    score, number of the image (in the order of the sorted ids) and whether it is right
    [D]; ``required`` [I]: truth boxes of each image.
    """

    score: Floats
    image: Integers
    right: Mask
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
    """VOC AP of every class, over the images in ``truth`` (by image id).

    Images without predictions count as empty; predictions for other images are not
    looked at. Boxes are xyxy pixels; ``plus_one`` measures a box as ``right - left +
    1`` pixels wide, as the paper's evaluation does. Equal scores are ordered by image
    id, then by box, so the order of the inputs never matters.
    """
    images = sorted(truth)
    annotated = _annotated(images, truth)
    found = _detected(images, predictions, annotated, plus_one)
    matched = found.overlap > iou
    required = np.bincount(
        annotated.labels[~annotated.difficult], minlength=num_classes
    )[:num_classes]
    curves = tuple(
        _curve(found, matched, annotated.difficult, label, int(required[label]))
        for label in range(num_classes)
    )
    ap = np.array(
        [
            _area(curve) if count else np.nan
            for curve, count in zip(curves, required, strict=True)
        ],
        np.float64,
    )
    return VocReport(ap, required.astype(np.int64), curves)


def match_detections(
    predictions: Mapping[str, Detections],
    truth: Mapping[str, Truth],
    num_classes: int,
    iou: float = 0.5,
    plus_one: bool = False,
) -> tuple[MatchedDetections, ...]:
    """Every detection of each class as ``average_precision`` judges it, over the images
    in ``truth``.
    """
    images = sorted(truth)
    annotated = _annotated(images, truth)
    found = _detected(images, predictions, annotated, plus_one)
    matched = found.overlap > iou
    owner = np.repeat(np.arange(len(images)), np.diff(annotated.starts))
    parts = []
    for label in range(num_classes):
        kept, right = _kept(found, matched, annotated.difficult, label)
        wanted = (annotated.labels == label) & ~annotated.difficult
        required = np.bincount(owner[wanted], minlength=len(images)).astype(np.int64)
        parts.append(
            MatchedDetections(found.scores[kept], found.images[kept], right, required)
        )
    return tuple(parts)


def mean_over_classes(values: Floats) -> float:
    """Mean of the entries that are not NaN; NaN if all are."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def pairwise_iou(boxes: Floats, others: Floats, plus_one: bool = False) -> Floats:
    """Intersection over union [N, M] of boxes [N, 4] and [M, 4], xyxy pixels; 0 where
    the union is empty.
    """
    extra = 1.0 if plus_one else 0.0
    left_top = np.maximum(boxes[:, None, :2], others[None, :, :2])
    right_bottom = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = (right_bottom - left_top + extra).clip(min=0).prod(-1)
    area = (boxes[:, 2:] - boxes[:, :2] + extra).clip(min=0).prod(-1)
    other_area = (others[:, 2:] - others[:, :2] + extra).clip(min=0).prod(-1)
    union = area[:, None] + other_area[None] - shared
    overlap: Floats = np.divide(
        shared, union, out=np.zeros_like(shared), where=union > 0
    )
    return overlap


def to_float64(values: torch.Tensor) -> Floats:
    """Float64 copy on the CPU: overlaps of exactly the limit stay exact."""
    return np.asarray(values.detach().cpu().numpy(), np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class _Annotated:
    """All truth, one row per box, images in the order of their ids; image i owns rows
    ``starts[i]`` to ``starts[i + 1]``.
    """

    boxes: Floats
    labels: Integers
    difficult: Mask
    starts: Integers


@dataclass(frozen=True, slots=True, eq=False)
class _Detected:
    """All detections, best score first: label, the truth row of its class it overlaps
    most, and that overlap (-1: none).
    """

    labels: Integers
    rows: Integers
    overlap: Floats
    scores: Floats
    images: Integers


def _annotated(images: Sequence[str], truth: Mapping[str, Truth]) -> _Annotated:
    parts = [_canonical(truth[name]) for name in images]
    return _Annotated(
        np.concatenate([np.zeros((0, 4)), *(boxes for boxes, _, _ in parts)]),
        np.concatenate([np.zeros(0, np.int64), *(labels for _, labels, _ in parts)]),
        np.concatenate(
            [np.zeros(0, np.bool_), *(difficult for _, _, difficult in parts)]
        ),
        np.cumsum([0, *(len(boxes) for boxes, _, _ in parts)]),
    )


def _canonical(truth: Truth) -> tuple[Floats, Integers, Mask]:
    """Boxes, labels, difficult in an order that doesn't depend on the given one; it
    decides between equal overlaps.
    """
    boxes, labels, difficult = (
        to_float64(truth.boxes),
        truth.labels.cpu().numpy(),
        truth.difficult.cpu().numpy(),
    )
    order = np.lexsort((difficult, *boxes.T))
    return boxes[order], labels[order], difficult[order]


def _detected(
    images: Sequence[str],
    predictions: Mapping[str, Detections],
    annotated: _Annotated,
    plus_one: bool,
) -> _Detected:
    present = [
        (index, predictions[name])
        for index, name in enumerate(images)
        if name in predictions
    ]
    if not present:
        none = np.zeros(0, np.int64)
        return _Detected(none, none, np.zeros(0), np.zeros(0), none)
    every = Detections.cat(
        [detections.to(torch.device("cpu")) for _, detections in present]
    )
    boxes, scores, labels = (
        to_float64(every.boxes),
        to_float64(every.scores),
        every.labels.numpy(),
    )
    owner = np.repeat(
        np.array([index for index, _ in present], np.int64),
        [len(detections) for _, detections in present],
    )
    rows, overlap = _best_truth(boxes, labels, owner, annotated, plus_one)
    order = np.lexsort((*boxes.T, owner, -scores))
    return _Detected(
        labels[order], rows[order], overlap[order], scores[order], owner[order]
    )


def _best_truth(
    boxes: Floats,
    labels: Integers,
    owner: Integers,
    annotated: _Annotated,
    plus_one: bool,
) -> tuple[Integers, Floats]:
    """For each detection the truth row of its image and class with the largest overlap,
    and that overlap; -1 where there is none.
    """
    rows, overlap = np.full(len(boxes), -1), np.full(len(boxes), -1.0)
    ends = np.searchsorted(owner, np.arange(len(annotated.starts)))
    for image, (start, stop) in enumerate(
        zip(annotated.starts[:-1], annotated.starts[1:], strict=True)
    ):
        mine = slice(ends[image], ends[image + 1])
        if start == stop or mine.start == mine.stop:
            continue
        shared = pairwise_iou(boxes[mine], annotated.boxes[start:stop], plus_one)
        shared[labels[mine, None] != annotated.labels[None, start:stop]] = -1
        rows[mine], overlap[mine] = start + shared.argmax(1), shared.max(1)
    return rows, overlap


def _curve(
    found: _Detected, matched: Mask, difficult: Mask, label: int, required: int
) -> PrecisionRecallCurve:
    _, right = _kept(found, matched, difficult, label)
    true_positives = right.cumsum()
    precision = true_positives / np.arange(1, len(right) + 1)
    return PrecisionRecallCurve(precision, true_positives / max(required, 1))


def _kept(
    found: _Detected, matched: Mask, difficult: Mask, label: int
) -> tuple[Integers, Mask]:
    """Places of a class's detections that count, and which of them are right."""
    mine = np.flatnonzero(found.labels == label)
    rows, hit = found.rows[mine], matched[mine]
    ignored = np.zeros_like(hit)
    ignored[hit] = difficult[rows[hit]]
    return mine[~ignored], _first_of_each(rows, hit)[~ignored]


def _first_of_each(rows: Integers, hit: Mask) -> Mask:
    """True for the first (best) detection matched to each truth row."""
    first = np.zeros_like(hit)
    places = np.flatnonzero(hit)
    first[places[np.unique(rows[places], return_index=True)[1]]] = True
    return first


def _area(curve: PrecisionRecallCurve) -> float:
    """Area under the curve after precision is made to fall with recall."""
    envelope = np.maximum.accumulate(curve.precision[::-1])[::-1]
    return float((np.diff(curve.recall, prepend=0.0) * envelope).sum())
