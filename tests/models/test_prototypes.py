from __future__ import annotations

import pytest
import torch

from coin_ray.models.prototypes import Prototypes

START = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])


def test_moves_towards_the_mean_of_each_class_present() -> None:
    prototypes = Prototypes(START)
    features = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, -1.0]])
    prototypes.update(features, torch.tensor([0, 0, 2]), 0.25)
    expected = torch.tensor([[0.75 + 0.125, 0.125], [0.0, 1.0], [0.45, 0.6 - 0.25]])
    torch.testing.assert_close(prototypes.values, expected)


def test_absent_classes_and_no_rows_change_nothing() -> None:
    prototypes = Prototypes(START)
    prototypes.update(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), 0.5)
    assert torch.equal(prototypes.values, START)


@pytest.mark.parametrize(("rate", "expected"), [(0.0, [1.0, 0.0]), (1.0, [0.0, 1.0])])
def test_rates(rate: float, expected: list[float]) -> None:
    prototypes = Prototypes(START)
    prototypes.update(torch.tensor([[0.0, 1.0]]), torch.tensor([0]), rate)
    assert prototypes.values[0].tolist() == expected


def test_normalised_only_when_used() -> None:
    prototypes = Prototypes(START * 3)
    torch.testing.assert_close(prototypes.normalised(), START)
    torch.testing.assert_close(prototypes.values, START * 3)


def test_the_start_is_a_copy() -> None:
    start = START.clone()
    prototypes = Prototypes(start)
    prototypes.update(torch.tensor([[0.0, 1.0]]), torch.tensor([0]), 0.5)
    assert start.tolist() == START.tolist()
