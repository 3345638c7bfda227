"""COCO average precision through ``faster_coco_eval``, from the same inputs as the VOC
measure.

It differs from VOC in more than the overlaps averaged over: 101 recall points, at most
100 detections per image, an overlap of exactly the limit counts, and a detection may
fall back to its second-best truth box.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster

from coin_ray.evaluation.voc import Floats, mean_over_classes, to_float64
from coin_ray.structures import Detections
from coin_ray.tables import Truth

DETECTIONS_PER_IMAGE = 100


@dataclass(frozen=True, slots=True, eq=False)
class CocoReport:
    """``ap`` (mean over IoU .5, .55, ..., .95) and ``ap50`` of each class [K], in 0..1;
    NaN where a class has no truth.
    """

    ap: Floats
    ap50: Floats

    @property
    def map(self) -> float:
        """Mean of ``ap`` over the classes that have truth; NaN if none has."""
        return mean_over_classes(self.ap)

    @property
    def map50(self) -> float:
        """Mean of ``ap50`` over the classes that have truth; NaN if none has."""
        return mean_over_classes(self.ap50)


def coco_average_precision(
    predictions: Mapping[str, Detections], truth: Mapping[str, Truth], num_classes: int
) -> CocoReport:
    """COCO AP and AP50 of every class, over the images in ``truth`` (by image id);
    boxes xyxy pixels.

    ``difficult`` boxes are handed over as crowds: not required, and detections inside
    them don't count as wrong.
    """
    images = sorted(truth)
    annotated = _coco(
        images,
        num_classes,
        [
            row
            for i, name in enumerate(images, 1)
            for row in _truth_rows(i, truth[name])
        ],
    )
    found = [
        row
        for i, name in enumerate(images, 1)
        if name in predictions
        for row in _detection_rows(i, predictions[name])
    ]
    if not found:
        zero = np.where(_required(images, truth, num_classes) > 0, 0.0, np.nan)
        return CocoReport(zero, zero.copy())
    # The last two axes of precision [IoU, recall, class, area, limit] have one entry
    # each.
    precision = _evaluate(annotated, _coco(images, num_classes, found))[..., 0, 0]
    precision = np.where(precision < 0, np.nan, precision)
    return CocoReport(precision.mean((0, 1)), precision[0].mean(0))


def _evaluate(annotated: COCO, found: COCO) -> Floats:
    run = COCOeval_faster(annotated, found, "bbox", print_function=_silent)
    run.params.maxDets = [DETECTIONS_PER_IMAGE]
    run.params.areaRng, run.params.areaRngLbl = [[0, 1e10]], ["all"]
    run.evaluate()
    run.accumulate()
    return np.asarray(run.eval["precision"], np.float64)


def _coco(images: Sequence[str], num_classes: int, rows: list[dict[str, Any]]) -> COCO:
    dataset = {
        "images": [{"id": i} for i in range(1, len(images) + 1)],
        "categories": [
            {"id": label, "name": str(label)} for label in range(num_classes)
        ],
        "annotations": [{"id": i, **row} for i, row in enumerate(rows, 1)],
    }
    return COCO(dataset, print_function=_silent)


def _truth_rows(image: int, truth: Truth) -> list[dict[str, Any]]:
    return [
        {**_row(image, box, int(label)), "iscrowd": int(difficult)}
        for box, label, difficult in zip(
            to_float64(truth.boxes), truth.labels, truth.difficult, strict=True
        )
    ]


def _detection_rows(image: int, detections: Detections) -> list[dict[str, Any]]:
    boxes, scores = to_float64(detections.boxes), to_float64(detections.scores)
    return [
        {**_row(image, box, int(label)), "score": float(score)}
        for box, score, label in zip(boxes, scores, detections.labels, strict=True)
    ]


def _row(image: int, box: Floats, label: int) -> dict[str, Any]:
    left, top, right, bottom = map(float, box)
    size = [right - left, bottom - top]
    return {
        "image_id": image,
        "category_id": label,
        "bbox": [left, top, *size],
        "area": size[0] * size[1],
        "iscrowd": 0,
    }


def _required(
    images: Sequence[str], truth: Mapping[str, Truth], num_classes: int
) -> Floats:
    labels = torch.cat(
        [
            torch.zeros(0, dtype=torch.int64),
            *(truth[name].labels[~truth[name].difficult] for name in images),
        ]
    )
    return to_float64(torch.bincount(labels, minlength=num_classes))[:num_classes]


def _silent(*_: object) -> None:
    return None
