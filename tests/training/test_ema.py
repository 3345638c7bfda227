from __future__ import annotations

import pytest
import torch
from torch import nn

from coin_ray.training.ema import ema_update


def _network(weight: float, count: int) -> nn.Module:
    norm = nn.BatchNorm1d(2)
    nn.init.constant_(norm.weight, weight)
    norm.running_mean.fill_(weight)  # type: ignore[union-attr]
    norm.num_batches_tracked.fill_(count)  # type: ignore[union-attr]
    return norm


@pytest.mark.parametrize(("rate", "expected"), [(0.0, 1.0), (0.25, 2.0), (1.0, 5.0)])
def test_the_whole_state_is_updated(rate: float, expected: float) -> None:
    teacher, student = _network(1.0, 3), _network(5.0, 8)
    ema_update(teacher, student, rate)
    state = teacher.state_dict()
    assert state["weight"].tolist() == [expected, expected]
    assert state["running_mean"].tolist() == [expected, expected]
    assert int(state["num_batches_tracked"]) == 8
    assert student.state_dict()["weight"].tolist() == [5.0, 5.0]


def test_no_graph() -> None:
    teacher, student = _network(1.0, 0), _network(2.0, 0)
    ema_update(teacher, student, 0.5)
    assert all(p.is_leaf for p in teacher.parameters())
    assert torch.equal(teacher.state_dict()["weight"], torch.full((2,), 1.5))
