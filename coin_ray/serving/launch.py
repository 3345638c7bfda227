"""Start the local cloud beside a run, and end it with the run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from coin_ray import storage
from coin_ray.cloud.services import adapter_for, endpoint_for
from coin_ray.config import Cloud, with_plain_rendering
from coin_ray.errors import CloudUnreachable

EMULATED = ("demo", "onnx")
"""Small models that stand in for a cloud: one thread, and the latency, limit and faults
of a real one."""
START_SECONDS = 120.0
START_SECONDS_LARGE = 1800.0  # a download may come first
STOP_SECONDS = 5.0
LOG_TAIL = 20
POLL = 0.05


def start_services(clouds: Sequence[Cloud], root: str, running: ExitStack) -> list[str]:
    """Where each cloud answers; local ones are started, one server for all views of
    one, and end with ``running``.
    """
    urls: dict[Cloud, str] = {}
    servers = [with_plain_rendering(cloud) for cloud in clouds]
    for number, cloud in enumerate(dict.fromkeys(servers), 1):
        name = "local_cloud" if number == 1 else f"local_cloud_{number}"
        folder = (
            storage.join(root, name)
            if "://" not in root
            else f"/tmp/coin_ray/{uuid.uuid4().hex}"
        )
        url = endpoint_for(cloud, adapter_for(cloud))
        urls[cloud] = (
            url
            if cloud.serve == "none"
            else running.enter_context(local_cloud(cloud, folder))
        )
    return [urls[cloud] for cloud in servers]


@contextmanager
def local_cloud(config: Cloud, folder: str) -> Iterator[str]:
    """The URL of a local server as ``config.serve`` says; it keeps its log, statistics
    and call log in a local folder.

    It ends with the block, and also when this process is killed. Raises
    ``CloudUnreachable`` with the end of its log if it does not start.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    ready = place / "url"
    ready.unlink(missing_ok=True)
    with (place / "server.log").open("wb") as log:
        environment = (
            {**os.environ, "OMP_NUM_THREADS": "1"} if config.serve in EMULATED else None
        )
        process = subprocess.Popen(
            _command(config, place),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    try:
        seconds = START_SECONDS if config.serve in EMULATED else START_SECONDS_LARGE
        yield _wait_ready(process, ready, place / "server.log", seconds)
    finally:
        _stop(process)


def _command(config: Cloud, folder: Path) -> list[str]:
    command = [
        sys.executable,
        "-m",
        "coin_ray.serving.local_cloud",
        "--serve",
        config.serve,
        "--parent-pid",
        str(os.getpid()),
    ]
    if config.serve in EMULATED:
        command += [
            "--latency",
            str(config.serve_latency),
            "--rate",
            str(config.serve_rate),
            "--faults",
            str(config.serve_faults),
        ]
    command += [
        "--ready-file",
        str(folder / "url"),
        "--stats-file",
        str(folder / "stats.json"),
    ]
    command += ["--call-log", str(folder / "calls.jsonl")]
    if config.token_env:
        command += ["--token-env", config.token_env]
    models = config.onnx_models if config.serve in EMULATED else (config.model,)
    if models:
        command += ["--models", *models]
    return command


def _wait_ready(
    process: subprocess.Popen[bytes], ready: Path, log: Path, seconds: float
) -> str:
    give_up_at = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < give_up_at:
        if ready.exists():
            return ready.read_text()
        time.sleep(POLL)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL:])
    raise CloudUnreachable(f"the local cloud did not start; the end of {log}:\n{tail}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
