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


class _Killed(Exception):
    pass


class _MemoryHost:
    """Keeps a copy of the last checkpoint, as a file would. Dies after ``until`` reports
    with a checkpoint."""

    def __init__(self, state: dict[str, Any] | None = None, until: int = 99) -> None:
        self.state = state
        self.remaining = until
        self.reports: list[tuple[int, dict[str, float], bool]] = []

    def resume(self) -> dict[str, Any] | None:
        return copy.deepcopy(self.state)

    def report(
        self, step: int, metrics: Mapping[str, float], checkpoint: dict[str, Any] | None
    ) -> None:
        self.reports.append((step, dict(metrics), checkpoint is not None))
        if checkpoint is not None:
            self.state = copy.deepcopy(checkpoint)
            self.remaining -= 1
            if not self.remaining:
                raise _Killed


FIT = tiny_fit(steps=6, checkpoint_every=3)


def _train(
    task: TrainingTask, folder: Path, host: _MemoryHost
) -> list[dict[str, float]]:
    return run_training_loop(
        task, examples(folder), FIT, tiny_config(), seed=5, host=host
    )


def _assert_same(actual: Any, expected: Any, path: str = "") -> None:
    if isinstance(actual, Tensor):
        assert torch.equal(actual, expected), path
    elif isinstance(actual, dict):
        assert actual.keys() == expected.keys(), path
        for key in actual:
            _assert_same(actual[key], expected[key], f"{path}.{key}")
    elif isinstance(actual, (list, tuple)):
        assert len(actual) == len(expected), path
        for number, (actual_item, expected_item) in enumerate(
            zip(actual, expected, strict=True)
        ):
            _assert_same(actual_item, expected_item, f"{path}.{number}")
    else:
        assert actual == expected, path


@pytest.mark.parametrize(
    "make_task",
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
    make_task: Callable[[], TrainingTask], tmp_path: Path
) -> None:
    uninterrupted, killed = _MemoryHost(), _MemoryHost(until=1)
    curve = _train(make_task(), tmp_path, uninterrupted)
    with pytest.raises(_Killed):
        _train(make_task(), tmp_path, killed)
    assert killed.state is not None
    assert killed.state["step"] == 3
    resumed = _MemoryHost(killed.state)
    assert _train(make_task(), tmp_path, resumed) == curve
    _assert_same(resumed.state, uninterrupted.state)


class _Scripted:
    """A task with constant losses, except NaN at ``broken_steps``."""

    def __init__(self, *broken_steps: int) -> None:
        self.broken_steps = broken_steps
        self.steps: list[int] = []

    def train_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        self.steps.append(step)
        return {
            "boxes": torch.tensor(float("nan") if step in self.broken_steps else 0.5),
            "alignment": torch.tensor(1.0),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"steps": list(self.steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


@pytest.mark.parametrize("bad", [0, 5])
def test_a_loss_that_is_not_finite_is_named(bad: int, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=rf"loss boxes is not finite at step {bad}"):
        _train(_Scripted(bad), tmp_path, _MemoryHost())


def test_a_broken_checkpoint_is_never_saved(tmp_path: Path) -> None:
    """Step 2 saves a checkpoint, but its losses are not logged."""
    host = _MemoryHost()
    with pytest.raises(TrainingError, match="loss boxes is not finite at step 2"):
        _train(_Scripted(2), tmp_path, host)
    assert host.state is None


def test_reports_and_curve(tmp_path: Path) -> None:
    host = _MemoryHost()
    curve = _train(_Scripted(), tmp_path, host)
    assert [(step, saved) for step, _, saved in host.reports] == [
        (0, False),
        (2, True),
        (5, True),
    ]
    assert [point["step"] for point in curve] == [0, 5]
    assert curve[0] == {"step": 0.0, "boxes": 0.5, "alignment": 1.0}


def test_a_finished_run_returns_its_curve_at_once(tmp_path: Path) -> None:
    host = _MemoryHost()
    curve = _train(_Scripted(), tmp_path, host)
    task = _Scripted()
    assert _train(task, tmp_path, _MemoryHost(host.state)) == curve
    assert task.steps == [0, 1, 2, 3, 4, 5]


def test_nothing_to_train_on() -> None:
    with pytest.raises(TrainingError, match="nothing to train on"):
        run_training_loop(
            _Scripted(), [], FIT, tiny_config(), seed=0, host=_MemoryHost()
        )
