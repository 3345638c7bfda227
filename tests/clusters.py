"""A Ray cluster of several nodes on this machine: each one a ``ray start`` of its own,
to be killed whole and to be replaced."""

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
NOT_YET = (
    "Failed to connect",
    "No available agent",
    "Connection refused",
    "Couldn't connect",
)
"""What the job server says while it starts."""
SLOW = {
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300",
}
"""A busy machine starts processes slowly; that is no fault."""


def free_port() -> int:
    """Below the range that Linux hands out by itself, and beside Ray's own
    10002..19999."""
    while True:
        port = 20_000 + int.from_bytes(os.urandom(2)) % 12_000
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def environment() -> dict[str, str]:
    """Of a node or a client: this checkout, this Python, nothing asked of the network."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    quiet = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
    }
    return (
        {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        | quiet
        | {"PATH": path}
    )


class Cluster:
    """The head has no CPUs of its own unless told otherwise; ``add`` starts further
    nodes. ``more``: variables of all its processes."""

    def __init__(
        self, head_cpus: int = 0, more: dict[str, str] | None = None, *options: str
    ) -> None:
        self.more, self.options, self.head_cpus = more or {}, options, head_cpus
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
        """The head, also again after it was killed; it remembers nothing."""
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
        self.jobs_at = f"http://127.0.0.1:{self.dashboard}"
        self._until_reachable()

    def add(self, cpus: int, *options: str) -> subprocess.Popen[bytes]:
        """A node that joins the head's cluster."""
        node = self._start(cpus, f"--address=127.0.0.1:{self.port}", *options)
        self.nodes.append(node)
        return node

    def _start(self, cpus: int, *options: str) -> subprocess.Popen[bytes]:
        ray = str(Path(sys.executable).parent / "ray")
        place = tempfile.mkdtemp(prefix="n", dir=self.folder)
        command = [
            ray,
            "start",
            "--block",
            f"--num-cpus={cpus}",
            "--disable-usage-stats",
            f"--temp-dir={place}",
        ]
        command += [f"--dashboard-agent-listen-port={free_port()}", *options]
        surroundings = environment() | SLOW | self.more
        log = (Path(place) / "start.log").open("wb")
        return subprocess.Popen(
            command, env=surroundings, stdout=log, stderr=log, start_new_session=True
        )

    def _until_reachable(self) -> None:
        """The job server takes some seconds."""
        give_up_at = time.monotonic() + 300
        while True:
            done = self.client("job", "list")
            if done.returncode == 0:
                return
            assert time.monotonic() < give_up_at, done.stdout + done.stderr
            assert self.head.poll() is None, f"the head has ended: {self.said()}"
            time.sleep(1)

    def said(self) -> str:
        """The ends of what the nodes printed."""
        return "\n".join(
            log.read_text(errors="replace")[-2000:]
            for log in Path(self.folder).glob("n*/start.log")
        )

    def client(
        self, *arguments: str, timeout: float = 560
    ) -> subprocess.CompletedProcess[str]:
        ray = str(Path(sys.executable).parent / "ray")
        where = environment() | {"RAY_ADDRESS": self.jobs_at}
        return subprocess.run(
            [ray, *arguments],
            cwd=REPOSITORY,
            env=where,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def submit(
        self, name: str, entry: list[str], variables: dict[str, str] | None = None
    ) -> None:
        """Submit a program of the checkout as a job of that name; it runs by itself."""
        surroundings = {
            "excludes": EXCLUDED,
            "env_vars": (
                {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
                | SLOW
                | (variables or {})
            ),
        }
        job = [
            "--submission-id",
            name,
            "--no-wait",
            "--working-dir",
            str(REPOSITORY),
            "--runtime-env-json",
            json.dumps(surroundings),
        ]
        for _ in range(30):
            done = self.client("job", "submit", *job, "--", *entry)
            if done.returncode == 0:
                return
            assert any(reason in done.stdout + done.stderr for reason in NOT_YET), (
                done.stdout + done.stderr
            )
            time.sleep(2)

    def status(self, name: str) -> str:
        """PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED or, of a head that does not
        answer, an empty word.

        Asked over HTTP, as ``ray job status`` would: that takes seconds of a core to
        start.
        """
        try:
            answer = httpx.get(f"{self.jobs_at}/api/jobs/{name}", timeout=60)
        except httpx.TransportError:
            return ""
        return str(answer.json()["status"]) if answer.status_code == 200 else ""

    def logs(self, name: str) -> str:
        return self.client("job", "logs", name).stdout

    def wait(self, name: str, seconds: float = 1800) -> str:
        """Until the job has ended; returns its log. Fails if it did not succeed."""
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
        """Worker processes of all nodes whose title holds ``word``, as Ray writes it:
        ``ray::NAME``."""
        return [
            p
            for node in [self.head, *self.nodes]
            for p in _family(node)
            if word in _title(p)
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


def _family(node: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """All processes of a node: what a job starts may leave the session, but not the
    tree."""
    try:
        return [
            psutil.Process(node.pid),
            *psutil.Process(node.pid).children(recursive=True),
        ]
    except psutil.NoSuchProcess:
        return []


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def kill_node(node: subprocess.Popen[bytes]) -> None:
    """As a machine that loses its power: every process at once."""
    for process in _family(node):
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    node.wait(timeout=60)


def until(happened: Callable[[], bool], what: str, seconds: float = 1200) -> None:
    give_up_at = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < give_up_at, (
            f"waited {seconds:.0f} s in vain for: {what}"
        )
        time.sleep(0.05)


@contextmanager
def cluster_of(
    *cpus: int, head_cpus: int = 0, more: dict[str, str] | None = None
) -> Iterator[Cluster]:
    """A head and one node for each number."""
    with Cluster(head_cpus, more) as cluster:
        for count in cpus:
            cluster.add(count)
        yield cluster
