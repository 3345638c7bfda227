from __future__ import annotations

import math

import pytest
import torch

from coin_ray.evaluation.fusion_baselines import (
    expand_to_all_classes,
    pseudo_label_quality,
    relabel_with_clip,
    static_fusion,
)
from coin_ray.structures import Detections
from coin_ray.tables import Truth

BOXES = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])


def _cloud(probs: list[list[float]], scores: list[float]) -> Detections:
    vectors = torch.tensor(probs)
    return Detections(
        BOXES[: len(probs)], torch.tensor(scores), vectors[:, :-1].argmax(1), vectors
    )


def test_relabel_with_clip_takes_the_best_foreground_class() -> None:
    fused = relabel_with_clip(
        _cloud([[0.6, 0.2, 0.2], [0.5, 0.5, 0.0]], [0.8, 0.5]),
        torch.tensor([[0.1, 0.7, 0.2], [0.3, 0.1, 0.6]]),
    )
    # background won the second box; its best foreground class is kept
    assert fused.labels.tolist() == [1, 0]
    assert fused.scores.tolist() == pytest.approx([0.8 * 0.7, 0.5 * 0.3])
    assert torch.equal(fused.boxes, BOXES)


def test_static_fusion_with_background_mass() -> None:
    # foreground-conditional: cloud (.75, .25), CLIP (.2, .8); mean (.475, .525);
    # objectness 1 - .2
    fused = static_fusion(
        _cloud([[0.6, 0.2, 0.2]], [0.6]), torch.tensor([[0.1, 0.4, 0.5]])
    )
    assert fused.labels.tolist() == [1]
    assert fused.scores.tolist() == pytest.approx([0.8 * 0.525])
    assert fused.probs[0].tolist() == pytest.approx([0.8 * 0.475, 0.8 * 0.525, 0.2])


def test_static_fusion_without_background_mass_takes_the_cloud_score() -> None:
    fused = static_fusion(
        _cloud([[0.9, 0.1, 0.0]], [0.4]), torch.tensor([[0.5, 0.5, 0.0]])
    )
    assert fused.scores.tolist() == pytest.approx([0.4 * 0.7])
    assert fused.probs[0].tolist() == pytest.approx([0.28, 0.12, 0.6])


def test_static_fusion_where_clip_sees_only_background() -> None:
    fused = static_fusion(
        _cloud([[0.8, 0.0, 0.2]], [0.8]), torch.tensor([[0.0, 0.0, 1.0]])
    )
    assert fused.probs[0].tolist() == pytest.approx([0.8 * 0.75, 0.8 * 0.25, 0.2])


def test_probs_are_distributions_whatever_comes_in() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        cloud_probs, clip_probs = (
            torch.rand(2, 5, generator=generator).pow(8).softmax(1) for _ in range(2)
        )
        fused = static_fusion(_cloud(cloud_probs.tolist(), [0.3, 0.9]), clip_probs)
        assert fused.probs.sum(1).tolist() == pytest.approx([1, 1])
        assert ((fused.scores >= 0) & (fused.scores <= 1)).all()
        assert torch.equal(fused.probs[:, :-1].argmax(1), fused.labels)


def test_empty_and_wrong_shapes() -> None:
    none = Detections.empty(3)
    assert (
        len(static_fusion(none, torch.zeros(0, 4)))
        == len(relabel_with_clip(none, torch.zeros(0, 4)))
        == 0
    )
    with pytest.raises(ValueError, match="shape"):
        relabel_with_clip(none, torch.zeros(2, 4))


def test_pseudo_label_quality() -> None:
    truth = {
        "a": Truth(BOXES, torch.tensor([0, 1]), torch.tensor([False, False])),
        "b": Truth(BOXES, torch.tensor([0, 1]), torch.tensor([False, True])),
        "unlabelled": Truth(BOXES[:1], torch.tensor([0]), torch.tensor([False])),
    }
    off = torch.tensor([[50.0, 50, 60, 60]])
    labels = {
        # right, misnamed, right again, nowhere
        "a": (torch.cat([BOXES, BOXES[:1], off]), torch.tensor([0, 0, 0, 1])),
        "b": (BOXES, torch.tensor([1, 0])),  # misnamed, on difficult
    }
    quality = pseudo_label_quality(labels, truth)
    assert (
        quality.boxes,
        quality.localised,
        quality.correct,
        quality.covered,
        quality.truth,
    ) == (5, 4, 2, 1, 4)
    assert quality.precision == pytest.approx(2 / 5)
    assert quality.recall == pytest.approx(1 / 4)
    assert quality.label_accuracy == pytest.approx(2 / 4)


def test_quality_of_nothing_is_nan() -> None:
    quality = pseudo_label_quality({}, {})
    assert all(
        math.isnan(share)
        for share in (quality.precision, quality.recall, quality.label_accuracy)
    )


def test_expand_to_all_classes_reports_each_label_a_box_may_have() -> None:
    probs = torch.tensor([[0.6, 0.3, 0.0, 0.1]])
    expanded = expand_to_all_classes(
        Detections(
            torch.tensor([[0.0, 0.0, 4.0, 4.0]]),
            torch.tensor([0.8]),
            torch.tensor([0]),
            probs,
        )
    )
    assert expanded.labels.tolist() == [0, 1]
    assert expanded.scores.tolist() == pytest.approx([0.8, 0.4])
    assert torch.equal(expanded.boxes, torch.tensor([[0.0, 0.0, 4.0, 4.0]] * 2))
    assert len(expand_to_all_classes(Detections.empty(3))) == 0
