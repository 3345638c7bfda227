"""The grid's logic, and two real trials of a few steps: once in this process, once
(slow) under Ray Tune."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coin_ray.commands.studies import parse_study
from coin_ray.config import PipelineConfig, Tracking
from coin_ray.errors import ConfigError
from coin_ray.experiments import grid
from coin_ray.experiments.grid import (
    Job,
    OnJobEnd,
    Trial,
    plan_waves,
    run_jobs_in_order,
)
from coin_ray.experiments.studies import StudyRequest, run_ablation, run_fusion_study
from coin_ray.experiments.tracked import TrialRuns
from coin_ray.experiments.variants import (
    ABLATION,
    build_trials,
    change_distillation,
    fusion_variants,
)
from coin_ray.runs import runner
from coin_ray.runs.steps import Manifest, Step

STEPS = ["images", "collect", "propagate", "separate", "distill", "evaluate"]


class _Pretended:
    """Stands for ``run_step``: leaves a manifest, notes what ran, and insists that
    inputs are finished and nothing runs twice."""

    def __init__(self, fail: str = "") -> None:
        self.ran: list[str] = []
        self.fail = fail

    def __call__(
        self, step: Step, config: PipelineConfig, root: str, work: object
    ) -> Manifest:
        assert all(i.is_finished(root) for i in step.inputs), (
            f"{step.name} before its inputs"
        )
        assert step.fingerprint not in self.ran, f"{step.name} twice"
        if step.name == self.fail:
            raise RuntimeError("killed")
        self.ran.append(step.fingerprint)
        metrics = (
            {"map50": {"student": 0.4, "cloud": 0.3}} if step.name == "evaluate" else {}
        )
        manifest = Manifest(step.name, step.fingerprint, {}, {}, metrics, 0.0, 1.0)
        folder = Path(step.folder(root))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").write_text(json.dumps(manifest.to_json()))
        return manifest


def _run(
    trials: Sequence[Trial], root: Path, config: PipelineConfig
) -> list[dict[str, Any]]:
    return grid.run_grid(
        "test",
        trials,
        str(root),
        run_jobs_in_order,
        TrialRuns("test", config, str(root)),
    )


def test_what_trials_share_comes_first_and_no_step_is_in_two_jobs(
    small_demo: PipelineConfig, tmp_path: Path
) -> None:
    trials = build_trials(small_demo, ABLATION | fusion_variants(0.5), (0, 1, 2))
    planned = plan_waves(trials, str(tmp_path))
    steps = [[step for job in wave for step in job.steps] for wave in planned]
    everything = Counter(step.fingerprint for wave in steps for step in wave)
    assert set(everything.values()) == {1}
    assert set(everything) == {
        step.fingerprint for trial in trials for step in trial.steps.values()
    }
    assert [sorted({step.name for step in wave}) for wave in steps[:4]] == [
        ["images"],
        ["collect"],
        ["propagate"],
        ["separate"],
    ]
    assert [len(wave) for wave in steps[:4]] == [1, 2, 6, 3]
    earlier: set[str] = set()
    for wave in planned:
        for job in wave:
            fingerprints = {step.fingerprint for step in job.steps}
            assert all(
                i.fingerprint in earlier | fingerprints
                for step in job.steps
                for i in step.inputs
            )
        earlier |= {step.fingerprint for job in wave for step in job.steps}


def test_equal_trials_are_run_once(
    small_demo: PipelineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretended = _Pretended()
    monkeypatch.setattr(runner, "run_step", pretended)
    _run([Trial("a", "", small_demo), Trial("b", "", small_demo)], tmp_path, small_demo)
    assert len(pretended.ran) == len(STEPS)


def test_a_finished_grid_again_does_nothing(
    small_demo: PipelineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretended = _Pretended()
    monkeypatch.setattr(runner, "run_step", pretended)
    trials = build_trials(small_demo, ABLATION, (0, 1))
    first = _run(trials, tmp_path, small_demo)
    count = len(pretended.ran)
    assert plan_waves(trials, str(tmp_path)) == []
    assert _run(trials, tmp_path, small_demo) == first
    assert len(pretended.ran) == count
    assert json.loads((tmp_path / "test.json").read_text())["trials"] == first


def test_a_killed_grid_goes_on_where_it_was(
    small_demo: PipelineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = build_trials(small_demo, ABLATION, (0, 1))
    killed = _Pretended(fail="separate")
    monkeypatch.setattr(runner, "run_step", killed)
    with pytest.raises(RuntimeError, match="killed"):
        _run(trials, tmp_path, small_demo)
    second = _Pretended()
    monkeypatch.setattr(runner, "run_step", second)
    assert len(_run(trials, tmp_path, small_demo)) == len(trials)
    assert killed.ran
    assert not set(killed.ran) & set(second.ran)


def test_each_trial_is_one_child_run_however_often_the_grid_runs(
    small_demo: PipelineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setattr(runner, "run_step", _Pretended())
    config = replace(small_demo, tracking=Tracking())
    trials = build_trials(
        config, {"losses": {"no private": change_distillation(private=0.0)}}, (0, 1)
    )
    for _ in range(2):
        _run(trials, tmp_path, config)
    runs = TrialRuns("test", config, str(tmp_path))
    child_runs = mlflow.search_runs([runs.tracker.experiment], output_format="list")
    children = [
        r
        for r in child_runs
        if r.data.tags.get("mlflow.parentRunId") == runs.tracker.parent_run
    ]
    assert sorted(r.info.run_name for r in children) == sorted(
        trial.title for trial in trials
    )
    assert all(r.data.metrics["map50.student"] == 0.4 for r in children)


@pytest.mark.parametrize(
    ("arguments", "seeds", "steps"),
    [
        ("demo", (0, 1, 2), 1.0),
        ("demo --seeds 3 4", (3, 4), 1.0),
        ("demo --quick", (0, 1), 0.1),
        ("--steps-share 0.5 demo --data.train 20", (0, 1, 2), 0.5),
    ],
)
def test_command_line_of_a_study(
    arguments: str, seeds: tuple[int, ...], steps: float
) -> None:
    full = parse_study(["demo"], "coin-ray ablate", "").config
    request = parse_study(arguments.split(), "coin-ray ablate", "")
    assert request.seeds == seeds
    assert request.config.distill.fit.steps == round(full.distill.fit.steps * steps)
    assert request.root.endswith("runs/demo")


@pytest.mark.parametrize(
    "wrong",
    [
        "--seed 3",
        "--until distill",
        "--baselines",
        "--seeds 1 1",
        "--share 0",
        "--steps-share 2",
    ],
)
def test_what_a_grid_cannot_do_is_said_before_it_starts(wrong: str) -> None:
    with pytest.raises(ConfigError, match="--"):
        parse_study(["demo", *wrong.split()], "coin-ray ablate", "")


def test_a_plan_runs_nothing(
    small_demo: PipelineConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(jobs: Sequence[Job], root: str, report: OnJobEnd) -> None:
        raise AssertionError

    assert (
        run_ablation(
            StudyRequest(small_demo, str(tmp_path), (0,), 0.5, dry_run=True), never
        )
        == []
    )
    assert "no private, losses, seed 0: distill, evaluate" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_fusions_of_one_seed_under_ray_tune(
    small_demo: PipelineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few steps, but everything real: collection with its local cloud, two rules and
    CKG as Tune trials, tables and figures."""
    import ray

    from coin_ray.experiments import studies
    from coin_ray.experiments.tuning import run_jobs_with_tune

    few = {
        group: {name: rules[name] for name in ("average", "dawid_skene")}
        for group, rules in fusion_variants(0.5).items()
    }
    monkeypatch.setattr(studies, "fusion_variants", lambda share: few)
    request = StudyRequest(small_demo, str(tmp_path), (0,), 0.5, dry_run=False)
    try:
        rows = run_fusion_study(request, run_jobs_with_tune)
        stamps = {
            p: p.stat().st_mtime_ns for p in tmp_path.glob("steps/*/*") if p.is_file()
        }
        assert run_fusion_study(request, run_jobs_with_tune) == rows
    finally:
        ray.shutdown()
    assert [(row.name, row.group) for row in rows[:2]] == [
        ("COIN", ""),
        ("average", "pi = 0.7"),
    ]
    assert len(rows) == 5
    assert all(len(row.by_seed) == 1 for row in rows)
    assert {
        p: p.stat().st_mtime_ns for p in tmp_path.glob("steps/*/*") if p.is_file()
    } == stamps
    assert Counter(
        p.name.split("-")[0] for p in (tmp_path / "steps").iterdir()
    ) == Counter(
        {
            "images": 1,
            "collect": 1,
            "propagate": 1,
            "separate": 1,
            "distill": 5,
            "evaluate": 5,
        }
    )
    calls = (tmp_path / "local_cloud" / "calls.jsonl").read_text().splitlines()
    assert len(calls) == 16 + 8
    assert {f"fusion.{kind}" for kind in ("json", "md", "svg")} <= {
        p.name for p in tmp_path.iterdir()
    }
