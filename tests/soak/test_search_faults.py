"""Check that every trial of a search whose trial processes are killed finishes with the
figures of an undisturbed search."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from clusters import REPOSITORY, quiet_environment, wait_until
from small_runs import SMALL

pytestmark = [pytest.mark.soak, pytest.mark.timeout(7200)]
OPTIONS = [
    *("--space", "loss-weights", "--algorithm", "random", "--trials", "3"),
    *("--concurrent", "1", "--scheduler", "none"),
]


def _start_search(root: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "tune/search.py", "demo", "--root", str(root)]
    command += [*SMALL, *OPTIONS]
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=quiet_environment() | {"OMP_NUM_THREADS": "1"}
    )


def _read_trials(root: Path) -> list[dict[str, Any]]:
    page = root / "search" / "loss-weights-map50" / "search.json"
    trials: list[dict[str, Any]] = json.loads(page.read_text())["trials"]
    return [
        {name: trial[name] for name in ("settings", "figures", "state")}
        for trial in trials
    ]


def _has_saved_trial(root: Path, number: int) -> bool:
    """Whether a trial after the first ``number`` distillations has started, and one has
    saved its state."""
    folders = list(root.glob("steps/distill-*"))
    states = list(root.glob("steps/distill-*/state.pt"))
    return bool(states) and len(folders) > number


def test_a_trial_killed_goes_on_from_its_last_state(tmp_path: Path) -> None:
    undisturbed, disturbed = tmp_path / "a", tmp_path / "b"
    assert _start_search(undisturbed).wait(3000) == 0
    process = _start_search(disturbed)
    killed = 0
    for number in (1, 2):  # the second and the third distillation below the root
        has_saved = partial(_has_saved_trial, disturbed, number)
        wait_until(has_saved, f"a state of trial {number}")
        for worker in psutil.Process(process.pid).children(recursive=True):
            title = " ".join(worker.cmdline())
            if "ImplicitFunc.train" in title or "ImplicitFunc" in worker.name():
                os.kill(worker.pid, signal.SIGKILL)
                killed += 1
    assert process.wait(3000) == 0
    assert _read_trials(disturbed) == _read_trials(undisturbed)
    print(f"killed: {killed} processes of trials; lost: nothing")
    assert killed
