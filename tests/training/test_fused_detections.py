"""Detections of several detectors fused into one set."""

from __future__ import annotations

import pytest
import torch

from coin_ray.structures import Detections
from coin_ray.training.fused_detections import (
    class_scores,
    detections_from_scores,
    fuse_detections,
)

BOX = [10.0, 10.0, 50.0, 50.0]


def _detect(*rows: tuple[list[float], list[float]]) -> Detections:
    boxes = torch.tensor([box for box, _ in rows]).reshape(-1, 4)
    return detections_from_scores(boxes, torch.tensor([scores for _, scores in rows]))


def test_objects_that_both_detect_rank_above_those_of_one() -> None:
    first = _detect((BOX, [0.6, 0.1]), ([100.0, 100.0, 140.0, 140.0], [0.0, 0.7]))
    second = _detect(([12.0, 10.0, 52.0, 50.0], [0.6, 0.2]))
    fused = fuse_detections([first, second], [1.0, 1.0])
    assert fused.labels.tolist() == [0, 1]
    assert fused.scores.tolist() == pytest.approx([0.6, 0.35])
    assert fused.boxes[0].tolist() == pytest.approx([11.0, 10.0, 51.0, 50.0])
    assert fused.probs[1].tolist() == pytest.approx([0.0, 0.35, 0.65])


def test_weights_count() -> None:
    first, second = _detect((BOX, [0.8, 0.0])), _detect((BOX, [0.0, 0.8]))
    fused = fuse_detections([first, second], [3.0, 1.0])
    assert fused.probs[0].tolist() == pytest.approx([0.6, 0.2, 0.2])


def test_class_scores_keep_the_ratios_of_probabilities() -> None:
    detections = Detections(
        torch.tensor([BOX]),
        torch.tensor([0.5]),
        torch.tensor([1]),
        torch.tensor([[0.2, 0.4, 0.4]]),
    )
    assert class_scores(detections).tolist() == [pytest.approx([0.25, 0.5])]


def test_nothing_to_fuse() -> None:
    nothing = Detections.empty(3)
    assert len(fuse_detections([nothing, nothing], [1.0, 1.0])) == 0
    fused = fuse_detections([nothing], [1.0])
    assert fused.num_classes == 3
    with pytest.raises(ValueError, match="at least one detector"):
        fuse_detections([], [])
