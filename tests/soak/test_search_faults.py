"""A search whose trials' processes are killed: every trial ends, with the figures of an
undisturbed search."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from clusters import REPOSITORY, environment, until
from small_runs import SMALL

pytestmark = [pytest.mark.soak, pytest.mark.timeout(7200)]
OPTIONS = [
    "--space",
    "loss-weights",
    "--algorithm",
    "random",
    "--trials",
    "3",
    "--concurrent",
    "1",
    "--scheduler",
    "none",
]


def search(root: Path) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "tune/search.py",
        "demo",
        "--root",
        str(root),
        *SMALL,
        *OPTIONS,
    ]
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment() | {"OMP_NUM_THREADS": "1"}
    )


def trials(root: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(
        (root / "search" / "loss-weights-map50" / "search.json").read_text()
    )["trials"]
    return [
        {name: trial[name] for name in ("settings", "figures", "state")}
        for trial in found
    ]


def test_a_trial_killed_goes_on_from_its_last_state(tmp_path: Path) -> None:
    undisturbed, disturbed = tmp_path / "a", tmp_path / "b"
    assert search(undisturbed).wait(3000) == 0
    process, killed = search(disturbed), 0
    for number in (1, 2):  # the second and the third distillation below the root
        until(lambda number=number: len(list(disturbed.glob("steps/distill-*/state.pt"))) > 0  # type: ignore[misc]
              and len(list(disturbed.glob("steps/distill-*"))) > number, f"a state of trial {number}")  # fmt: skip
        for worker in psutil.Process(process.pid).children(recursive=True):
            if (
                "ImplicitFunc.train" in " ".join(worker.cmdline())
                or "ImplicitFunc" in worker.name()
            ):
                os.kill(worker.pid, signal.SIGKILL)
                killed += 1
    assert process.wait(3000) == 0
    assert trials(disturbed) == trials(undisturbed)
    print(f"killed: {killed} processes of trials; lost: nothing")
    assert killed
