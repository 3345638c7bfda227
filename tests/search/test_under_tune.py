"""Real Ray Tune, with a trial that trains nothing: what ASHA stops, what fails, and
what a kill costs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from coin_ray.search.outcome import TrialRecord, best_trial
from coin_ray.search.plan import Search
from coin_ray.search.space import Settings
from coin_ray.search.trial import FAILED_SCORE, Report

pytestmark = pytest.mark.slow

DRIVER = """
import json, os, sys, time
from dataclasses import asdict, replace
from coin_ray.config import Tracking
from coin_ray.config.presets import demo
from coin_ray.search.plan import Search
from coin_ray.search.tuner import run_trials_with_tune

root, algorithm, resume = sys.argv[1], sys.argv[2], sys.argv[3] == "resume"

def work(search, settings, report):
    time.sleep(1.5)
    with open(os.path.join(root, "ran"), "a") as file:
        file.write(json.dumps(settings, sort_keys=True) + chr(10))
    report({"ninths": 9, "score": -abs(settings["distill.alignment"] - 3)})

search = Search(replace(demo(), tracking=Tracking(enabled=False)), root,
                "loss-weights", "map50", algorithm=algorithm, trials=6, concurrent=1)
records = run_trials_with_tune(search, lambda record: None, resume=resume, work=work)
rows = [asdict(record) | {"state": record.state} for record in records]
open(os.path.join(root, "records.json"), "w").write(json.dumps(rows))
"""


def _drive(root: Path, algorithm: str, mode: str) -> subprocess.Popen[bytes]:
    script = root / "drive.py"
    script.write_text(DRIVER)
    environment = {
        **os.environ,
        "TUNE_GLOBAL_CHECKPOINT_S": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    return subprocess.Popen(
        [sys.executable, str(script), str(root), algorithm, mode], env=environment
    )


def _ran(root: Path) -> list[str]:
    file = root / "ran"
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_a_killed_search_goes_on_without_repeating_what_had_finished(
    tmp_path: Path, algorithm: str
) -> None:
    if algorithm == "optuna":
        pytest.importorskip("optuna")
    process = _drive(tmp_path, algorithm, "new")
    give_up_at = time.monotonic() + 300
    while len(_ran(tmp_path)) < 4:
        assert process.poll() is None, "the search ended before it could be killed"
        assert time.monotonic() < give_up_at
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = _ran(tmp_path)[:2]
    assert _drive(tmp_path, algorithm, "resume").wait(300) == 0
    records = json.loads((tmp_path / "records.json").read_text())
    assert [r["state"] for r in records] == ["finished"] * 6
    assert len({json.dumps(r["settings"], sort_keys=True) for r in records}) == 6
    assert records[0]["settings"] == {
        "distill.alignment": 1.0,
        "distill.inconsistent": 1.0,
        "distill.private": 2.0,
    }
    times = Counter(_ran(tmp_path))
    assert [times[settings] for settings in finished] == [1, 1]
    assert sum(times.values()) <= 6 + 2


def test_asha_stops_bad_trials_and_frees_their_place_and_a_failed_one_stops_nothing(
    make_search: Callable[..., Search],
) -> None:
    """Two at once, nine in all: all end, so no place is kept by a stopped one."""
    import ray

    from coin_ray.search.tuner import run_trials_with_tune

    bad = FAILED_SCORE

    def work(search: Search, settings: Settings, report: Report) -> None:
        score = -abs(settings["distill.alignment"] - 1)
        for ninths in (1, 3):
            report({"ninths": ninths, "score": score})
        failed = (
            {"score": bad, "failure": "TrainingError: loss"}
            if settings["distill.alignment"] > 4
            else {"score": score}
        )
        report({"ninths": 9, **failed})

    ended_trials: list[TrialRecord] = []
    try:
        records = run_trials_with_tune(
            make_search(trials=9, concurrent=2, scheduler="asha"),
            ended_trials.append,
            resume=False,
            work=work,
        )
        every, give_up_at = ray.cluster_resources()["CPU"], time.monotonic() + 30
        while (
            free := ray.available_resources().get("CPU", 0.0)
        ) < every and time.monotonic() < give_up_at:
            time.sleep(0.5)  # the last actors end after the search has returned
    finally:
        ray.shutdown()
    assert len(records) == len(ended_trials) == 9
    assert [r.number for r in sorted(ended_trials, key=lambda r: r.number)] == list(
        range(9)
    )
    stopped = [r for r in records if r.state.startswith("stopped")]
    assert stopped
    winner = best_trial(records)
    assert winner is not None
    assert winner.number == 0
    assert max(r.figures["score"] for r in stopped) < winner.figures["score"]
    assert free == every
