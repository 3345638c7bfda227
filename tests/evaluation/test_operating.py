from __future__ import annotations

import numpy as np
import pytest

from coin_ray.evaluation.operating import best_f1, count_by_image, regression_by_image
from coin_ray.evaluation.voc import MatchedDetections


def _matched_detections(
    rows: list[tuple[float, int, bool]], required: list[int]
) -> MatchedDetections:
    score, image, right = zip(*rows, strict=True) if rows else ((), (), ())
    return MatchedDetections(
        np.array(score, np.float64),
        np.array(image, np.int64),
        np.array(right, np.bool_),
        np.array(required, np.int64),
    )


CAT = _matched_detections([(0.9, 0, True), (0.5, 0, False), (0.4, 1, True)], [1, 2])
DOG = _matched_detections([(0.8, 1, True), (0.2, 1, False)], [0, 1])


def test_the_best_threshold_balances_precision_and_recall() -> None:
    point = best_f1([CAT, DOG])
    # by score: right .9, right .8, wrong .5, right .4, wrong .2; 4 objects: f1 = 2/5,
    # 4/6, 4/7, 6/8, 6/9
    assert point is not None
    assert (point.score, point.precision, point.recall, point.f1) == (
        0.4,
        0.75,
        0.75,
        0.75,
    )


def test_boxes_of_one_score_are_shown_together() -> None:
    point = best_f1([_matched_detections([(0.5, 0, True), (0.5, 0, False)], [1])])
    assert point is not None
    assert (point.score, point.precision, point.recall) == (0.5, 0.5, 1.0)


@pytest.mark.parametrize("rows", [[], [(0.9, 0, False)]])
def test_a_method_that_is_never_right_has_no_threshold(
    rows: list[tuple[float, int, bool]],
) -> None:
    assert best_f1([_matched_detections(rows, [1])]) is None


def test_counts_and_regressions_by_image() -> None:
    baseline, strict = (
        count_by_image([CAT, DOG], 0.45),
        count_by_image([CAT, DOG], 0.85),
    )
    assert (
        baseline.truth.tolist(),
        baseline.detected.tolist(),
        baseline.wrong.tolist(),
    ) == (
        [1, 3],
        [1, 1],
        [1, 0],
    )
    # the strict threshold drops a wrong box of the first image and a right one of the second
    assert regression_by_image(strict, baseline).tolist() == [-1, 1]
