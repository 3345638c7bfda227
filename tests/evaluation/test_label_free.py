"""Students of known quality, made by spoiling perfect ones, judged without labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import detections
from scipy.stats import spearmanr

from coin_ray.evaluation.label_free import (
    CONFIDENT_SCORE,
    confident_detections,
    label_free_score,
    miscalibration,
)
from coin_ray.evaluation.voc import average_precision
from coin_ray.structures import Detections
from coin_ray.tables import Truth

CLASSES, IMAGES = 3, 60
QUALITIES = (1.0, 0.85, 0.7, 0.5, 0.3, 0.1)
PLACES = [(10.0 + 60 * n, 10.0, 50.0 + 60 * n, 60.0) for n in range(4)]


def _simulate_teachers(seed: int = 0) -> tuple[dict[str, Truth], dict[str, Truth]]:
    """Truth, and what two teachers together make of it: they are sure of three of four
    objects, now and then wrongly, of one they are not."""
    draw = np.random.default_rng(seed)
    truth, expected = {}, {}
    for number in range(IMAGES):
        labels = draw.integers(0, CLASSES, len(PLACES))
        truth[str(number)] = Truth(
            torch.tensor(PLACES),
            torch.tensor(labels),
            torch.zeros(len(PLACES), dtype=torch.bool),
        )
        teacher_labels = [
            int(label) if draw.random() < 0.9 else int(draw.integers(CLASSES))
            for label in labels
        ]
        scores = [
            *draw.uniform(CONFIDENT_SCORE, 1, 3),
            draw.uniform(0, CONFIDENT_SCORE),
        ]
        rows = [
            (box, label, float(score))
            for box, label, score in zip(PLACES, teacher_labels, scores, strict=True)
        ]
        expected[str(number)] = confident_detections(detections(*rows, classes=CLASSES))
    return truth, expected


def _simulate_student(
    truth: dict[str, Truth], quality: float, seed: int = 1
) -> dict[str, Detections]:
    """Finds and names rightly a ``quality`` of the objects, and is as sure as that;
    else a wrong name or nothing, and boxes of nothing."""
    draw = np.random.default_rng(seed)
    predictions = {}
    for image, annotated in truth.items():
        rows = []
        for box, label in zip(PLACES, annotated.labels.tolist(), strict=True):
            if draw.random() < quality:
                rows.append((box, label, float(draw.uniform(0.7, 1.0))))
            elif draw.random() < 0.5:
                rows.append(
                    (box, int((label + 1) % CLASSES), float(draw.uniform(0.3, 0.9)))
                )
        if draw.random() > quality:
            rows.append(
                (
                    (100.0, 120.0, 150.0, 170.0),
                    int(draw.integers(CLASSES)),
                    float(draw.uniform(0.3, 0.9)),
                )
            )
        predictions[image] = detections(*rows, classes=CLASSES)
    return predictions


@pytest.mark.parametrize("seed", range(5))
def test_students_are_ranked_as_by_the_truth(seed: int) -> None:
    truth, expected = _simulate_teachers(seed)
    scores, mean_aps = [], []
    for quality in QUALITIES:
        predictions = _simulate_student(truth, quality, seed + 1)
        scores.append(
            label_free_score(
                predictions,
                _simulate_student(truth, quality, seed + 100),
                expected,
                CLASSES,
            )["score"]
        )
        mean_aps.append(average_precision(predictions, truth, CLASSES).map)
    assert spearmanr(scores, mean_aps).statistic == pytest.approx(1.0)
    assert all(0 <= score <= 1 for score in scores)


def test_uncertain_boxes_are_neither_required_nor_wrong_under_their_label() -> None:
    """Under another name it is wrong."""
    expected = {
        "a": confident_detections(
            detections(
                (PLACES[1], 1, CONFIDENT_SCORE - 0.01), (PLACES[0], 0, CONFIDENT_SCORE)
            )
        )
    }
    right = (PLACES[0], 0, 0.8)
    alone, with_it, renamed = (
        label_free_score({"a": detections(right, *extra_boxes)}, {}, expected, CLASSES)
        for extra_boxes in ((), ((PLACES[1], 1, 0.9),), ((PLACES[1], 0, 0.9),))
    )
    assert with_it == alone
    assert alone["agreement"] == 1
    assert alone["miscalibration"] == pytest.approx(0.2)
    assert renamed["agreement"] == pytest.approx(0.5)
    assert renamed["miscalibration"] > 0.2


def test_a_student_that_differs_from_its_teacher_is_worth_less() -> None:
    truth, expected = _simulate_teachers()
    predictions = _simulate_student(truth, 0.8)
    same, other = (
        label_free_score(predictions, teacher, expected, CLASSES)
        for teacher in (predictions, _simulate_student(truth, 0.2, seed=9))
    )
    assert same["disagreement"] < 0.05 < other["disagreement"]
    assert same["agreement"] == other["agreement"]
    assert same["score"] > other["score"]


@pytest.mark.parametrize(
    ("score", "share", "error"), [(0.75, 0.75, 0.0), (0.95, 0.5, 0.45), (0.1, 0.5, 0.4)]
)
def test_miscalibration_is_the_gap_between_score_and_share_confirmed(
    score: float, share: float, error: float
) -> None:
    truth = {
        str(n): Truth(
            torch.tensor(PLACES[:1]), torch.tensor([0]), torch.tensor([False])
        )
        for n in range(8)
    }
    predictions = {
        str(n): detections((PLACES[0] if n < 8 * share else PLACES[2], 0, score))
        for n in range(8)
    }
    assert miscalibration(predictions, truth) == pytest.approx(error, abs=1e-6)


def test_a_student_that_detects_nothing_is_the_worst() -> None:
    truth, expected = _simulate_teachers()
    empty = {image: Detections.empty(CLASSES) for image in truth}
    worst = min(
        label_free_score(
            _simulate_student(truth, q),
            _simulate_student(truth, q, 7),
            expected,
            CLASSES,
        )["score"]
        for q in QUALITIES
    )
    assert label_free_score(empty, empty, expected, CLASSES)["score"] < worst
