"""Whole runs of the pipeline: killed in the middle of its stages and run again, run
twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from small_runs import SMALL, Kill, assert_same_results, count_calls_by_image

from coin_ray.config.yaml_files import read_config
from coin_ray.stages.common.validation import measure_validation_map50

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
KILLED_IN = ("images", "collect", "propagate", "separate", "distill", "evaluate")
LOOKING = ("--distill.fit.validate-every", "16")


def _command(root: Path, *arguments: str) -> list[str]:
    return [
        sys.executable,
        "pipelines/full.py",
        "demo",
        "--root",
        str(root),
        *SMALL,
        *arguments,
    ]


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def _finish(root: Path, *arguments: str) -> dict[str, Any]:
    process = subprocess.run(
        _command(root, *arguments),
        cwd=REPOSITORY,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    summary: dict[str, Any] = json.loads((root / "summary.json").read_text())
    return summary


def _started(root: Path, stage: str) -> bool:
    """Whether ``stage`` has begun to leave something behind, so that a kill hits the
    middle of its work."""
    traces = {
        "images": ("steps/images-*/images/train_0010.jpg",),
        "collect": ("steps/collect-*/parts/*.parquet",),
        "propagate": ("steps/propagate-*/state.pt",),
        "separate": ("steps/propagate-*/manifest.json",),
        "distill": ("steps/distill-*/state.pt",),
        "evaluate": ("steps/distill-*/manifest.json",),
    }
    return any(list(root.glob(pattern)) for pattern in traces[stage])


def _kill_in(root: Path, stage: str) -> Kill:
    process = subprocess.Popen(
        _command(root, *LOOKING),
        cwd=REPOSITORY,
        env=_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    give_up_at = time.monotonic() + 300
    while not _started(root, stage):
        assert process.poll() is None, (
            f"the run ended before it could be killed in {stage}"
        )
        assert time.monotonic() < give_up_at
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return Kill.now(root)


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("undisturbed")
    return root, _finish(root)


def test_a_finished_run_again_is_a_quick_no_op(
    undisturbed: tuple[Path, dict[str, Any]],
) -> None:
    root, before = undisturbed
    stamps = {p: p.stat().st_mtime_ns for p in root.glob("steps/*/*") if p.is_file()}
    start = time.monotonic()
    assert _finish(root) == before
    assert {
        p: p.stat().st_mtime_ns for p in root.glob("steps/*/*") if p.is_file()
    } == stamps
    print(f"finished run again: {time.monotonic() - start:.1f} s")


def test_summary_has_every_figure(undisturbed: tuple[Path, dict[str, Any]]) -> None:
    root, summary = undisturbed
    assert {
        "preset",
        "seed",
        "map50",
        "gap_closed",
        "separation",
        "calls",
        "seconds",
        "versions",
    } <= set(summary)
    assert set(summary["map50"]) == {
        "cloud",
        "clip_labels",
        "static_fusion",
        "clip_detector",
        "student",
    }
    assert set(summary["separation"]) == {"consistent", "inconsistent", "private"}
    calls = summary["calls"]
    assert {"made", "cached", "failed", "cost_usd"} < set(calls)
    # the server's faults of kind 500 and 503 leave no answer
    received = sum(count_calls_by_image(root).values())
    assert calls["root_calls"] == calls["made"] + calls["maybe_billed"] == received
    assert summary["seconds"]["total"] > 0


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Kill]]:
    """Killed in every stage while it looks at validation images beside the training,
    and finished."""
    root = tmp_path_factory.mktemp("disturbed")
    kills = [_kill_in(root, stage) for stage in KILLED_IN]
    _finish(root, *LOOKING)
    return root, kills


def test_killed_in_every_stage_gives_the_same_tables_and_repeats_no_call(
    undisturbed: tuple[Path, dict[str, Any]], disturbed: tuple[Path, list[Kill]]
) -> None:
    reference, _ = undisturbed
    root, kills = disturbed
    assert_same_results(root, reference)
    assert set(count_calls_by_image(root)) == set(count_calls_by_image(reference))
    assert kills[-1].answered, "answers are on record"
    repeated = {key for kill in kills for key in kill.repeated(root)}
    print(
        f"killed: the run in {', '.join(KILLED_IN)}; lost: nothing; {len(repeated)} of"
        f" {sum(count_calls_by_image(root).values())} calls made again"
    )


def test_looks_at_validation_images_end_at_the_student_and_leave_only_their_curve(
    disturbed: tuple[Path, list[Kill]],
) -> None:
    root, _ = disturbed
    (distilled,), (images,) = root.glob("steps/distill-*"), root.glob("steps/images-*")
    curve = json.loads((distilled / "validation.json").read_text())
    assert [point["step"] for point in curve] == [18, 24]
    student = measure_validation_map50(
        read_config(str(root / "config.yaml")),
        str(images),
        "student",
        str(distilled / "detector.pt"),
    )
    assert curve[-1]["validation_map50"] == pytest.approx(student, abs=1e-3)
    assert not list(distilled.glob("looks/*"))
