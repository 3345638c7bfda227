"""Compute COCO average precision with ``faster_coco_eval``, from the same inputs as the
VOC measure.

It differs from VOC in more than the overlaps averaged over: 101 recall points, at most
100 detections per image, an overlap of exactly the limit counts, and a detection may
fall back to its second-best truth box.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster

from coin_ray.evaluation.voc import Floats, mean_over_classes, to_float64
from coin_ray.storage import JsonObject
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
    """Compute COCO AP and AP50 of every class, over the images in ``truth`` (by image
    id); boxes xyxy pixels.

    ``difficult`` boxes are passed as crowds: not required, and detections inside them
    don't count as wrong.
    """
    images = sorted(truth)
    truth_rows: list[JsonObject] = []
    detection_rows: list[JsonObject] = []
    for image_id, name in enumerate(images, 1):
        truth_rows += _truth_rows(image_id, truth[name])
        if name in predictions:
            detection_rows += _detection_rows(image_id, predictions[name])
    if not detection_rows:
        required = _count_required(images, truth, num_classes)
        zero = np.where(required > 0, 0.0, np.nan)
        return CocoReport(zero, zero.copy())
    annotated = _coco(len(images), num_classes, truth_rows)
    detected = _coco(len(images), num_classes, detection_rows)
    # The last two axes of precision [IoU, recall, class, area, limit] have one entry
    # each.
    precision = _evaluate(annotated, detected)[..., 0, 0]
    precision = np.where(precision < 0, np.nan, precision)
    return CocoReport(precision.mean((0, 1)), precision[0].mean(0))


def _evaluate(annotated: COCO, detected: COCO) -> Floats:
    evaluation = COCOeval_faster(annotated, detected, "bbox", print_function=_silent)
    evaluation.params.maxDets = [DETECTIONS_PER_IMAGE]
    evaluation.params.areaRng = [[0, 1e10]]
    evaluation.params.areaRngLbl = ["all"]
    evaluation.evaluate()
    evaluation.accumulate()
    return np.asarray(evaluation.eval["precision"], np.float64)


def _coco(num_images: int, num_classes: int, rows: list[JsonObject]) -> COCO:
    categories = [{"id": label, "name": str(label)} for label in range(num_classes)]
    dataset = {
        "images": [{"id": image_id} for image_id in range(1, num_images + 1)],
        "categories": categories,
        "annotations": [{"id": number, **row} for number, row in enumerate(rows, 1)],
    }
    return COCO(dataset, print_function=_silent)


def _truth_rows(image_id: int, truth: Truth) -> list[JsonObject]:
    rows = []
    boxes = to_float64(truth.boxes)
    for box, label, difficult in zip(boxes, truth.labels, truth.difficult, strict=True):
        row = _row(image_id, box, int(label))
        rows.append(row | {"iscrowd": int(difficult)})
    return rows


def _detection_rows(image_id: int, detections: Detections) -> list[JsonObject]:
    boxes, scores = to_float64(detections.boxes), to_float64(detections.scores)
    rows = []
    for box, score, label in zip(boxes, scores, detections.labels, strict=True):
        rows.append(_row(image_id, box, int(label)) | {"score": float(score)})
    return rows


def _row(image_id: int, box: Floats, label: int) -> JsonObject:
    x1, y1, x2, y2 = map(float, box)
    width, height = x2 - x1, y2 - y1
    return {
        "image_id": image_id,
        "category_id": label,
        "bbox": [x1, y1, width, height],
        "area": width * height,
        "iscrowd": 0,
    }


def _count_required(
    images: Sequence[str], truth: Mapping[str, Truth], num_classes: int
) -> Floats:
    """Count the truth boxes [K] of each class that are not difficult."""
    labels = [torch.zeros(0, dtype=torch.int64)]
    labels += [truth[name].labels[~truth[name].difficult] for name in images]
    counts = torch.bincount(torch.cat(labels), minlength=num_classes)
    return to_float64(counts)[:num_classes]


def _silent(*_: object) -> None:
    return None
