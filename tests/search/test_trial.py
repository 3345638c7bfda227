from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import distillation, examples, tiny_config, tiny_fit

from coin_ray.config import Cloud
from coin_ray.config.presets import demo
from coin_ray.errors import ConfigError, StorageUnavailable, TrainingError
from coin_ray.runs.steps import Context
from coin_ray.search import trial
from coin_ray.search.plan import HELD_OUT_SHARE, Search
from coin_ray.search.trial import FAILED_SCORE, run_trial
from coin_ray.stages.common.training_job import (
    TrainingJob,
    load_weights,
    train_on_worker,
)
from coin_ray.stages.common.training_labels import is_held_out
from coin_ray.stages.distill import export_distillation
from coin_ray.training.loop import Curve

FIT = tiny_fit(steps=9, checkpoint_every=100)


def _make_job(folder: Path) -> TrainingJob:
    folder.mkdir()
    return TrainingJob(
        "distill",
        lambda: distillation(FIT),
        export_distillation,
        examples(folder),
        FIT,
        tiny_config(),
        2,
        str(folder),
    )


def _train_and_report(
    work: TrainingJob,
    search: Search,
    report: Callable[[dict[str, Any]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(context: Context, fit: Callable[[TrainingJob], Curve]) -> dict[str, Any]:
        return {"last": fit(work)[-1]}

    monkeypatch.setattr(trial.distill, "run", run)
    context = Context(search.config, search.root, work.folder, {}, {}, "distill")
    trial._distill_with_reports(context, search, report)


def test_a_student_looked_at_on_the_way_is_the_same_student(
    make_search: Callable[..., Search], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sum_weights(search: Search, weights: dict[str, str]) -> dict[str, float]:
        assert set(weights) == {"student", "teacher"}
        return {
            "score": (
                float(sum(w.sum() for w in load_weights(weights["student"]).values()))
                + float(torch.rand(())) * 0
            )
        }

    monkeypatch.setattr(trial, "evaluate_weights", sum_weights)
    reports: list[dict[str, Any]] = []
    plain_job, reported_job = (
        _make_job(tmp_path / "plain"),
        _make_job(tmp_path / "looked"),
    )
    train_on_worker(plain_job, lambda *_: None)
    _train_and_report(reported_job, make_search(), reports.append, monkeypatch)
    assert [t["ninths"] for t in reports] == [1, 3]
    assert reports[0]["score"] != reports[1]["score"]
    for name in ("detector.pt", "teacher.pt"):
        torch.testing.assert_close(
            load_weights(f"{plain_job.folder}/{name}"),
            load_weights(f"{reported_job.folder}/{name}"),
            rtol=0,
            atol=0,
        )
    assert not list(Path(reported_job.folder).rglob("student.pt"))


def test_a_trial_killed_on_the_way_goes_on_from_its_last_ninth(
    make_search: Callable[..., Search], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "evaluate_weights", lambda *_: {"score": 0.0})
    work = _make_job(tmp_path / "killed")

    def kill(figures: dict[str, Any]) -> None:
        if figures["ninths"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _train_and_report(work, make_search(), kill, monkeypatch)
    reports: list[dict[str, Any]] = []
    _train_and_report(work, make_search(), reports.append, monkeypatch)
    assert reports == []
    undisturbed = _make_job(tmp_path / "undisturbed")
    train_on_worker(undisturbed, lambda *_: None)
    torch.testing.assert_close(
        load_weights(f"{work.folder}/detector.pt"),
        load_weights(f"{undisturbed.folder}/detector.pt"),
        rtol=0,
        atol=0,
    )


def test_without_a_scheduler_nothing_is_looked_at_on_the_way(
    make_search: Callable[..., Search], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[dict[str, Any]] = []
    _train_and_report(
        _make_job(tmp_path / "a"),
        make_search(scheduler="none"),
        reports.append,
        monkeypatch,
    )
    assert reports == []


def test_a_trial_that_diverges_has_failed_and_says_why(
    make_search: Callable[..., Search], monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(*_: object) -> dict[str, Any]:
        raise TrainingError("loss private_regions is not finite at step 40")

    monkeypatch.setattr(trial, "_distill_and_evaluate", diverging)
    reports: list[dict[str, Any]] = []
    run_trial(make_search(), {}, reports.append)
    assert reports == [
        {
            "ninths": 9,
            "score": FAILED_SCORE,
            "failure": "TrainingError: loss private_regions is not finite at step 40",
        }
    ]


def test_a_trial_whose_storage_is_away_has_not_failed(
    make_search: Callable[..., Search], monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_storage(*_: object) -> dict[str, Any]:
        raise StorageUnavailable("s3://bucket could not be reached for 600 s")

    monkeypatch.setattr(trial, "_distill_and_evaluate", without_storage)
    reports: list[dict[str, Any]] = []
    with pytest.raises(StorageUnavailable):
        run_trial(make_search(), {}, reports.append)
    assert reports == []


def test_a_fifth_of_the_images_is_held_out_whatever_else_there_is() -> None:
    ids = [f"{n * 2654435761 % 2**32:08x}" + "0" * 56 for n in range(2000)]
    held_out_ids = [i for i in ids if is_held_out(i, HELD_OUT_SHARE)]
    assert 0.17 < len(held_out_ids) / len(ids) < 0.23
    assert not any(is_held_out(i, 0.0) for i in ids)


def test_missing_packages_are_named_before_anything_is_asked(
    make_search: Callable[..., Search], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "coin_ray.config.optional_dependencies.find_spec", lambda name: None
    )
    search = make_search(
        config=replace(demo(), cloud=Cloud(serve="onnx", onnx_models=("teacher.onnx",)))
    )
    with pytest.raises(ConfigError, match="onnxruntime"):
        search.run_shared_steps()
    assert not list(Path(search.root).glob("steps/*"))
