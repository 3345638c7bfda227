"""Measure calibration: whether detections with a confidence of 70 % are right in 70 of
100 cases. Reliability by bin, and the expected calibration error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from coin_ray.evaluation.voc import Floats, Mask

BINS = 10


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Cases of similar confidence: their mean confidence, the share that was right, and
    how many there are.
    """

    confidence: float
    right: float
    count: int


def reliability_bins(
    confidence: Floats, right: Mask, bins: int = BINS
) -> tuple[ReliabilityBin, ...]:
    """Return the non-empty ones of ``bins`` bins of equal width over 0..1; confidence
    [N] in 0..1, right [N].
    """
    bin_numbers = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    non_empty = []
    for number in range(bins):
        mask = bin_numbers == number
        if mask.any():
            mean_confidence = float(confidence[mask].mean())
            share_right = float(right[mask].mean())
            count = int(mask.sum())
            non_empty.append(ReliabilityBin(mean_confidence, share_right, count))
    return tuple(non_empty)


def expected_calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """Return the mean distance of confidence and share right, weighted by cases, in
    0..1; NaN without any.
    """
    total = sum(b.count for b in bins)
    if not total:
        return float("nan")
    return sum(b.count * abs(b.confidence - b.right) for b in bins) / total
