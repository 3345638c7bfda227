"""Does a confidence of 70 % mean right in 70 of 100 cases? Reliability by bin, and the
expected calibration error.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from coin_ray.evaluation.voc import Floats, Mask

BINS = 10


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Cases of about one confidence: their mean confidence, the share that was right,
    and how many there are.
    """

    confidence: float
    right: float
    count: int


def reliability_bins(
    confidence: Floats, right: Mask, bins: int = BINS
) -> tuple[ReliabilityBin, ...]:
    """Bins of equal width over 0..1, those with a case; confidence [N] in 0..1, right
    [N].
    """
    place = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    return tuple(
        ReliabilityBin(
            float(confidence[mine].mean()), float(right[mine].mean()), int(mine.sum())
        )
        for number in range(bins)
        if (mine := place == number).any()
    )


def expected_calibration_error(found: tuple[ReliabilityBin, ...]) -> float:
    """Expected calibration error in 0..1: mean distance of confidence and share right,
    weighted by cases; NaN without any.
    """
    total = sum(b.count for b in found)
    return (
        sum(b.count * abs(b.confidence - b.right) for b in found) / total
        if total
        else float("nan")
    )
