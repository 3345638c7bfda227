"""Validation of a training's checkpoints: which ones, that all are measured in order, and
that neither a kill nor a failing measurement costs more than itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coin_ray import storage
from coin_ray.config import TrainingConfig
from coin_ray.config.presets import demo
from coin_ray.errors import ConfigError
from coin_ray.stages.common import validation
from coin_ray.stages.common.training_job import load_weights
from coin_ray.stages.common.validation import (
    VALIDATION_CURVE_FILE,
    CheckpointValidation,
    plan_validation,
    validate_during_training,
)


def _training(every: int = 10, saved: int = 5, steps: int = 40) -> TrainingConfig:
    return TrainingConfig(
        steps=steps,
        validate_every=every,
        checkpoint_every=saved,
        warmup=0,
        milestones=(),
        factors=(),
    )


def _validation(folder: Path, *training: int) -> CheckpointValidation:
    return CheckpointValidation(
        demo(), "images", str(folder), "student", "student", _training(*training)
    )


def _plan(folder: Path, training: TrainingConfig) -> CheckpointValidation | None:
    return plan_validation(
        demo(), "images", str(folder), "student", "student", training
    )


def _checkpoint(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "task": {
            "student": {"w": torch.tensor(float(step))},
            "teacher": {"w": torch.tensor(-1.0)},
        },
    }


def _train(planned: CheckpointValidation, *steps: int) -> None:
    for step in steps:
        planned.save_due_weights(step, _checkpoint(step))


def _train_until_killed(planned: CheckpointValidation) -> None:
    with validate_during_training(planned):
        _train(planned, 10)
        while planned.list_pending():
            time.sleep(0.01)
        _train(planned, 20)
        raise KeyboardInterrupt


@pytest.fixture
def measured_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps measured without Ray; the mAP50 is a hundredth of the weights' step."""
    steps: list[int] = []

    def map50(config: object, images: str, name: str, weights: str) -> float:
        assert (images, name) == ("images", "student")
        steps.append(int(load_weights(weights)["w"]))
        return steps[-1] / 100

    monkeypatch.setattr(validation, "measure_validation_map50", map50)
    monkeypatch.setattr(validation, "_measure_in_task", CheckpointValidation.measure)
    monkeypatch.setattr(validation, "POLL_SECONDS", 0.01)
    return steps


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 200))
def test_the_first_checkpoint_from_each_multiple_on_and_the_last_are_measured(
    every: int, saved: int, steps: int
) -> None:
    saved_steps: list[int] = []
    planned = _validation(Path("nowhere"), every, saved, steps)
    checkpoint_steps = [*range(saved, steps, saved), steps]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            validation,
            "save_weights",
            lambda uri, _: saved_steps.append(int(Path(uri).stem)),
        )
        _train(planned, *checkpoint_steps)
    due = {
        next(step for step in checkpoint_steps if step >= multiple)
        for multiple in range(every, steps + 1, every)
    } | {steps}
    assert saved_steps == sorted(due)


def test_all_saved_weights_are_measured_in_order_and_only_the_curve_stays(
    tmp_path: Path, measured_steps: list[int]
) -> None:
    planned = _validation(tmp_path)
    with validate_during_training(planned):
        _train(planned, 5, 10, 15, 20, 25, 30, 35, 40)
    assert measured_steps == [10, 20, 30, 40]
    curve = storage.read_json(str(tmp_path / VALIDATION_CURVE_FILE))
    assert curve == [
        {"step": step, "validation_map50": step / 100} for step in measured_steps
    ]
    files = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert files == [VALIDATION_CURVE_FILE]


def test_a_killed_run_goes_on_with_what_is_still_to_be_measured(
    tmp_path: Path, measured_steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned, measure = _validation(tmp_path), validation._measure_in_task

    def killed_at_20(planned: CheckpointValidation, weights: str) -> None:
        if not weights.endswith("020.pt"):
            measure(planned, weights)

    monkeypatch.setattr(validation, "_measure_in_task", killed_at_20)
    with pytest.raises(KeyboardInterrupt):
        _train_until_killed(planned)
    curve_file = tmp_path / VALIDATION_CURVE_FILE
    assert not curve_file.exists()
    monkeypatch.setattr(validation, "_measure_in_task", measure)
    with validate_during_training(planned):
        while planned.list_pending():
            time.sleep(0.01)
        # resumed before step 10, with the same weights
        _train(planned, 10, 20, 30, 40)
    assert measured_steps == [10, 20, 30, 40]
    curve = storage.read_json(str(curve_file))
    assert [point["step"] for point in curve] == [10, 20, 30, 40]


def test_a_measurement_that_fails_is_reported_and_costs_its_point_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = _validation(tmp_path)

    class RemoteFunction:
        def remote(self, planned: CheckpointValidation, weights: str) -> str:
            return weights

    def get(weights: str) -> None:
        if weights.endswith("010.pt"):
            raise RuntimeError("CUDA out of memory")
        planned.measure(weights)

    def remote(**resources: object) -> Callable[[object], RemoteFunction]:
        assert resources == {"num_cpus": 1, "num_gpus": 0, "max_retries": 3}
        return lambda _: RemoteFunction()

    monkeypatch.setattr(validation, "ensure_ray", lambda: None)
    monkeypatch.setattr(validation.ray, "remote", remote)
    monkeypatch.setattr(validation.ray, "get", get)
    monkeypatch.setattr(validation, "measure_validation_map50", lambda *_: 0.5)
    with validate_during_training(planned):
        _train(planned, 10, 40)
    curve = storage.read_json(str(tmp_path / VALIDATION_CURVE_FILE))
    assert curve == [{"step": 40, "validation_map50": 0.5}]
    printed = capsys.readouterr().out
    assert "RuntimeError: CUDA out of memory" in printed
    assert "validation after 40 steps: mAP50 50.0" in printed


def test_without_the_option_or_without_labels_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_option = replace(_training(), validate_every=0)
    with validate_during_training(_plan(tmp_path, without_option)):
        pass
    monkeypatch.setattr(validation, "read_validation_annotations", lambda _: {})
    assert _plan(tmp_path, _training()) is None
    assert "no validation image is labelled" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_negative_number_of_steps_is_refused() -> None:
    with pytest.raises(ConfigError, match="validate_every"):
        TrainingConfig(validate_every=-1)
