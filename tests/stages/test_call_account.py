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

from coin_ray.cloud.journal.base import CallAccount
from coin_ray.cloud.journal.opening import open_journal
from coin_ray.stages.collecting.call_account import RunAccount, describe_calls
from tests.stages import asking
from tests.stages.asking import PRICE

REPOSITORY = Path(__file__).resolve().parents[2]
IMAGES = 90
KILL_AFTER = (20, 60)
"""Calls that the server has received when the asking process is killed."""


Arguments = tuple[str, str, str, str, str]


def _arguments(tmp_path: Path, url: str, run: str, actors: int) -> Arguments:
    images, journal = str(tmp_path / "images"), str(tmp_path / "journal")
    return url, images, journal, run, str(actors)


def _kill(arguments: Arguments, url: str, calls: int) -> None:
    command = [sys.executable, "-m", asking.__name__, *arguments]
    process = subprocess.Popen(command, cwd=REPOSITORY)
    while storm.fetch_json(f"{url}/count") < calls:
        assert process.poll() is None, "the process ended before it was killed"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("actors", [1, 3])
def test_killed_processes_are_in_the_account(tmp_path: Path, actors: int) -> None:
    (tmp_path / "images").mkdir()
    for number, image in enumerate(storm.numbered_images(IMAGES)):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(image.data)
    first, second = "collect-0123456789ab", "collect-ba9876543210"
    journal = str(tmp_path / "journal")
    with storm.counting_server(latency=0.05) as url:
        for calls in KILL_AFTER:
            _kill(_arguments(tmp_path, url, first, actors), url, calls)
        rows = asking.ask(*_arguments(tmp_path, url, first, actors))
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
        again = asking.ask(*_arguments(tmp_path, url, second, actors))
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
