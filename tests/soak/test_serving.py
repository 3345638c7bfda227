"""A server under minutes of mixed good and bad requests: no answer but 2xx, 4xx and
503, and flat memory. ``make soak``.

``COIN_SOAK_SECONDS``: 600 unless told. ``COIN_SOAK_SERVER``: ``ray`` (Ray Serve, what
``serve run`` starts) unless told ``alone``.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
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

from coin_ray.predictors.student import write_exported
from tests.builders import CLASSES, tiny_detector
from tests.soak.load import Load, Seen, tree_mib

UNDER_RAY = os.environ.get("COIN_SOAK_SERVER", "ray") == "ray"
SECONDS = float(os.environ.get("COIN_SOAK_SECONDS", "600"))
QUEUE_MAX = 6
CLIENTS = 10
START_SECONDS = 900.0
WARM_UP_MIB = 400.0
"""What libraries and the allocator take while images of every size come for the first
time."""
REPOSITORY = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def server(tmp_path: Path, *, ray: bool) -> Iterator[tuple[str, psutil.Process]]:
    """The URL and the first process of a server with a student, by itself or under Ray
    Serve."""
    export, port = str(tmp_path / "student"), free_port()
    write_exported(tiny_detector(score_min=0.01), CLASSES, export)
    alone = [
        "-m",
        "coin_ray.serving.local_cloud",
        "--serve",
        "checkpoint",
        "--models",
        export,
        "--port",
        str(port),
    ]
    command = (
        ["-m", "tests.soak.host", export, str(port), str(QUEUE_MAX)]
        if ray
        else [*alone, "--queue-max", str(QUEUE_MAX), "--pixels-max", "50000000"]
    )
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
        _wait(url, process, tmp_path / "server.log")
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    give_up_at = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < give_up_at:
        try:
            if httpx.get(f"{url}/health/ready").status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    pytest.fail(f"the server did not start:\n{log.read_text(errors='replace')[-3000:]}")


def loaded(tmp_path: Path, seconds: float, *, ray: bool) -> Seen:
    torch.set_num_threads(1)
    with server(tmp_path, ray=ray) as (url, process):
        seen = asyncio.run(
            Load(url, CLASSES, CLIENTS).run(seconds, lambda: tree_mib(process))
        )
        assert process.is_running()
        assert httpx.get(f"{url}/health/ready").status_code == 200
    return seen


def check(seen: Seen) -> None:
    assert seen.bad_statuses() == []
    assert not seen.failed
    found = seen.answers
    assert found["good", 200] > 0
    assert {s for kind, s in found if kind in ("text as image", "half an image")} <= {
        415,
        503,
    }
    assert {s for kind, s in found if kind == "image bomb"} <= {413, 503}


def test_fifteen_seconds_of_mixed_requests_get_2xx_4xx_or_503_in_bounded_memory(
    tmp_path: Path,
) -> None:
    seen = loaded(tmp_path, 15.0, ray=False)
    check(seen)
    before, most = seen.memory[0][1], max(m for _, m in seen.memory)
    assert most - before < WARM_UP_MIB, (
        "one image bomb alone would take 192 MiB, a body that is kept 1 MiB"
    )


@pytest.mark.soak
@pytest.mark.timeout(SECONDS + 600)
def test_minutes_of_mixed_requests_get_2xx_4xx_or_503_and_memory_stays_flat(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if UNDER_RAY:
        pytest.importorskip("grpc_reflection", reason="needs the extra serve")
    seen = loaded(tmp_path, SECONDS, ray=UNDER_RAY)
    with capsys.disabled():
        print(
            f"\n{seen.table()}\n{json.dumps({'server': 'ray' if UNDER_RAY else 'alone', **seen.as_json()})}"
        )
    check(seen)
    assert seen.flat(), seen.growth()


def test_growing_memory_and_a_500_would_be_noticed() -> None:
    seen = Seen(memory=[(float(t), 1000.0 + t) for t in range(200)])
    assert not seen.flat()
    assert Seen(memory=[(float(t), 1000.0 + t % 40) for t in range(200)]).flat()
    seen.answers["good", 500] += 1
    seen.answers["good", 503] += 1
    assert seen.bad_statuses() == [("good", 500)]
