"""Start a Ray cluster of several nodes on this machine. Each node is a ``ray start`` that
can be killed with all its processes, and replaced."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import httpx
import psutil

REPOSITORY = Path(__file__).resolve().parents[1]
EXCLUDED = [".venv", "runs", ".git", "build", "dist"]
STARTING_MESSAGES = (
    "Failed to connect",
    "No available agent",
    "Connection refused",
    "Couldn't connect",
)
"""Messages of the job server while it starts."""
PATIENT_TIMEOUTS = {
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300",
}
"""Timeouts for a busy machine, which starts processes slowly."""


_taken_ports: set[int] = set()


def free_port() -> int:
    """Return a free port below the range that Linux assigns by itself, and outside Ray's
    10002..19999; each one once, since Ray refuses two services on one port."""
    while True:
        port = 20_000 + int.from_bytes(os.urandom(2)) % 12_000
        if port in _taken_ports:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            _taken_ports.add(port)
            return port


def quiet_environment() -> dict[str, str]:
    """Return the environment of a node or a client: this Python first on the path, and no
    telemetry."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    quiet = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
    }
    inherited = dict(os.environ)
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        inherited.pop(name, None)
    return inherited | quiet | {"PATH": path}


class Cluster:
    """A head with ``head_cpus`` CPUs; ``add`` starts further nodes. ``variables``:
    environment variables of all its processes."""

    def __init__(
        self, head_cpus: int = 0, variables: dict[str, str] | None = None, *options: str
    ) -> None:
        self.variables = variables or {}
        self.options, self.head_cpus = options, head_cpus
        self.port, self.dashboard = free_port(), free_port()
        # short: Ray's sockets lie below it, and a socket's name has 107 bytes
        self.folder = tempfile.mkdtemp(prefix="r", dir="/tmp")
        self.nodes: list[subprocess.Popen[bytes]] = []
        try:
            self.start_head()
        except BaseException:
            self.close()
            raise

    def start_head(self) -> None:
        """Start the head, or start it again after it was killed; it has no persistent state."""
        ports = [
            f"--port={self.port}",
            f"--dashboard-port={self.dashboard}",
            f"--ray-client-server-port={free_port()}",
        ]
        head = [
            "--head",
            "--include-dashboard=true",
            "--dashboard-host=127.0.0.1",
            *ports,
        ]
        self.head = self._start(self.head_cpus, *head, *self.options)
        self.job_server_url = f"http://127.0.0.1:{self.dashboard}"
        self._wait_until_reachable()

    def add(self, cpus: int, *options: str) -> subprocess.Popen[bytes]:
        """Start a node that joins the head's cluster."""
        node = self._start(cpus, f"--address=127.0.0.1:{self.port}", *options)
        self.nodes.append(node)
        return node

    def _start(self, cpus: int, *options: str) -> subprocess.Popen[bytes]:
        ray = str(Path(sys.executable).parent / "ray")
        node_folder = tempfile.mkdtemp(prefix="n", dir=self.folder)
        command = [
            ray,
            "start",
            "--block",
            f"--num-cpus={cpus}",
            "--disable-usage-stats",
            f"--temp-dir={node_folder}",
        ]
        command += [f"--dashboard-agent-listen-port={free_port()}", *options]
        variables = quiet_environment() | PATIENT_TIMEOUTS | self.variables
        log = (Path(node_folder) / "start.log").open("wb")
        return subprocess.Popen(
            command, env=variables, stdout=log, stderr=log, start_new_session=True
        )

    def _wait_until_reachable(self) -> None:
        """Wait until the job server answers, which takes some seconds."""
        give_up_at = time.monotonic() + 300
        while True:
            completed = self.client("job", "list")
            if completed.returncode == 0:
                return
            assert time.monotonic() < give_up_at, completed.stdout + completed.stderr
            assert self.head.poll() is None, f"the head has ended: {self.said()}"
            time.sleep(1)

    def said(self) -> str:
        """Return the end of each node's output."""
        return "\n".join(
            log.read_text(errors="replace")[-2000:]
            for log in Path(self.folder).glob("n*/start.log")
        )

    def client(
        self, *arguments: str, timeout: float = 560
    ) -> subprocess.CompletedProcess[str]:
        ray = str(Path(sys.executable).parent / "ray")
        variables = quiet_environment() | {"RAY_ADDRESS": self.job_server_url}
        return subprocess.run(
            [ray, *arguments],
            cwd=REPOSITORY,
            env=variables,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def submit(
        self, name: str, entrypoint: list[str], variables: dict[str, str] | None = None
    ) -> None:
        """Submit a program of the checkout as a job of that name, without waiting for it."""
        runtime_env = {
            "excludes": EXCLUDED,
            "env_vars": (
                {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
                | PATIENT_TIMEOUTS
                | (variables or {})
            ),
        }
        options = [
            "--submission-id",
            name,
            "--no-wait",
            "--working-dir",
            str(REPOSITORY),
            "--runtime-env-json",
            json.dumps(runtime_env),
        ]
        for _ in range(30):
            completed = self.client("job", "submit", *options, "--", *entrypoint)
            if completed.returncode == 0:
                return
            output_text = completed.stdout + completed.stderr
            assert any(message in output_text for message in STARTING_MESSAGES), (
                output_text
            )
            time.sleep(2)

    def status(self, name: str) -> str:
        """Return PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED or, if the head does not
        answer, an empty string.

        Sends the HTTP request of ``ray job status``, which takes seconds of a core to
        start.
        """
        try:
            answer = httpx.get(f"{self.job_server_url}/api/jobs/{name}", timeout=60)
        except httpx.TransportError:
            return ""
        return str(answer.json()["status"]) if answer.status_code == 200 else ""

    def logs(self, name: str) -> str:
        return self.client("job", "logs", name).stdout

    def wait(self, name: str, seconds: float = 1800) -> str:
        """Wait until the job has ended, and return its log. Fails if the job failed."""
        give_up_at = time.monotonic() + seconds
        while (state := self.status(name)) not in ("SUCCEEDED", "FAILED", "STOPPED"):
            assert time.monotonic() < give_up_at, (
                f"{name} is still {state}: {self.logs(name)[-3000:]}"
            )
            time.sleep(5)
        log = self.logs(name)
        assert state == "SUCCEEDED", log[-4000:]
        return log

    def workers(self, word: str) -> list[psutil.Process]:
        """Return the worker processes of all nodes whose title contains ``word``; Ray's titles
        are ``ray::NAME``."""
        return [
            p
            for node in [self.head, *self.nodes]
            for p in _node_processes(node)
            if word in _process_title(p)
        ]

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        for node in [*self.nodes, self.head]:
            kill_node(node)
        shutil.rmtree(self.folder, ignore_errors=True)


def _node_processes(node: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return the process tree of a node: processes of a job may leave the session, but not
    the tree."""
    try:
        process = psutil.Process(node.pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _process_title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def kill_node(node: subprocess.Popen[bytes]) -> None:
    """Kill every process of a node at once, as a power failure does."""
    for process in _node_processes(node):
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    node.wait(timeout=60)


def wait_until(
    has_happened: Callable[[], bool], event: str, seconds: float = 1200
) -> None:
    """Wait until the condition is true; fail after so many seconds."""
    give_up_at = time.monotonic() + seconds
    while not has_happened():
        assert time.monotonic() < give_up_at, f"waited {seconds:.0f} s for {event}"
        time.sleep(0.05)


@contextmanager
def start_cluster(
    *cpus: int, head_cpus: int = 0, variables: dict[str, str] | None = None
) -> Iterator[Cluster]:
    """Start a head, and one node with each of these numbers of CPUs."""
    with Cluster(head_cpus, variables) as cluster:
        for count in cpus:
            cluster.add(count)
        yield cluster
