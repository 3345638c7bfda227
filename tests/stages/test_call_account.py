"""The account of a collection whose asking process is killed again and again equals the
count of the server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
from cloud import storm
from cloud.counting_server import BILLED

from coin_ray import storage
from coin_ray.cloud.journal.base import CallAccount
from coin_ray.cloud.journal.opening import open_journal
from coin_ray.stages.collecting.call_account import RunAccount, describe_calls

IMAGES = 90
PRICE = 0.002
KILL_AFTER = (15, 40, 60)
"""Calls that the server has received when the asking process is killed."""
ASKING = """
import asyncio, sys
from dataclasses import replace
import pyarrow as pa
from coin_ray import storage
from coin_ray.config import Cloud
from coin_ray.config.presets import folder
from coin_ray.stages.collecting.cloud_actor import CloudActor

url, images, journal, part, run = sys.argv[1:]
cloud = Cloud(url=url, usd_per_call=0.002, in_flight=8, rate=1000.0)
config = replace(folder(), classes=("car", "bus", "dog"), cloud=cloud)
config = replace(config, collect=replace(config.collect, labeler="none"))
uris = storage.list_files(images, ".jpg")
rows = [{"image_id": str(number), "uri": uri} for number, uri in enumerate(uris)]


async def ask() -> pa.Table:
    actor = CloudActor(config, [url], journal, run=run)
    return await actor(pa.Table.from_pylist(rows))


answers = asyncio.run(ask())
counts = answers.select(["status", "calls", "cost_usd"])
storage.write_table(part, counts)
"""


def _start(tmp_path: Path, url: str, run: str) -> subprocess.Popen[bytes]:
    arguments = [url, tmp_path / "images", tmp_path / "journal", tmp_path / "a.parquet"]
    command = [sys.executable, "-c", ASKING, *map(str, arguments), run]
    return subprocess.Popen(command)


def _ask(tmp_path: Path, url: str, run: str) -> pa.Table:
    """Let a process finish and return status, calls and cost of each image."""
    assert _start(tmp_path, url, run).wait(120) == 0
    return storage.read_table(str(tmp_path / "a.parquet"))


def _kill(tmp_path: Path, url: str, run: str, calls: int) -> None:
    process = _start(tmp_path, url, run)
    while storm.fetch_json(f"{url}/count") < calls:
        assert process.poll() is None, "the process ended before it was killed"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_killed_processes_are_in_the_account(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number, image in enumerate(storm.numbered_images(IMAGES)):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(image.data)
    first, second = "collect-0123456789ab", "collect-ba9876543210"
    journal = str(tmp_path / "journal")
    with storm.counting_server(latency=0.05) as url:
        for calls in KILL_AFTER:
            _kill(tmp_path, url, first, calls)
        rows = _ask(tmp_path, url, first)
        statuses = set(rows["status"].to_pylist())
        assert statuses == {"ok"}, "answers of the run's own earlier processes"
        received = storm.fetch_json(f"{url}/stats")["calls"]
        billed = sum(kind in BILLED for _, kind in received)
        account = RunAccount.read(journal, first)
        metrics = account.metrics(calls=0, usd=0.0, cached=0, failed=0)
        assert metrics["made"] == account.run.answered == IMAGES
        in_flight = billed - metrics["made"]
        assert 0 < in_flight <= metrics["maybe_billed"] <= len(KILL_AFTER) * 17
        budget_calls, budget_usd = open_journal(journal).spent()
        assert metrics["made"] + metrics["maybe_billed"] == budget_calls
        assert metrics["cost_usd"] == pytest.approx(budget_usd)
        assert metrics["cost_usd"] == pytest.approx(PRICE * budget_calls)
        again = _ask(tmp_path, url, second)
        assert set(again["status"].to_pylist()) == {"cached"}
        assert storm.fetch_json(f"{url}/count") == len(received)
    other = RunAccount.read(journal, second)
    assert other.run == CallAccount()
    assert other.root == account.root


def test_the_lines_say_what_is_maybe_billed_and_for_which_images() -> None:
    images = pa.table(
        {"image_id": ["a" * 64, "b" * 64], "uri": ["/photos/x.jpg", "s3://b/y.jpg"]}
    )
    run = CallAccount(5, 0.01, ("a" * 16, "b" * 16))
    account = RunAccount(run, CallAccount(9, 0.018, ("a" * 16, "b" * 16)))
    metrics = account.metrics(calls=4, usd=0.0, cached=3, failed=1)
    assert describe_calls(metrics) == (
        "3 calls made, 3 images answered before, 2 maybe billed, $0.01; all runs below"
        " this root: 9 calls, $0.02"
    )
    assert account.describe_unanswered(images) == (
        "2 calls were sent and have no answer on record; they count as spent: x.jpg,"
        " y.jpg"
    )
    assert RunAccount().describe_unanswered(images) == ""


def test_parts_of_a_version_without_accounts_count() -> None:
    metrics = RunAccount().metrics(calls=7, usd=0.7, cached=0, failed=0)
    assert (metrics["made"], metrics["cost_usd"], metrics["root_calls"]) == (7, 0.7, 7)
