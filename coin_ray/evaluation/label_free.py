"""How good a student is, judged without labels: by what both teachers agree on, in images it was not trained on.

A consistent box (both teachers, same name) stands for truth. What the teachers dispute, or only one of them saw, is
neither required nor wrong. This sorts students; it is not their accuracy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_iou

from coin_ray.evaluation.voc import average_precision
from coin_ray.structures import Detections
from coin_ray.tables import Truth

IOU = 0.5
SURE = 0.5
"""Score from which a detection of the teacher is expected of the student too."""
BINS = 10
WEIGHTS = {"agreement": 4, "disagreement": -1, "miscalibration": -1}
Results = Mapping[str, Detections]


def label_free(student: Results, teacher: Results, agreed: Mapping[str, Truth], num_classes: int) -> dict[str, float]:
    """``agreement`` (AP50 on agreed boxes), ``disagreement`` of student and teacher, ``miscalibration``, and the ``score`` of all three, each in 0..1.

    ``agreed``: from ``agreed_boxes``; all three are measured over its images.
    """
    teachers = {image: _expected(teacher.get(image), num_classes) for image in agreed}
    parts = {
        "agreement": _known(average_precision(student, agreed, num_classes).map, 0.0),
        "disagreement": 1 - _known(average_precision(student, teachers, num_classes).map, 0.0),
        "miscalibration": calibration_error(student, agreed),
    }
    score = sum(abs(w) * (parts[name] if w > 0 else 1 - parts[name]) for name, w in WEIGHTS.items())
    return {"score": score / sum(abs(w) for w in WEIGHTS.values()), **parts}


def agreed_boxes(separation: Iterable[Mapping[str, Any]], num_classes: int) -> dict[str, Truth]:
    """Rows of ``separation.parquet`` as truth by image: consistent boxes and people's, and all others as difficult, whatever their class."""
    return {str(row["image_id"]): _agreed(row, num_classes) for row in separation}


def calibration_error(student: Results, agreed: Mapping[str, Truth]) -> float:
    """Expected calibration error over ten bins: |mean score - share confirmed by an agreed box|. 1 without detections to judge."""
    judged = [_judged(student[image], truth) for image, truth in agreed.items() if image in student]
    scores = torch.cat([s for s, _ in judged] or [torch.zeros(0)])
    confirmed = torch.cat([c for _, c in judged] or [torch.zeros(0)])
    if not len(scores):
        return 1.0  # else a student that sees nothing would be praised for it
    bins = (scores * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS).index_add_(0, bins, scores - confirmed)
    return float(gaps.abs().sum() / len(scores))


def _agreed(row: Mapping[str, Any], num_classes: int) -> Truth:
    boxes = torch.tensor(row["boxes"], dtype=torch.float32).reshape(-1, 4)
    consistent = torch.tensor([kind in ("consistent", "reviewed") for kind in row["kind"]], dtype=torch.bool)
    labels = torch.tensor(row["cloud_labels"], dtype=torch.int64)[consistent]
    disputed = boxes[~consistent].repeat(num_classes, 1)
    every = torch.arange(num_classes).repeat_interleave(int((~consistent).sum()))
    return _truth(boxes[consistent], labels, disputed, every)


def _expected(found: Detections | None, num_classes: int) -> Truth:
    found = Detections.empty(num_classes) if found is None else found
    sure = found.scores >= SURE
    return _truth(found.boxes[sure], found.labels[sure], found.boxes[~sure], found.labels[~sure])


def _truth(boxes: Tensor, labels: Tensor, ignored: Tensor, ignored_labels: Tensor) -> Truth:
    difficult = torch.arange(len(boxes) + len(ignored)) >= len(boxes)
    return Truth(torch.cat([boxes, ignored]), torch.cat([labels, ignored_labels]), difficult)


def _judged(found: Detections, truth: Truth) -> tuple[Tensor, Tensor]:
    """Scores and verdicts (1: confirmed) of the detections that lie on no disputed box."""
    same = found.labels[:, None] == truth.labels[None]
    hits = (box_iou(found.boxes, truth.boxes) > IOU) & same
    confirmed, disputed = hits[:, ~truth.difficult].any(1), hits[:, truth.difficult].any(1)
    judged = confirmed | ~disputed
    return found.scores[judged], confirmed[judged].float()


def _known(value: float, otherwise: float) -> float:
    return otherwise if value != value else value
