"""Two processes on one root, on a disk and on an object store: one asks, the other is
refused; a kill hands the root over, and no answer on record is asked for again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cloud import storm
from s3_server import start_s3_server

from coin_ray import storage
from coin_ray.errors import RootInUse
from coin_ray.stages.collecting.call_account import RunAccount

IMAGES, IN_FLIGHT = 60, 4
RUN = "collect-0123456789ab"
COLLECT = """
import asyncio, os, sys, time
from dataclasses import replace
import pyarrow as pa
from coin_ray import storage
from coin_ray.commands.exit_codes import run_command
from coin_ray.config import Cloud
from coin_ray.config.presets import folder
from coin_ray.runs.lease import hold_root
from coin_ray.stages.collecting.cloud_actor import CloudActor

url, images, root, run, release_file = sys.argv[1:]
cloud = Cloud(url=url, in_flight=4, rate=1000.0)
config = replace(folder(), classes=("car", "bus", "dog"), cloud=cloud)
config = replace(config, collect=replace(config.collect, labeler="none"))
uris = storage.list_files(images, ".jpg")
rows = [{"image_id": str(number), "uri": uri} for number, uri in enumerate(uris)]


async def ask():
    actor = CloudActor(config, [url], storage.join(root, "journal"), run=run)
    return await actor(pa.Table.from_pylist(rows))


def collect():
    with hold_root(root):
        answers = asyncio.run(ask())
        while release_file and not os.path.exists(release_file):
            time.sleep(0.02)
    assert set(answers["status"].to_pylist()) == {"ok"}


sys.exit(run_command(collect))
"""


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.slow)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "disk":
        yield str(tmp_path / "root")
        return
    with start_s3_server() as server:
        yield server.new_root()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, image in enumerate(storm.numbered_images(IMAGES)):
        (folder / f"{number}.jpg").write_bytes(image.data)
    return folder


def _start(
    url: str, images: Path, root: str, release_file: str = ""
) -> subprocess.Popen[str]:
    """Start a process that asks, and holds the root until there is ``release_file``."""
    command = [sys.executable, "-c", COLLECT, url, str(images), root, RUN, release_file]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def _wait_for_calls(url: str, calls: int, process: subprocess.Popen[str]) -> None:
    while storm.fetch_json(f"{url}/count") < calls:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def _assert_refused(process: subprocess.Popen[str], holder: int) -> None:
    _, message = process.communicate(timeout=120)
    assert process.returncode == RootInUse.exit_code, message
    assert f"process {holder} on " in message
    assert "nothing was asked or paid" in message


def test_the_second_is_refused_and_every_image_is_paid_once(
    root: str, images: Path, tmp_path: Path
) -> None:
    release_file = tmp_path / "release"
    with storm.counting_server(latency=0.02) as url:
        first = _start(url, images, root, str(release_file))
        _wait_for_calls(url, 5, first)
        _assert_refused(_start(url, images, root), first.pid)
        release_file.touch()
        assert first.wait(120) == 0, first.communicate()
        assert storm.fetch_json(f"{url}/count") == IMAGES
    assert RunAccount.read(storage.join(root, "journal"), RUN).run.calls == IMAGES


def test_a_kill_hands_the_root_over(root: str, images: Path) -> None:
    with storm.counting_server(latency=0.1) as url:
        first = _start(url, images, root, "never")
        _wait_for_calls(url, 20, first)
        os.kill(first.pid, signal.SIGKILL)
        first.communicate()
        second = _start(url, images, root)
        _, message = second.communicate(timeout=120)
        assert second.returncode == 0, message
        received = [key for key, _ in storm.fetch_json(f"{url}/stats")["calls"]]
    assert len(set(received)) == IMAGES
    account = RunAccount.read(storage.join(root, "journal"), RUN).run
    assert account.answered == IMAGES
    assert len(received) - IMAGES <= account.unanswered <= 2 * IN_FLIGHT + 1
