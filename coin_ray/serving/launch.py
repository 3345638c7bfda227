"""Start the local cloud beside a run, and stop it with the run."""

from __future__ import annotations

import os
import secrets
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

EMULATED_CLOUDS = ("demo", "onnx")
"""Small models that stand in for a cloud: one thread, and the latency, limit and faults
of a real one."""
START_SECONDS = 120.0
START_SECONDS_LARGE = 1800.0  # a download may come first
STOP_SECONDS = 5.0
LOG_LINES = 20
POLL_SECONDS = 0.05
LOOPBACK = "127.0.0.1"
SECRET_PATH_VARIABLE = "COIN_RAY_SERVE_PATH"
"""Environment variable with the first segment of the path of every request to a local
cloud that other machines can reach; it is no option, since all users see those."""


def start_services(
    clouds: Sequence[Cloud], root: str, running: ExitStack, host: str = LOOPBACK
) -> list[str]:
    """Return the URL of each cloud. Local ones are started, one server for all
    renderings of one cloud, and stop with ``running``. They listen on the address
    ``host`` of this machine.
    """
    urls: dict[Cloud, str] = {}
    services = [with_plain_rendering(cloud) for cloud in clouds]
    for number, cloud in enumerate(dict.fromkeys(services), 1):
        url = endpoint_for(cloud, adapter_for(cloud))
        if cloud.serve != "none":
            server = local_cloud(cloud, _log_folder(root, number), host)
            url = running.enter_context(server)
        urls[cloud] = url
    return [urls[cloud] for cloud in services]


def _log_folder(root: str, number: int) -> str:
    """Return a local folder for the files of the server with this number."""
    if "://" in root:
        return f"/tmp/coin_ray/{uuid.uuid4().hex}"
    name = "local_cloud" if number == 1 else f"local_cloud_{number}"
    return storage.join(root, name)


@contextmanager
def local_cloud(config: Cloud, folder: str, host: str = LOOPBACK) -> Iterator[str]:
    """Start a local server as ``config.serve`` says and yield its URL; it keeps its log,
    statistics and call log in a local folder.

    It listens on the address ``host`` of this machine. If others can reach that, the
    URL ends with a secret of this run, and every other path is not found.

    It stops with the block, and also when this process is killed. Raises
    ``CloudUnreachable`` with the end of its log if it does not start.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    ready_file, log_file = path / "url", path / "server.log"
    ready_file.unlink(missing_ok=True)
    emulated = config.serve in EMULATED_CLOUDS
    environment = dict(os.environ)
    if emulated:
        environment["OMP_NUM_THREADS"] = "1"
    path_suffix = ""
    if host != LOOPBACK:
        environment[SECRET_PATH_VARIABLE] = secrets.token_hex(16)
        path_suffix = f"/{environment[SECRET_PATH_VARIABLE]}"
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            _server_command(config, path, host),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    try:
        seconds = START_SECONDS if emulated else START_SECONDS_LARGE
        url = _wait_until_ready(process, ready_file, log_file, seconds)
        yield url + path_suffix
    finally:
        _stop(process)


def _server_command(config: Cloud, folder: Path, host: str) -> list[str]:
    options = {
        "--serve": config.serve,
        "--host": host,
        "--parent-pid": str(os.getpid()),
        "--ready-file": str(folder / "url"),
        "--stats-file": str(folder / "stats.json"),
        "--call-log": str(folder / "calls.jsonl"),
    }
    models: tuple[str, ...] = (config.model,)
    if config.serve in EMULATED_CLOUDS:
        models = config.onnx_models
        options["--latency"] = str(config.serve_latency)
        options["--rate"] = str(config.serve_rate)
        options["--faults"] = str(config.serve_faults)
    if config.token_env:
        options["--token-env"] = config.token_env
    command = [sys.executable, "-m", "coin_ray.serving.local_cloud"]
    for option, setting in options.items():
        command += [option, setting]
    if models:
        command += ["--models", *models]
    return command


def _wait_until_ready(
    process: subprocess.Popen[bytes], ready_file: Path, log_file: Path, seconds: float
) -> str:
    """Return the URL that the server wrote once it listened."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        if ready_file.exists():
            return ready_file.read_text()
        time.sleep(POLL_SECONDS)
    lines = log_file.read_text(errors="replace").splitlines()
    tail = "\n".join(lines[-LOG_LINES:])
    raise CloudUnreachable(
        f"the local cloud did not start; the end of {log_file}:\n{tail}"
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
