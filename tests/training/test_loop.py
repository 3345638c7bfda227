from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import (
    detr_distillation,
    distillation,
    examples,
    propagation,
    tiny_config,
    tiny_fit,
)
from torch import Tensor

from coin_ray.data.examples import Batch
from coin_ray.errors import TrainingError
from coin_ray.training.loop import TrainingTask, run_training_loop


class Killed(Exception):
    pass


class MemoryHost:
    """Keeps the last checkpoint as a file would: a copy. Dies after ``until`` reports
    that hold one."""

    def __init__(self, state: dict[str, Any] | None = None, until: int = 99) -> None:
        self.state, self.left = state, until
        self.reports: list[tuple[int, dict[str, float], bool]] = []

    def resume(self) -> dict[str, Any] | None:
        return copy.deepcopy(self.state)

    def report(
        self, step: int, metrics: Mapping[str, float], checkpoint: dict[str, Any] | None
    ) -> None:
        self.reports.append((step, dict(metrics), checkpoint is not None))
        if checkpoint is not None:
            self.state = copy.deepcopy(checkpoint)
            self.left -= 1
            if not self.left:
                raise Killed


FIT = tiny_fit(steps=6, checkpoint_every=3)


def train(task: TrainingTask, folder: Path, host: MemoryHost) -> list[dict[str, float]]:
    return run_training_loop(task, examples(folder), FIT, tiny_config(), seed=5, host=host)


def assert_same(a: Any, b: Any, place: str = "") -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b), place
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), place
        for key in a:
            assert_same(a[key], b[key], f"{place}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), place
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{place}.{number}")
    else:
        assert a == b, place


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: propagation(FIT), id="propagation"),
        pytest.param(
            lambda: distillation(FIT, burn_up=1),
            id="distillation, killed after the burn-up",
        ),
        pytest.param(
            lambda: distillation(FIT, burn_up=4),
            id="distillation, killed before the burn-up",
        ),
        pytest.param(
            lambda: detr_distillation(FIT, burn_up=1), id="distillation of a Co-DETR"
        ),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(
    make: Callable[[], TrainingTask], tmp_path: Path
) -> None:
    whole, killed = MemoryHost(), MemoryHost(until=1)
    curve = train(make(), tmp_path, whole)
    with pytest.raises(Killed):
        train(make(), tmp_path, killed)
    assert killed.state is not None
    assert killed.state["step"] == 3
    resumed = MemoryHost(killed.state)
    assert train(make(), tmp_path, resumed) == curve
    assert_same(resumed.state, whole.state)


class Scripted:
    """A task whose losses are given, step by step."""

    def __init__(self, *bad: int) -> None:
        self.bad, self.steps = bad, list[int]()

    def train_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        self.steps.append(step)
        return {
            "boxes": torch.tensor(float("nan") if step in self.bad else 0.5),
            "alignment": torch.tensor(1.0),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"steps": list(self.steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


@pytest.mark.parametrize("bad", [0, 5])
def test_a_loss_that_is_not_finite_is_named(bad: int, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=rf"loss boxes is not finite at step {bad}"):
        train(Scripted(bad), tmp_path, MemoryHost())


def test_a_broken_state_is_never_saved(tmp_path: Path) -> None:
    """Step 2 is a checkpoint's, but not one of those whose losses are logged."""
    host = MemoryHost()
    with pytest.raises(TrainingError, match="loss boxes is not finite at step 2"):
        train(Scripted(2), tmp_path, host)
    assert host.state is None


def test_reports_and_curve(tmp_path: Path) -> None:
    host = MemoryHost()
    curve = train(Scripted(), tmp_path, host)
    assert [(step, saved) for step, _, saved in host.reports] == [
        (0, False),
        (2, True),
        (5, True),
    ]
    assert [point["step"] for point in curve] == [0, 5]
    assert curve[0] == {"step": 0.0, "boxes": 0.5, "alignment": 1.0}


def test_a_finished_run_returns_its_curve_at_once(tmp_path: Path) -> None:
    host = MemoryHost()
    curve = train(Scripted(), tmp_path, host)
    again = Scripted()
    assert train(again, tmp_path, MemoryHost(host.state)) == curve
    assert again.steps == [0, 1, 2, 3, 4, 5]


def test_nothing_to_train_on() -> None:
    with pytest.raises(TrainingError, match="nothing to train on"):
        run_training_loop(Scripted(), [], FIT, tiny_config(), seed=0, host=MemoryHost())
