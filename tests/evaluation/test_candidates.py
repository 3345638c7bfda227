"""Trained students are judged by the boxes on which both teachers agree."""

from __future__ import annotations

import pytest
import torch

from coin_ray.evaluation.candidates import agreed_boxes, agreement_score
from coin_ray.structures import Detections

LEFT, MIDDLE, RIGHT = [0.0, 0, 10, 10], [20.0, 0, 30, 10], [40.0, 0, 50, 10]
ROWS = [
    {
        "image_id": "agreed",
        "boxes": [LEFT, MIDDLE, RIGHT],
        "kind": ["consistent", "inconsistent", "private"],
        "cloud_labels": [0, 0, 1],
    },
    {
        "image_id": "disputed",
        "boxes": [LEFT],
        "kind": ["inconsistent"],
        "cloud_labels": [0],
    },
    {
        "image_id": "person",
        "boxes": [LEFT],
        "kind": ["reviewed"],
        "cloud_labels": [1],
    },
]


def _make_detections(*rows: tuple[list[float], int, float]) -> Detections:
    boxes = torch.tensor([box for box, _, _ in rows]).reshape(-1, 4)
    labels = torch.tensor([label for _, label, _ in rows], dtype=torch.int64)
    scores = torch.tensor([score for _, _, score in rows])
    probs = torch.zeros(len(rows), 3)
    probs[torch.arange(len(rows)), labels] = scores
    probs[:, 2] = 1 - scores
    return Detections(boxes, scores, labels, probs)


def test_only_agreed_boxes_are_required() -> None:
    agreed = agreed_boxes(ROWS)
    assert list(agreed) == ["agreed", "person"]
    assert agreed["agreed"].difficult.tolist() == [False, True, True]
    assert agreed["person"].difficult.tolist() == [False]


def test_disputed_boxes_are_neither_right_nor_wrong() -> None:
    agreed = agreed_boxes(ROWS)
    person = _make_detections((LEFT, 1, 0.9))
    exact = {"agreed": _make_detections((LEFT, 0, 0.8)), "person": person}
    with_disputed = {
        "agreed": _make_detections((MIDDLE, 0, 0.9), (LEFT, 0, 0.8)),
        "person": person,
    }
    with_wrong = {
        "agreed": _make_detections(([60.0, 0, 70, 10], 0, 0.9), (LEFT, 0, 0.8)),
        "person": person,
    }
    assert agreement_score(exact, agreed, 2) == 1
    assert agreement_score(with_disputed, agreed, 2) == 1
    assert agreement_score(with_wrong, agreed, 2) == pytest.approx(0.75)


def test_without_agreed_boxes_every_student_scores_0() -> None:
    assert agreement_score({"agreed": _make_detections((LEFT, 0, 0.8))}, {}, 2) == 0
