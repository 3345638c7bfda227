"""Collections with three cloud actors, whose processes are killed: the same answers as
with one, no call twice, no limit exceeded."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from coin_ray.cloud.journal.segments import SegmentJournal
from tests.cloud.counting_server import BILLED
from tests.cloud.storm import CLASSES, SIZE, counting_server, fetch_json

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

REPOSITORY = Path(__file__).resolve().parents[2]
IN_FLIGHT = 16
ACTORS = 3
COLUMNS = ["image_id", "boxes", "scores", "labels", "probs", "prob_source"]
CLIP = REPOSITORY / "coin_ray" / "demo" / "assets" / "coin_tiny"


def _write_images(folder: Path, count: int) -> None:
    """Write different images, and of every tenth a second file with the same pixels:
    both become the same request.
    """
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for number in range(count):
        pixels = draw.integers(0, 255, (SIZE[1], SIZE[0], 3), np.uint8)
        image = Image.fromarray(pixels)
        image.save(folder / f"{number:04d}.png")
        if number % 10 == 0:
            comment = PngInfo()
            comment.add_text("Comment", "another file")
            image.save(folder / f"{number:04d}-again.png", pnginfo=comment)


def _start(
    images: Path, root: Path, url: str, actors: int, options: Sequence[str] = ()
) -> subprocess.Popen[str]:
    command = [sys.executable, "pipelines/collect.py", "folder"]
    command += ["--images", str(images), "--classes", ",".join(CLASSES)]
    command += ["--cloud", url, "--labeler", "none", "--root", str(root)]
    command += ["--cloud.in-flight", str(IN_FLIGHT), "--collect.batch", "2"]
    command += ["--collect.actors", str(actors), "--tracking.no-enabled"]
    command += ["--clip.model", f"{CLIP}.json", "--clip.pretrained", f"{CLIP}.pt"]
    return subprocess.Popen(
        [*command, *options],
        cwd=REPOSITORY,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=900)
    assert process.returncode == code, output[-3000:]
    return output


def _rows(root: Path) -> list[dict[str, Any]]:
    (file,) = root.glob("steps/collect-*/cloud.parquet")
    rows: list[dict[str, Any]] = pq.read_table(file, columns=COLUMNS).to_pylist()
    return rows


def _cloud_actors(process: subprocess.Popen[str]) -> list[psutil.Process]:
    actors: list[psutil.Process] = []
    if process.poll() is not None:
        return actors
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "CloudActor" in " ".join(child.cmdline()):
                actors.append(child)
        except psutil.Error:
            continue
    return actors


def _kill_all(process: subprocess.Popen[str]) -> None:
    """Kill the run: the driver and all of Ray's processes."""
    if process.poll() is not None:
        return
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for child in children:
        try:
            child.kill()
        except psutil.Error:
            continue
    psutil.wait_procs(children, 30)
    process.communicate()


@dataclass
class Storm:
    """Kills processes of a collection. ``states``: after each kill, the keys on record
    and, read later, how many calls the server had received.
    """

    images: Path
    root: Path
    url: str
    options: Sequence[str]
    random: random.Random = field(default_factory=lambda: random.Random(7))
    kills: int = 0
    states: list[tuple[set[str], int]] = field(default_factory=list)

    def run(self, kills: int, kills_a_life: int) -> None:
        """Kill cloud actors and, as the last of each life, the whole run."""
        while self.kills < kills:
            process = _start(self.images, self.root, self.url, ACTORS, self.options)
            try:
                for number in range(kills_a_life):
                    if not self._wait_for_actors(process):
                        return
                    time.sleep(self.random.uniform(0.2, 3))
                    if number == kills_a_life - 1:
                        break
                    self._kill_actor(process)
            finally:
                _kill_all(process)
            self._note_kill()

    def _wait_for_actors(self, process: subprocess.Popen[str]) -> bool:
        """Return whether the run still has cloud actors that make calls."""
        calls = self._received()
        give_up_at = time.monotonic() + 300
        while time.monotonic() < give_up_at:
            if process.poll() is not None:
                return False
            if self._received() > calls and _cloud_actors(process):
                return True
            time.sleep(0.1)
        raise AssertionError("the run makes no calls any more")

    def _kill_actor(self, process: subprocess.Popen[str]) -> None:
        actors = _cloud_actors(process)
        if actors:
            self.random.choice(actors).kill()
            self._note_kill()

    def _note_kill(self) -> None:
        self.kills += 1
        journal = SegmentJournal(str(self.root / "journal"))
        keys = set(journal.keys())
        journal.close()
        self.states.append((keys, self._received()))

    def _received(self) -> int:
        return int(fetch_json(f"{self.url}/count"))


