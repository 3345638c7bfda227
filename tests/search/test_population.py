"""A population under real Ray Tune, with members that train nothing: who copies whom,
what a kill costs, and a worker that is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from coin_ray.search.lineage import Look, read_looks

# a process for each of 36 ninths, twice
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

DRIVER = """
import dataclasses, json, os, sys, time
from dataclasses import asdict, replace
from coin_ray import storage
from coin_ray.config import Tracking
from coin_ray.errors import CoinError
from coin_ray.config.presets import demo
from coin_ray.search.lineage import Look, place, read_look
from coin_ray.search.plan import Search
from coin_ray.search.population import under_population

root, resume, crashing, concurrent = sys.argv[1], sys.argv[2] == "resume", int(sys.argv[3]), int(sys.argv[4])

def work(search, number, settings, begun, report):
    last = begun
    while last is None or last.ninths < 9:
        ninths = last.ninths + 1 if last else 1
        if number == crashing and ninths == 2:
            os._exit(1)
        time.sleep(0.3)
        with open(os.path.join(root, "ran"), "a") as file:
            file.write(json.dumps([number, ninths]) + chr(10))
        gained = 1 / (1 + abs(settings["distill.alignment"] - 3))
        score = (last.figures["score"] if last else 0.0) + gained
        last = Look(number, ninths, last.member if last else number, settings, {"score": score}, 0.3)
        storage.write_json(place(search.folder, number, ninths, ".json"), asdict(last))
        report(last)

search = Search(replace(demo(), tracking=Tracking(enabled=False)), root, "loss-weights", "map50", algorithm="population", scheduler="none",
                trials=4, concurrent=concurrent)
try:
    records = under_population(search, lambda record: None, resume=resume, work=work)
except CoinError as error:
    sys.exit(f"{type(error).__name__}: {error}")
open(os.path.join(root, "records.json"), "w").write(json.dumps([asdict(r) for r in records]))
"""
FOLDER = "search/loss-weights-map50-population"


def drive(
    root: Path, mode: str = "new", crashing: int = -1, concurrent: int = 2
) -> subprocess.Popen[str]:
    root.mkdir(exist_ok=True)
    script = root / "drive.py"
    script.write_text(DRIVER)
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    command = [
        sys.executable,
        str(script),
        str(root),
        mode,
        str(crashing),
        str(concurrent),
    ]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def looks(root: Path) -> dict[tuple[int, int], Look]:
    return read_looks(str(root / FOLDER), 4, 9)


def ran(root: Path) -> list[list[int]]:
    file = root / "ran"
    return (
        [json.loads(line) for line in file.read_text().splitlines()]
        if file.exists()
        else []
    )


def told(found: dict[tuple[int, int], Look]) -> dict[tuple[int, int], Any]:
    return {
        key: (look.copied, look.settings, look.figures) for key, look in found.items()
    }


def test_the_worst_copy_the_best_and_a_killed_population_ends_as_an_undisturbed_one(
    tmp_path: Path,
) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert drive(undisturbed).wait(1500) == 0
    found = looks(undisturbed)
    assert len(found) == 36
    assert Counter(map(tuple, ran(undisturbed))) == Counter(list(found)), (
        "each ninth of each member once"
    )
    for ninths in range(2, 10):
        before = sorted((found[m, ninths - 1].figures["score"], m) for m in range(4))
        for member in range(4):
            look, replaced = found[member, ninths], member == before[0][1]
            assert look.copied == (before[-1][1] if replaced else member)
            assert (
                look.settings == found[look.copied, ninths - 1].settings
            ) is not replaced
    process = drive(killed, concurrent=1)
    give_up_at = time.monotonic() + 1500
    while len(ran(killed)) < 18:
        assert process.poll() is None, "the search ended before it could be killed"
        assert time.monotonic() < give_up_at
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert drive(killed, "resume").wait(1500) == 0
    assert told(looks(killed)) == told(found)
    assert max(Counter(map(tuple, ran(killed))).values()) <= 2, (
        "a ninth is lost at most"
    )
    records = json.loads((killed / "records.json").read_text())
    assert [r["number"] for r in records] == [0, 1, 2, 3]
    assert all(len(r["line"]) == 9 for r in records)


def test_a_member_whose_worker_is_lost_again_and_again_ends_the_search_with_what_to_do(
    tmp_path: Path,
) -> None:
    process = drive(tmp_path, crashing=2)
    _, said = process.communicate(timeout=1500)
    assert process.returncode == 1
    assert (
        "TrainingError: member 2 of the population was lost 3 times. The same command"
        " with --resume goes on" in said
    )
    assert drive(tmp_path, "resume").wait(1500) == 0
    assert len(looks(tmp_path)) == 36
