from __future__ import annotations

import math

import numpy as np
import pytest

from coin_ray.evaluation.calibration import (
    ReliabilityBin,
    expected_calibration_error,
    reliability_bins,
)


def test_bins_hold_mean_confidence_and_share_right() -> None:
    confidence = np.array([0.62, 0.68, 1.0, 0.95, 0.91, 0.1])
    bins = reliability_bins(
        confidence, np.array([True, False, True, True, False, False])
    )
    assert [b.count for b in bins] == [1, 2, 3]
    assert [b.confidence for b in bins] == pytest.approx([0.1, 0.65, 2.86 / 3])
    assert [b.right for b in bins] == pytest.approx([0, 0.5, 2 / 3])


def test_error_is_the_mean_distance_weighted_by_cases() -> None:
    assert expected_calibration_error(
        (ReliabilityBin(0.9, 0.6, 3), ReliabilityBin(0.5, 0.6, 1))
    ) == pytest.approx((3 * 0.3 + 0.1) / 4)
    assert expected_calibration_error((ReliabilityBin(0.7, 0.7, 5),)) == 0
    assert math.isnan(expected_calibration_error(()))
