from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from labelled_folder import CLASSES, write_image_records

from coin_ray.commands.components import parse_component_study
from coin_ray.config import Tracking
from coin_ray.config.co_detr import CoDetr
from coin_ray.config.detector_presets import small
from coin_ray.config.detector_training import DetectorConfig
from coin_ray.data import formats
from coin_ray.errors import ConfigError
from coin_ray.experiments.components import (
    QUICK_SCENES,
    VARIANTS,
    ComponentStudy,
    build_component_table,
    build_component_trials,
    format_component_table,
    run_component_study,
)
from coin_ray.runs import runner


def _config(data: str = "/data") -> DetectorConfig:
    fit = replace(small().fit, steps=1, batch=2, warmup=0)
    return replace(
        small(),
        data=data,
        classes=CLASSES,
        short_side=48,
        long_side=64,
        fit=fit,
        tracking=Tracking(enabled=False),
    )


def test_arms_differ_in_heads_and_their_two_parts_and_in_nothing_else() -> None:
    trials = build_component_trials(replace(_config(), ship="heads"), [0, 1])
    assert [(a.variant, a.seed) for a in trials] == [
        (name, seed) for seed in (0, 1) for name in VARIANTS
    ]
    by_name = {a.variant: a.config for a in trials if a.seed == 1}

    def parts(co_detr: CoDetr) -> tuple[object, ...]:
        return (
            co_detr.auxiliary,
            bool(co_detr.auxiliary) and co_detr.auxiliary_losses,
            bool(co_detr.auxiliary) and co_detr.positive_queries,
        )

    assert {name: parts(changed.co_detr) for name, changed in by_name.items()} == {
        "none": ((), False, False),
        "heads": (("atss",), True, False),
        "queries": (("atss",), False, True),
        "both": (("atss",), True, True),
        "both, two heads": (("rcnn", "atss"), True, True),
    }
    assert {replace(changed, co_detr=CoDetr()) for changed in by_name.values()} == {
        replace(_config(), co_detr=CoDetr(), seed=1)
    }


def test_the_table_is_made_and_kept_and_a_second_time_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats.write_dataset(
        write_image_records(tmp_path / "raw", 8, 1), str(tmp_path / "coco"), "coco"
    )
    trials = build_component_trials(_config(str(tmp_path / "coco")), [0])
    study = ComponentStudy(trials, str(tmp_path / "run"), dry_run=False)
    run_component_study(study)
    first = (tmp_path / "run" / "components.md").read_text()
    assert [line.split(" | ")[0] for line in first.splitlines()[2:]] == [
        f"| {name}" for name in VARIANTS
    ]
    assert set(json.loads((tmp_path / "run" / "components.json").read_text())) == set(
        VARIANTS
    )

    def never(*_: object) -> None:
        raise AssertionError("a finished arm is not trained again")

    monkeypatch.setattr(runner, "run_step", never)
    run_component_study(study)
    assert (tmp_path / "run" / "components.md").read_text() == first


def test_a_dry_run_says_what_is_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trials = build_component_trials(_config(), [3])
    run_component_study(ComponentStudy(trials, str(tmp_path), dry_run=True))
    assert (
        "both, two heads, seed 3: to do images, train, evaluate"
        in capsys.readouterr().out
    )
    assert not list(tmp_path.iterdir())


def test_rows_are_means_over_seeds() -> None:
    all_figures = [
        {
            "arm": name,
            "seed": seed,
            "voc_ap50": 0.5 + 0.1 * seed,
            "coco_ap": None,
            "seconds_per_step": 0.2,
        }
        for name in VARIANTS
        for seed in (0, 2)
    ]
    row = build_component_table(all_figures)["both"]
    assert row["voc_ap50"] == {"mean": 0.6, "std": 0.1414, "values": [0.5, 0.7]}
    assert row["coco_ap"]["mean"] == 0.0
    assert (
        "| both | K=1, ATSS | 60.0 ± 14.1 | 0.0 ± 0.0 | 0.20 |"
        in format_component_table(build_component_table(all_figures))
    )


def test_the_command_line_takes_the_demo_s_scenes_or_labelled_images() -> None:
    demo = parse_component_study([]).trials
    assert (
        len(demo),
        demo[0].config.data,
        demo[0].scenes,
        demo[0].config.fit.steps,
    ) == (15, "demo-source", None, 300)
    quick = parse_component_study(["--quick"]).trials
    assert (len(quick), quick[0].scenes, quick[0].config.fit.steps) == (
        5,
        QUICK_SCENES,
        10,
    )
    study = parse_component_study(
        [
            "--data=coco:/x",
            "--classes",
            "cat,dog",
            "--seeds",
            "4",
            "--root",
            "/r",
            "--quick",
        ]
    )
    trial = study.trials[0]
    assert (trial.seed, trial.config.preset, trial.config.epochs, study.root) == (
        4,
        "r50",
        0,
        "/r",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", "d-fine", "--classes", "cat", "--data", "/x"],
            "the table is about Co-DETR",
        ),
        (["--seed", "1"], "give --seeds 0 1 2"),
    ],
)
def test_what_a_table_cannot_have_is_told(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_component_study(arguments)
