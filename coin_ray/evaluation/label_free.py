"""Score a student without labels, on images it was not trained on: by the boxes that
its teachers' fusion is confident of.

Such a box stands for truth. Other boxes of the fusion are neither required nor wrong.
The score ranks students; it is not an accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torchvision.ops import box_iou

from coin_ray.evaluation.voc import average_precision
from coin_ray.structures import Detections
from coin_ray.tables import Truth

IOU = 0.5
CONFIDENT_SCORE = 0.5
"""Score from which a teacher's detection is expected of the student too."""
BINS = 10
WEIGHTS = {"agreement": 4, "disagreement": -1, "miscalibration": -1}
DetectionsByImage = Mapping[str, Detections]


def label_free_score(
    student: DetectionsByImage,
    teacher: DetectionsByImage,
    expected: Mapping[str, Truth],
    num_classes: int,
) -> dict[str, float]:
    """Return ``agreement`` (AP50 on expected boxes), ``disagreement`` of student and
    teacher, ``miscalibration``, and the ``score`` of all three, each in 0..1.

    ``expected``: by image, from ``confident_detections`` of the teachers' fusion; all
    three are measured over its images.
    """
    nothing = Detections.empty(num_classes)
    teacher_truth = {
        image: confident_detections(teacher.get(image, nothing)) for image in expected
    }
    parts = {
        "agreement": _mean_ap(student, expected, num_classes),
        "disagreement": 1 - _mean_ap(student, teacher_truth, num_classes),
        "miscalibration": miscalibration(student, expected),
    }
    weighted_sum = sum(
        abs(weight) * (parts[name] if weight > 0 else 1 - parts[name])
        for name, weight in WEIGHTS.items()
    )
    total_weight = sum(abs(weight) for weight in WEIGHTS.values())
    return {"score": weighted_sum / total_weight, **parts}


def confident_detections(detections: Detections) -> Truth:
    """Return a teacher's, or the fusion's, detections in an image as truth for a
    student. Detections below ``CONFIDENT_SCORE`` are difficult: neither required nor
    wrong, under their label.
    """
    is_confident = detections.scores >= CONFIDENT_SCORE
    confident, uncertain = detections[is_confident], detections[~is_confident]
    ordered = Detections.cat([confident, uncertain])
    difficult = torch.arange(len(detections)) >= len(confident)
    return Truth(ordered.boxes, ordered.labels, difficult)


def miscalibration(student: DetectionsByImage, expected: Mapping[str, Truth]) -> float:
    """Return the calibration error over ten bins: |mean score - share confirmed by an
    expected box|. 1 without detections to confirm.
    """
    scores, confirmed = [torch.zeros(0)], [torch.zeros(0)]
    for image, truth in expected.items():
        if image in student:
            image_scores, image_confirmed = _confirmations(student[image], truth)
            scores.append(image_scores)
            confirmed.append(image_confirmed)
    all_scores, all_confirmed = torch.cat(scores), torch.cat(confirmed)
    if not len(all_scores):
        return 1.0  # a student that detects nothing must not get the best figure
    bins = (all_scores * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS).index_add_(0, bins, all_scores - all_confirmed)
    return float(gaps.abs().sum() / len(all_scores))


def _confirmations(detections: Detections, truth: Truth) -> tuple[Tensor, Tensor]:
    """Return scores and confirmations (1: confirmed by a required box) of the
    detections that do not match a difficult box.
    """
    same_label = detections.labels[:, None] == truth.labels[None]
    matches = (box_iou(detections.boxes, truth.boxes) > IOU) & same_label
    confirmed = matches[:, ~truth.difficult].any(1)
    ignored = matches[:, truth.difficult].any(1) & ~confirmed
    return detections.scores[~ignored], confirmed[~ignored].float()


def _mean_ap(
    predictions: DetectionsByImage, truth: Mapping[str, Truth], num_classes: int
) -> float:
    """Return mAP50; 0 without truth."""
    mean_ap = average_precision(predictions, truth, num_classes).map
    return 0.0 if math.isnan(mean_ap) else mean_ap
