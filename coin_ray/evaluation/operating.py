"""Evaluate a detector at one score threshold, as it would be used: precision, recall
and errors per image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from coin_ray.evaluation.voc import Integers, MatchedDetections


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """Shares in 0..1 over all classes' boxes with at least ``score``."""

    score: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True, slots=True, eq=False)
class ImageCounts:
    """Boxes by image [I]: truth boxes, detected truth boxes, and wrong detections."""

    truth: Integers
    detected: Integers
    wrong: Integers


def best_f1(classes: Sequence[MatchedDetections]) -> OperatingPoint | None:
    """Return the threshold with the best harmonic mean of precision and recall, the
    highest one of equals; None if no detection is correct.
    """
    scores = np.concatenate([matched.score for matched in classes])
    correct = np.concatenate([matched.correct for matched in classes])
    required = sum(int(matched.required.sum()) for matched in classes)
    if not correct.any():
        return None
    order = np.argsort(-scores, kind="stable")
    scores, true_positives = scores[order], correct[order].cumsum()
    detections = np.arange(1, len(scores) + 1)
    f1 = 2 * true_positives / (detections + required)
    # a threshold keeps all boxes of one score, or none
    f1[:-1][scores[:-1] == scores[1:]] = 0
    best = int(f1.argmax())
    return OperatingPoint(
        score=float(scores[best]),
        precision=float(true_positives[best] / detections[best]),
        recall=float(true_positives[best] / required),
        f1=float(f1[best]),
    )


def count_by_image(classes: Sequence[MatchedDetections], score: float) -> ImageCounts:
    """Count the boxes of each image, of detections with at least ``score``."""
    images = len(classes[0].required)
    detected, wrong = np.zeros(images, np.int64), np.zeros(images, np.int64)
    for matched in classes:
        above = matched.score >= score
        correct_images = matched.image[above & matched.correct]
        wrong_images = matched.image[above & ~matched.correct]
        detected += np.bincount(correct_images, minlength=images)
        wrong += np.bincount(wrong_images, minlength=images)
    truth = np.sum([matched.required for matched in classes], axis=0)
    return ImageCounts(truth, detected, wrong)


def regression_by_image(counts: ImageCounts, baseline: ImageCounts) -> Integers:
    """Return how much worse ``counts`` is than ``baseline`` on each image [I]: boxes no
    longer detected plus boxes newly wrong.
    """
    baseline_score = baseline.detected - baseline.wrong
    regression: Integers = baseline_score - (counts.detected - counts.wrong)
    return regression
