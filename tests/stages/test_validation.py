"""Looks at a training's states: which ones, that all are measured in order, and that
neither a kill nor a failing look costs more than itself."""

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
from coin_ray.stages.common.validation import VALIDATION_CURVE_FILE, CheckpointValidation, validate_during_training


def looks_of(folder: Path, every: int = 10, saved: int = 5, steps: int = 40) -> CheckpointValidation:
    optimize = TrainingConfig(
        steps=steps,
        validate_every=every,
        checkpoint_every=saved,
        warmup=0,
        milestones=(),
        factors=(),
    )
    return CheckpointValidation(demo(), "images", str(folder), "student", "student", optimize)


def state(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "task": {
            "student": {"w": torch.tensor(float(step))},
            "teacher": {"w": torch.tensor(-1.0)},
        },
    }


def trained(wanted: CheckpointValidation, *steps: int) -> None:
    for step in steps:
        wanted.leave(step, state(step))


def trained_until_killed(wanted: CheckpointValidation) -> None:
    with validate_during_training(wanted):
        trained(wanted, 10)
        while wanted.waiting():
            time.sleep(0.01)
        trained(wanted, 20)
        raise KeyboardInterrupt


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Looks without Ray, whose mAP50 is a hundredth of the weights' step."""
    seen: list[int] = []

    def map50(config: object, images: str, name: str, weights: str) -> float:
        assert (images, name) == ("images", "student")
        seen.append(int(load_weights(weights)["w"]))
        return seen[-1] / 100

    monkeypatch.setattr(validation, "validation_map50", map50)
    monkeypatch.setattr(validation, "_look", CheckpointValidation.look)
    monkeypatch.setattr(validation, "POLL", 0.01)
    return seen


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 200))
def test_a_look_at_the_first_state_from_each_multiple_on_and_at_the_last(
    every: int, saved: int, steps: int
) -> None:
    left: list[int] = []
    wanted = looks_of(Path("nowhere"), every, saved, steps)
    states = [*range(saved, steps, saved), steps]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            validation, "save_weights", lambda uri, _: left.append(int(Path(uri).stem))
        )
        trained(wanted, *states)
    due = {
        next(s for s in states if s >= multiple)
        for multiple in range(every, steps + 1, every)
    } | {steps}
    assert left == sorted(due)


def test_all_that_is_left_is_measured_in_order_and_only_the_curve_stays(
    tmp_path: Path, measured: list[int]
) -> None:
    wanted = looks_of(tmp_path)
    with validate_during_training(wanted):
        trained(wanted, 5, 10, 15, 20, 25, 30, 35, 40)
    assert measured == [10, 20, 30, 40]
    assert storage.read_json(str(tmp_path / VALIDATION_CURVE_FILE)) == [
        {"step": s, "validation_map50": s / 100} for s in measured
    ]
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [VALIDATION_CURVE_FILE]


def test_a_killed_run_goes_on_with_what_is_still_to_be_measured(
    tmp_path: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, look = looks_of(tmp_path), validation._look

    def killed_at_20(wanted: CheckpointValidation, weights: str) -> None:
        if not weights.endswith("020.pt"):
            look(wanted, weights)

    monkeypatch.setattr(validation, "_look", killed_at_20)
    with pytest.raises(KeyboardInterrupt):
        trained_until_killed(wanted)
    assert not (tmp_path / VALIDATION_CURVE_FILE).exists()
    monkeypatch.setattr(validation, "_look", look)
    with validate_during_training(wanted):
        while wanted.waiting():
            time.sleep(0.01)
        trained(wanted, 10, 20, 30, 40)  # anew from before 10 on, with the same weights
    assert measured == [10, 20, 30, 40]
    assert [point["step"] for point in storage.read_json(str(tmp_path / VALIDATION_CURVE_FILE))] == [
        10,
        20,
        30,
        40,
    ]


def test_a_look_that_fails_is_told_and_costs_its_point_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = looks_of(tmp_path)

    class Remote:
        def remote(self, wanted: CheckpointValidation, weights: str) -> str:
            return weights

    def get(weights: str) -> None:
        if weights.endswith("010.pt"):
            raise RuntimeError("CUDA out of memory")
        wanted.look(weights)

    def asked(**resources: object) -> Callable[[object], Remote]:
        assert resources == {"num_cpus": 1, "num_gpus": 0, "max_retries": 3}
        return lambda _: Remote()

    monkeypatch.setattr(validation, "ensure_ray", lambda: None)
    monkeypatch.setattr(validation.ray, "remote", asked)
    monkeypatch.setattr(validation.ray, "get", get)
    monkeypatch.setattr(validation, "validation_map50", lambda *_: 0.5)
    with validate_during_training(wanted):
        trained(wanted, 10, 40)
    assert storage.read_json(str(tmp_path / VALIDATION_CURVE_FILE)) == [
        {"step": 40, "validation_map50": 0.5}
    ]
    told = capsys.readouterr().out
    assert "RuntimeError: CUDA out of memory" in told
    assert "validation after 40 steps: mAP50 50.0" in told


def test_without_the_option_or_without_labels_nothing_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    optimize = looks_of(tmp_path).optimize
    with validate_during_training(
        validation.plan_validation(
            demo(),
            "images",
            str(tmp_path),
            "student",
            "student",
            replace(optimize, validate_every=0),
        )
    ):
        pass
    monkeypatch.setattr(validation, "validation_truth", lambda _: {})
    assert (
        validation.plan_validation(
            demo(), "images", str(tmp_path), "student", "student", optimize
        )
        is None
    )
    assert "no validation image is labelled" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_negative_number_of_steps_is_refused() -> None:
    with pytest.raises(ConfigError, match="validate_every"):
        TrainingConfig(validate_every=-1)
