from __future__ import annotations

import math

import pytest
import torch

from coin_ray.losses import distillation

LOGITS = torch.tensor([[0.0, 0.0, 0.0], [math.log(2), 0.0, 0.0]], dtype=torch.float64)
"""Softmax: thirds; a half and two quarters."""
TARGETS = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5]], dtype=torch.float64)
FIRST = 2 * 0.5 * math.log(0.5 * 3)
SECOND = 0.25 * math.log(0.5) + 0.25 * math.log(1) + 0.5 * math.log(2)


def test_divergence_is_divided_by_all_elements() -> None:
    """Logits are taken to float32."""
    assert float(distillation.divergence(LOGITS, TARGETS)) == pytest.approx(
        (FIRST + SECOND) / 6, rel=1e-5
    )
    assert float(distillation.private_regions(LOGITS, TARGETS)) == pytest.approx(
        (FIRST + SECOND) / 6, rel=1e-5
    )


def test_divergence_of_probabilities() -> None:
    loss = float(distillation.divergence_of_probabilities(LOGITS.softmax(-1), TARGETS))
    assert loss == pytest.approx((FIRST + SECOND) / 6, rel=1e-5)


def test_divergence_of_equals_is_zero() -> None:
    assert float(distillation.divergence(LOGITS, LOGITS.softmax(-1))) == pytest.approx(
        0, abs=1e-6
    )


@pytest.mark.parametrize(
    ("score_min", "expected"),
    [(0.0, (FIRST + SECOND) / 6), (0.5, (FIRST + SECOND) / 6), (0.51, 0.0)],
)
def test_only_trusted_rows_teach(score_min: float, expected: float) -> None:
    assert float(
        distillation.inconsistent_regions(LOGITS, TARGETS, score_min)
    ) == pytest.approx(expected, rel=1e-5)


def test_the_mean_is_over_trusted_rows() -> None:
    targets = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.2, 0.6]], dtype=torch.float64)
    expected = (0.2 * math.log(0.4) + 0.2 * math.log(0.8) + 0.6 * math.log(2.4)) / 3
    assert float(
        distillation.inconsistent_regions(LOGITS, targets, 0.6)
    ) == pytest.approx(expected, rel=1e-5)


def test_inconsistent_regions_may_count_as_much_as_consistent_ones() -> None:
    """Divided by the RoIs of another loss, not by the elements of the rows used."""
    assert float(
        distillation.inconsistent_regions(LOGITS, TARGETS, 0.0, count=4)
    ) == pytest.approx((FIRST + SECOND) / 4, rel=1e-5)
    none = torch.zeros(0, 3, dtype=torch.float64)
    assert float(distillation.inconsistent_regions(none, none, 0.0, count=4)) == 0


def test_private_anchors() -> None:
    """sigmoid(0) = 1/2 against .8 of foreground, sigmoid(log 3) = 3/4 against 1 (the
    cloud's vectors have no background)."""
    objectness = torch.tensor([0.0, math.log(3)], dtype=torch.float64)
    teacher = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.1, 0.0]], dtype=torch.float64)
    expected = (0.8 * math.log(1.6) + 0.2 * math.log(0.4) + math.log(4 / 3)) / 4
    assert float(distillation.private_anchors(objectness, teacher)) == pytest.approx(
        expected, rel=1e-6
    )


@pytest.mark.parametrize("classes", [1, 8, 20])
def test_means_are_over_elements_in_float64_by_the_formula(classes: int) -> None:
    """The published reduction; "batchmean" would be K + 1 times as large."""
    torch.manual_seed(0)
    logits, targets = (
        torch.randn(7, classes + 1, dtype=torch.float64),
        torch.randn(7, classes + 1, dtype=torch.float64).softmax(-1),
    )
    expected = (targets * (targets.log() - (logits.softmax(-1) + 1e-7).log())).sum() / (
        7 * (classes + 1)
    )
    for loss in (
        distillation.private_regions(logits, targets),
        distillation.inconsistent_regions(logits, targets, 0.0),
        distillation.divergence_of_probabilities(logits.softmax(-1), targets),
    ):
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_rows_may_come_in_any_order() -> None:
    order = torch.tensor([1, 0])
    assert float(
        distillation.divergence(LOGITS[order], TARGETS[order])
    ) == pytest.approx(float(distillation.divergence(LOGITS, TARGETS)))


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[100.0, -100.0, 0.0]], requires_grad=True)
    loss = distillation.divergence(logits, torch.tensor([[0.0, 1.0, 0.0]]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(-math.log(1e-7) / 3, rel=1e-4)
    assert logits.grad is not None
    assert bool(torch.isfinite(logits.grad).all())


def test_targets_carry_no_gradient() -> None:
    targets = TARGETS.clone().requires_grad_()
    logits = LOGITS.clone().requires_grad_()
    distillation.inconsistent_regions(logits, targets, 0.0).backward()
    assert targets.grad is None
    assert logits.grad is not None


def test_knowledge_of_ckg_carries_gradient() -> None:
    probabilities = LOGITS.softmax(-1).requires_grad_()
    distillation.divergence_of_probabilities(probabilities, TARGETS).backward()
    assert probabilities.grad is not None


def test_nothing_is_zero_with_a_gradient() -> None:
    logits = torch.zeros(0, 3, requires_grad=True)
    none = torch.zeros(0, 3)
    parts = [
        distillation.divergence(logits, none),
        distillation.divergence_of_probabilities(logits, none),
        distillation.inconsistent_regions(logits, none, 0.5),
        distillation.private_anchors(logits[:, 0], none),
    ]
    torch.stack(parts).sum().backward()
    assert [float(p.detach()) for p in parts] == [0, 0, 0, 0]
