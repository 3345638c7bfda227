"""Check that a server under minutes of valid and invalid requests answers only with 2xx,
4xx and 503, and that its memory stays flat: ``make soak``.

``COIN_SOAK_SECONDS``: 600 by default. ``COIN_SOAK_SERVER``: ``ray`` (the default: Ray
Serve, as ``serve run`` starts it) or ``alone``.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
import torch

from coin_ray.predictors.student import write_exported_student
from tests.builders import CLASSES, tiny_detector
from tests.clusters import free_port
from tests.soak.load import Load, LoadRecord, process_tree_mib

UNDER_RAY = os.environ.get("COIN_SOAK_SERVER", "ray") == "ray"
SECONDS = float(os.environ.get("COIN_SOAK_SECONDS", "600"))
QUEUE_MAX = 6
CLIENTS = 10
START_SECONDS = 900.0
WARM_UP_MIB = 400.0
"""Memory that libraries and the allocator take for the first images of every size."""
REPOSITORY = Path(__file__).parents[2]


@contextmanager
def _start_server(tmp_path: Path, *, ray: bool) -> Iterator[tuple[str, psutil.Process]]:
    """Start a server with a student, alone or under Ray Serve; yield its URL and its first
    process."""
    export, port = str(tmp_path / "student"), free_port()
    write_exported_student(tiny_detector(score_min=0.01), CLASSES, export)
    if ray:
        command = ["-m", "tests.soak.host", export, str(port), str(QUEUE_MAX)]
    else:
        command = [
            *("-m", "coin_ray.serving.local_cloud", "--serve", "checkpoint"),
            *("--models", export, "--port", str(port)),
            *("--queue-max", str(QUEUE_MAX), "--pixels-max", "50000000"),
        ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=REPOSITORY,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(url, process, tmp_path / "server.log")
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    give_up_at = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < give_up_at:
        try:
            if httpx.get(f"{url}/health/ready").status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    pytest.fail(f"the server did not start:\n{log.read_text(errors='replace')[-3000:]}")


def _record_load(tmp_path: Path, seconds: float, *, ray: bool) -> LoadRecord:
    torch.set_num_threads(1)
    with _start_server(tmp_path, ray=ray) as (url, process):
        record = asyncio.run(
            Load(url, CLASSES, CLIENTS).run(seconds, lambda: process_tree_mib(process))
        )
        assert process.is_running()
        assert httpx.get(f"{url}/health/ready").status_code == 200
    return record


def _check_record(record: LoadRecord) -> None:
    assert record.bad_statuses() == []
    assert not record.failed
    assert record.answers["good", 200] > 0
    undecodable = ("text as image", "half an image")
    statuses = {status for kind, status in record.answers if kind in undecodable}
    assert statuses <= {415, 503}
    statuses = {status for kind, status in record.answers if kind == "image bomb"}
    assert statuses <= {413, 503}


@pytest.mark.slow
def test_fifteen_seconds_of_mixed_requests_get_2xx_4xx_or_503_in_bounded_memory(
    tmp_path: Path,
) -> None:
    record = _record_load(tmp_path, 15.0, ray=False)
    _check_record(record)
    memory = [mib for _, mib in record.memory]
    assert max(memory) - memory[0] < WARM_UP_MIB, (
        "a decoded image bomb would take 192 MiB, a leaked request body 1 MiB"
    )


@pytest.mark.soak
@pytest.mark.timeout(SECONDS + 600)
def test_minutes_of_mixed_requests_get_2xx_4xx_or_503_and_memory_stays_flat(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if UNDER_RAY:
        pytest.importorskip("grpc_reflection", reason="needs the extra serve")
    record = _record_load(tmp_path, SECONDS, ray=UNDER_RAY)
    with capsys.disabled():
        server = "ray" if UNDER_RAY else "alone"
        figures = json.dumps({"server": server, **record.as_json()})
        print(f"\n{record.table()}\n{figures}")
    _check_record(record)
    assert record.is_flat(), record.growth()


def test_growing_memory_and_a_500_would_be_noticed() -> None:
    record = LoadRecord(memory=[(float(t), 1000.0 + t) for t in range(200)])
    assert not record.is_flat()
    assert LoadRecord(
        memory=[(float(t), 1000.0 + t % 40) for t in range(200)]
    ).is_flat()
    record.answers["good", 500] += 1
    record.answers["good", 503] += 1
    assert record.bad_statuses() == [("good", 500)]
