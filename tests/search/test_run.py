"""A search without Ray: a host that makes records up stands for the trials."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from coin_ray.commands.arguments import parse_run_arguments
from coin_ray.commands.search import parse_search
from coin_ray.config import DemoScenes, Tracking
from coin_ray.config.presets import demo, folder
from coin_ray.errors import ConfigError, TrainingError
from coin_ray.runs.graph import build_steps
from coin_ray.search import run
from coin_ray.search.outcome import TrialRecord
from coin_ray.search.plan import Search
from coin_ray.search.run import run_search

MakeSearch = Callable[..., Search]


@pytest.fixture(autouse=True)
def _nothing_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Search, "run_shared_steps", lambda self: None)


def _run_made_up_trials(
    search: Search, on_trial_end: Callable[[TrialRecord], None], *, resume: bool
) -> list[TrialRecord]:
    """Trial n has n times lambda; the third is the best, the last one fails."""
    records = [
        TrialRecord(
            n,
            {
                "distill.alignment": 1.0 + n,
                "distill.inconsistent": 1.0,
                "distill.private": 2.0,
            },
            {"score": score},
            9,
            1.0,
            failure,
        )
        for n, (score, failure) in enumerate(
            [
                (0.4, ""),
                (0.42, ""),
                (0.5, ""),
                (-1.0, "TrainingError: loss private is not finite"),
            ]
        )
    ]
    for record in records:
        on_trial_end(record)
    return records


def test_the_best_setting_is_a_file_that_the_pipeline_takes(
    make_search: MakeSearch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    winner = run_search(make_search(), _run_made_up_trials)
    assert winner.number == 2
    file = tmp_path / "search" / "loss-weights-map50" / "best.yaml"
    config, options = parse_run_arguments(
        ["--config", str(file), "--root", str(tmp_path)]
    )
    assert config.distill == replace(demo().distill, alignment=3.0)
    assert options.root == str(tmp_path)
    printed = capsys.readouterr().out
    assert "+10.0 points over the preset" in printed
    assert f"--config {file} --root {tmp_path}" in printed
    assert "failed, TrainingError: loss private is not finite" in printed


def test_the_winners_student_is_the_one_the_pipeline_would_train(
    make_search: MakeSearch, tmp_path: Path
) -> None:
    search = make_search()
    winner = run_search(search, _run_made_up_trials)
    config, _ = parse_run_arguments(
        ["--config", str(tmp_path / "search" / "loss-weights-map50" / "best.yaml")]
    )
    assert (
        build_steps(config)["distill"].fingerprint
        == search.steps(winner.settings)["distill"].fingerprint
    )


def test_held_out_images_and_fewer_steps_make_another_student_but_the_same_teachers(
    make_search: MakeSearch,
) -> None:
    preset_steps = build_steps(demo())
    for other in (make_search(objective="label-free"), make_search(steps_share=0.1)):
        steps = other.steps({})
        assert steps["distill"].fingerprint != preset_steps["distill"].fingerprint
        assert {name: steps[name].fingerprint for name in other.shared_steps} == {
            name: preset_steps[name].fingerprint for name in other.shared_steps
        }


def test_a_shorter_search_leaves_a_config_of_full_length(
    make_search: MakeSearch, tmp_path: Path
) -> None:
    run_search(make_search(steps_share=0.1), _run_made_up_trials)
    config, _ = parse_run_arguments(
        ["--config", str(tmp_path / "search" / "loss-weights-map50" / "best.yaml")]
    )
    assert config.distill.fit == demo().distill.fit


def test_a_search_is_not_begun_twice_and_not_resumed_without_one_or_with_another(
    make_search: MakeSearch,
) -> None:
    with pytest.raises(ConfigError, match="no search of this space"):
        run_search(make_search(), _run_made_up_trials, resume=True)
    run_search(make_search(), _run_made_up_trials)
    with pytest.raises(ConfigError, match="add --resume"):
        run_search(make_search(), _run_made_up_trials)
    with pytest.raises(ConfigError, match=r"--trials \(was 4\), --steps-share \(was 1"):
        run_search(
            make_search(trials=9, steps_share=0.5), _run_made_up_trials, resume=True
        )
    with pytest.raises(ConfigError, match="different now: configuration"):
        run_search(
            make_search(config=replace(demo(), seed=3)),
            _run_made_up_trials,
            resume=True,
        )
    assert (
        run_search(make_search(concurrent=2), _run_made_up_trials, resume=True).number
        == 2
    )


def test_if_no_trial_finishes_that_is_an_error_with_the_reason(
    make_search: MakeSearch, tmp_path: Path
) -> None:
    def failing(
        search: Search, on_trial_end: object, *, resume: bool
    ) -> list[TrialRecord]:
        return [
            TrialRecord(
                0,
                dict.fromkeys(search.space, 1.0),
                {"score": -1.0},
                9,
                1.0,
                "TrainingError: loss boxes",
            )
        ]

    with pytest.raises(
        TrainingError,
        match=r"none of the 1 trials finished\. TrainingError: loss boxes",
    ):
        run_search(make_search(), failing)
    assert (
        json.loads(
            (tmp_path / "search" / "loss-weights-map50" / "search.json").read_text()
        )["trials"][0]["state"]
        == "failed"
    )


def test_the_state_of_an_unfinished_training_is_removed(
    make_search: MakeSearch, tmp_path: Path
) -> None:
    search = make_search()
    settings = {
        "distill.alignment": 2.0,
        "distill.inconsistent": 1.0,
        "distill.private": 2.0,
    }
    state = Path(search.steps(settings)["distill"].folder(str(tmp_path))) / "state.pt"
    state.parent.mkdir(parents=True)
    state.write_bytes(b"")

    def stopping(
        search: Search, on_trial_end: object, *, resume: bool
    ) -> list[TrialRecord]:
        return [
            TrialRecord(
                0, settings | {"distill.alignment": 1.0}, {"score": 0.1}, 9, 1.0
            ),
            TrialRecord(1, settings, {"score": 0.0}, 1, 1.0),
        ]

    run_search(search, stopping)
    assert not state.exists()


def test_trials_are_child_runs_of_one_parent_with_figures_and_files(
    make_search: MakeSearch, tmp_path: Path
) -> None:
    mlflow = pytest.importorskip("mlflow")
    search = make_search()
    search = replace(search, config=replace(search.config, tracking=Tracking()))
    for resume in (False, True):
        run_search(search, _run_made_up_trials, resume=resume)
    runs = run.TrialRuns("search loss-weights map50", search.config, str(tmp_path))
    parent = runs.tracker.parent_run
    child_runs = mlflow.search_runs([runs.tracker.experiment], output_format="list")
    children = [
        r for r in child_runs if r.data.tags.get("mlflow.parentRunId") == parent
    ]
    assert sorted(r.data.metrics["score"] for r in children) == [-1.0, 0.4, 0.42, 0.5]
    assert {float(r.data.params["distill.alignment"]) for r in children} == {
        1.0,
        2.0,
        3.0,
        4.0,
    }
    assert {f.path for f in mlflow.MlflowClient().list_artifacts(parent)} >= {
        "parallel.svg",
        "importance.svg",
        "best.yaml",
    }


@pytest.mark.parametrize(
    ("arguments", "objective", "trials"),
    [
        ("demo", "map50", 16),
        ("demo --objective label-free --trials 3", "label-free", 3),
        ("demo --data.val 0", "label-free", 16),
        ("folder --images a --classes dog --cloud dino-x", "label-free", 16),
        (
            "folder --images a --val b --classes dog --cloud dino-x --concurrent 2",
            "map50",
            16,
        ),
    ],
)
def test_command_line(arguments: str, objective: str, trials: int) -> None:
    search = parse_search(arguments.split()).search
    assert (search.objective, search.trials) == (objective, trials)


@pytest.mark.parametrize(
    "wrong",
    [
        "--trials 0",
        "--space losses",
        "--concurrent many",
        "--concurrent 0",
        "--algorithm grid",
        "--steps-share 0",
        "--until distill",
        "--baselines",
        "--objective map50 --data.val 0",
        "--distill.fit.workers 2",
        "--space fusion --distill.fusion-share 0.5",
    ],
)
def test_what_a_search_cannot_do_is_said_before_it_starts(wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong.split()[0].strip("-").split(".")[0]):
        parse_search(["demo", *wrong.split()])


def test_without_validation_images_and_truth_the_search_is_label_free(
    make_search: MakeSearch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(demo(), data=DemoScenes(val=0))
    run_search(make_search(config=config, objective="label-free"), _run_made_up_trials)
    assert "no label is used" in capsys.readouterr().out
    assert folder().data.val is None  # type: ignore[union-attr]