def _check_calls(storm: Storm, calls: list[tuple[str, str]], requests: int) -> None:
    """Check that no answer on record was paid again, and what was billed in all."""
    for keys, received in storm.states:
        kinds = dict(calls[:received])
        readable = {key for key in keys if kinds.get(key) != "broken"}
        again = [key for key, _ in calls[received:] if key in readable]
        assert not again, f"{len(again)} answers on record were asked again"
    answered_twice = sum(kind == "ok" for _, kind in calls) - requests
    assert answered_twice <= storm.kills * IN_FLIGHT
    billed_faults = sum(kind in BILLED and kind != "ok" for _, kind in calls)
    billed = sum(kind in BILLED for _, kind in calls)
    assert billed <= requests + billed_faults + answered_twice
    journal = SegmentJournal(str(storm.root / "journal"))
    assert billed <= journal.spent()[0], "a call was made that the journal lacks"
    journal.close()


def test_three_actors_collect_what_one_does(tmp_path: Path) -> None:
    _write_images(tmp_path / "images", 120)
    with counting_server(latency=0.01) as url:
        _finish(_start(tmp_path / "images", tmp_path / "three", url, ACTORS))
        calls = fetch_json(f"{url}/stats")["calls"]
    assert Counter(Counter(key for key, _ in calls).values()) == {1: 120}
    with counting_server(latency=0.01) as url:
        _finish(_start(tmp_path / "images", tmp_path / "one", url, 1))
    assert len(_rows(tmp_path / "one")) == 132
    assert _rows(tmp_path / "three") == _rows(tmp_path / "one")


STORMS = [
    pytest.param(150, 2.5, 5, 3, id="5 kills"),
    pytest.param(2000, 4.0, 50, 6, id="50 kills", marks=pytest.mark.soak),
]


@pytest.mark.parametrize(("images", "rate", "kills", "kills_a_life"), STORMS)
def test_cloud_actors_killed_repeatedly(
    tmp_path: Path, images: int, rate: float, kills: int, kills_a_life: int
) -> None:
    _write_images(tmp_path / "images", images)
    with counting_server(faults=0.08, seed=5) as url:
        options = ("--cloud.rate", str(rate), "--cloud.max-error-share", "1")
        storm = Storm(tmp_path / "images", tmp_path / "root", url, options)
        storm.run(kills, kills_a_life)
        assert storm.kills >= kills, "the images were too few for so many kills"
        options = ("--cloud.max-error-share", "1")
        for _ in range(2):  # failed images are asked again
            _finish(_start(storm.images, storm.root, url, ACTORS, options))
        calls = [tuple(call) for call in fetch_json(f"{url}/stats")["calls"]]
    _check_calls(storm, calls, images)
    with counting_server() as url:
        _finish(_start(tmp_path / "images", tmp_path / "undisturbed", url, 1))
    assert _rows(storm.root) == _rows(tmp_path / "undisturbed")


def test_the_budget_is_never_exceeded(tmp_path: Path) -> None:
    _write_images(tmp_path / "images", 200)
    with counting_server(faults=0.08, seed=3) as url:
        budget = ("--cloud.max-calls", "90", "--cloud.max-error-share", "1")
        options = (*budget, "--cloud.rate", "2.5")
        storm = Storm(tmp_path / "images", tmp_path / "root", url, options)
        storm.run(4, 3)
        _finish(_start(storm.images, storm.root, url, ACTORS, budget), code=5)
        calls = fetch_json(f"{url}/stats")["calls"]
    journal = SegmentJournal(str(tmp_path / "root" / "journal"))
    assert len([kind for _, kind in calls if kind in BILLED]) <= 90
    assert journal.spent()[0] == 90
