"""A detector at one score threshold, as it would be used: what it finds, what it gets
wrong, and on which images.
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
    """Boxes by image [I]: truth boxes, those found, and boxes shown that are wrong."""

    truth: Integers
    found: Integers
    wrong: Integers


def best_f1(classes: Sequence[MatchedDetections]) -> OperatingPoint | None:
    """The threshold with the best harmonic mean of precision and recall, the highest
    one of equals; None if nothing is ever right.
    """
    scores = np.concatenate([j.score for j in classes])
    right = np.concatenate([j.right for j in classes])
    required = sum(int(j.required.sum()) for j in classes)
    if not right.any():
        return None
    order = np.argsort(-scores, kind="stable")
    scores, found = scores[order], right[order].cumsum()
    shown = np.arange(1, len(scores) + 1)
    f1 = 2 * found / (shown + required)
    # a threshold shows all boxes of one score, or none
    f1[:-1][scores[:-1] == scores[1:]] = 0
    best = int(f1.argmax())
    return OperatingPoint(
        float(scores[best]),
        float(found[best] / shown[best]),
        float(found[best] / required),
        float(f1[best]),
    )


def count_by_image(classes: Sequence[MatchedDetections], score: float) -> ImageCounts:
    """What each image looks like with the boxes of at least ``score``."""
    images = len(classes[0].required)
    found, wrong = np.zeros(images, np.int64), np.zeros(images, np.int64)
    for judged in classes:
        shown = judged.score >= score
        found += np.bincount(judged.image[shown & judged.right], minlength=images)
        wrong += np.bincount(judged.image[shown & ~judged.right], minlength=images)
    return ImageCounts(np.sum([j.required for j in classes], axis=0), found, wrong)


def regression_by_image(ours: ImageCounts, theirs: ImageCounts) -> Integers:
    """How much worse ours is than theirs on each image [I]: boxes no longer found plus
    boxes newly wrong.
    """
    lost: Integers = (theirs.found - theirs.wrong) - (ours.found - ours.wrong)
    return lost
