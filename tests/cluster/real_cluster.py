"""A cluster that the commands of docs/cluster.md start on three machines, and its jobs."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docs_page
import httpx
import psutil
from machines import (
    Machine,
    Network,
    create_key,
    die_with_parent,
    install_environment,
)
from servers import (
    BUCKET,
    CHECKPOINT,
    CREDENTIALS,
    TRACKING_URL,
    ObjectStore,
    TrackingServer,
)

REPOSITORY = Path(__file__).resolve().parents[2]
CLUSTER_FILE = "deploy/cluster-onprem.yaml"
SECTION = "Machines of your own"
DOCUMENTED_HOSTS = ("192.0.2.10", "192.0.2.11", "192.0.2.12")
TRAIN, VAL, TEST = 24, 4, 8
IMAGES_ASKED = TRAIN + TEST
SMALL = (
    *("--data.train", str(TRAIN), "--data.val", str(VAL), "--data.test", str(TEST)),
    *("--propagate.fit.steps", "12", "--propagate.fit.checkpoint-every", "1"),
    *("--distill.fit.steps", "12", "--distill.fit.checkpoint-every", "1"),
    *("--distill.burn-up", "4", "--collect.batch", "4", "--cloud.in-flight", "4"),
    *("--cloud.serve-latency", "1", "--cloud.serve-faults", "0"),
)
"""Settings of a small run of the demo, which asks for about four images a second. It
saves a checkpoint after every step of a training.
"""
FIGURES = ("map50", "map50_unknown", "per_class", "separation")
RUN = "pipelines/full.py"
SEARCH = "tune/search.py"
"""Programs of a job."""
SEARCH_OPTIONS = (
    *("--space", "loss-weights", "--algorithm", "random", "--scheduler", "none"),
    *("--trials", "3", "--concurrent", "2"),
)
DEMO = "the whole demo"
OPTIONS = {RUN: SMALL, SEARCH: (*SMALL, *SEARCH_OPTIONS), DEMO: ()}
LAST_FILES = {
    RUN: "summary.json",
    SEARCH: "search/loss-weights-map50/search.json",
    DEMO: "summary.json",
}
"""What a program writes when it has done its work."""
RAY_PROCESSES = ("raylet", "gcs_server", "ray::", "dashboard/")
POLL_SECONDS = 0.2
SECONDS_AFTER_KILL = 10.0
UP_SECONDS = 900.0
DOWN_SECONDS = 300.0
SUBMIT_SECONDS = 300.0
JOB_SECONDS = 1200.0
"""Longest times, for machines on which much else runs."""


def wait_until(
    has_happened: Callable[[], object], event: str, seconds: float = JOB_SECONDS
) -> None:
    """Wait until the condition is true. Raises TimeoutError after so many seconds."""
    give_up_at = time.monotonic() + seconds
    while not has_happened():
        if time.monotonic() > give_up_at:
            raise TimeoutError(f"waited {seconds:.0f} s for {event}")
        time.sleep(POLL_SECONDS)


class Office:
    """The user's own machine: a copy of the checkout, a home, and a terminal."""

    def __init__(self, folder: Path, machines: list[Machine], key: Path) -> None:
        self.home = folder / "office"
        self.checkout = folder / "checkout"
        self.home.mkdir()
        _copy_checkout(self.checkout)
        _fill_in_cluster_file(self.checkout / CLUSTER_FILE, machines, key)
        self.variables = os.environ | CREDENTIALS
        self.variables |= {
            "HOME": str(self.home),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_USAGE_STATS_ENABLED": "0",
            # pip reaches no registry here
            "PIP_NO_BUILD_ISOLATION": "false",
        }
        for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
            self.variables.pop(name, None)

    def type(self, command: str, seconds: float = UP_SECONDS) -> str:
        """Run a command of the page, after the page's ``export`` lines, and return its
        output. Raises RuntimeError if it fails.
        """
        completed = subprocess.run(
            ["bash", "-c", self._with_exports(command)],
            cwd=self.checkout,
            env=self.variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
        if completed.returncode:
            raise RuntimeError(f"{command}\n{completed.stdout[-4000:]}")
        return completed.stdout

    def leave_open(self, command: str) -> subprocess.Popen[bytes]:
        """Run a command of the page in a terminal of its own."""
        return subprocess.Popen(
            ["bash", "-c", f"exec {self._with_exports(command, ' ')}"],
            cwd=self.checkout,
            env=self.variables | {"RAY_AUTH_MODE": "token"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=die_with_parent,
        )

    def _with_exports(self, command: str, separator: str = "; ") -> str:
        if separator == " ":
            return command
        exports = [c for c in docs_page.commands(SECTION) if c.startswith("export ")]
        return separator.join([*exports, command])


def _copy_checkout(target: Path) -> None:
    """Copy the files that git knows or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        source = REPOSITORY / name
        if name and source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)
    shutil.copy(REPOSITORY / ".gitignore", target / ".gitignore")


def _fill_in_cluster_file(path: Path, machines: list[Machine], key: Path) -> None:
    """Put addresses and key into the file, as its reader does."""
    text = path.read_text()
    for documented, machine in zip(DOCUMENTED_HOSTS, machines, strict=True):
        if documented not in text:
            raise ValueError(f"{path} does not name {documented}")
        text = text.replace(documented, machine.address)
    path.write_text(text.replace("~/.ssh/id_ed25519", str(key)))


@dataclass
class Job:
    """A submitted run or search."""

    name: str
    cluster: RealCluster
    program: str = RUN
    started: float = field(default_factory=time.time)
    seconds: float = 0.0
    served_before: int = 0
    """Calls that were counted on a head which has lost its power."""
    submissions: int = 1
    disturbed_at: float | None = None
    """When a training was disturbed, by the monotonic clock."""
    tracked_steps: list[str] = field(default_factory=list)
    """The finished steps that MLflow has."""

    @property
    def prefix(self) -> str:
        """Return the prefix of the run's objects in the bucket."""
        return f"runs/{self.name}"

    def log(self) -> str:
        """Return what the job has printed."""
        pattern = f"ray/session_2*/logs/job-driver-{self.name}-*.log"
        logs = sorted(self.cluster.head.path("/tmp").glob(pattern))
        return "\n".join(log.read_text(errors="replace") for log in logs)

    def served_calls(self) -> int:
        """Return the calls that the cloud of this run has received."""
        logs = self.cluster.head.path("/tmp/coin_ray").glob("*/calls.jsonl")
        recent = [log for log in logs if log.stat().st_ctime >= self.started]
        return self.served_before + sum(log.read_text().count("\n") for log in recent)

    def has_checkpoint(self, step: str) -> bool:
        """Return whether the training of a step has saved a checkpoint."""
        keys = self.cluster.store.keys(f"{self.prefix}/steps/{step}-")
        return any(key.endswith(CHECKPOINT) for key in keys)

    def recovery_seconds(self) -> float | None:
        """Return the time from the disturbance of a training to its next step, at whose
        end a checkpoint is stored; None: no training was disturbed.
        """
        if self.disturbed_at is None:
            return None
        later = [
            stored_at
            for stored_at, path in self.cluster.store.checkpoints
            if f"/{self.prefix}/" in path and stored_at > self.disturbed_at
        ]
        return later[0] - self.disturbed_at if later else None

    def is_running(self) -> bool:
        """Return whether the job's process runs."""
        return bool(self.cluster.head.processes(f"/runs/{self.name} "))

    def is_finished(self) -> bool:
        """Return whether the program has done its work."""
        return self._read(LAST_FILES[self.program]) is not None

    def _read(self, name: str) -> Any:
        return self.cluster.store.read_json(f"{self.prefix}/{name}")

    def _last_file(self) -> Any:
        content = self._read(LAST_FILES[self.program])
        if content is None:
            raise AssertionError(f"{self.name} did not end well:\n{self.log()[-4000:]}")
        return content

    def calls(self) -> dict[str, Any]:
        """Return the account of the calls. Raises AssertionError if there is none."""
        self._last_file()
        (manifest,) = [
            key
            for key in self.cluster.store.keys(f"{self.prefix}/steps/collect-")
            if key.endswith("/manifest.json")
        ]
        account: dict[str, Any]
        account = self.cluster.store.read_json(manifest)["metrics"]["calls"]
        return account

    def figures(self) -> dict[str, Any]:
        """Return what must be the same in a disturbed job: the summary's figures and
        the losses of both trainings to the last digit, or those of a search's trials.
        """
        content = self._last_file()
        if self.program == SEARCH:
            return {
                f"trial {trial['number']}": trial | {"seconds": 0.0}
                for trial in content["trials"]
            }
        figures = {name: content[name] for name in FIGURES}
        figures["steps in MLflow"] = self.tracked_steps
        for key in sorted(self.cluster.store.keys(f"{self.prefix}/steps/")):
            if key.endswith("/curve.json"):
                step = key.split("/")[-2].partition("-")[0]
                figures[f"curve of {step}"] = self.cluster.store.read_json(key)
        return figures


class RealCluster:
    """A head and two workers, with an object store and MLflow beside them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        Network()
        key = folder / "key"
        create_key(key)
        self.machines = []
        for number in range(len(DOCUMENTED_HOSTS)):
            machine_folder = folder / f"machine{number}"
            self.machines.append(Machine(number, machine_folder, key))
        self.head, *self.workers = self.machines
        packages = Path(psutil.__file__).parents[1]
        install_environment(self.machines, packages)
        self.store = ObjectStore()
        self.tracking = TrackingServer(folder)
        self.office = Office(folder, self.machines, key)
        self._write_secrets()
        self._tunnel: subprocess.Popen[bytes] | None = None

    def _write_secrets(self) -> None:
        lines = [f"export {name}={text}\n" for name, text in CREDENTIALS.items()]
        for machine in self.machines:
            secrets = machine.home / ".config/coin_ray/secrets.sh"
            secrets.parent.mkdir(parents=True)
            secrets.write_text("".join(lines))
            secrets.chmod(0o600)
            machine.give_home_to_user()

    def up(self) -> None:
        """Start the cluster by the page's commands, and wait for both workers and for
        the tracking server."""
        for start in ("ray get-auth-token", "python -m pip wheel", "ray up"):
            self.office.type(docs_page.command(SECTION, start))
        wait_until(self._has_all_nodes, "both workers", UP_SECONDS)
        self.tracking.wait_until_ready()

    def _has_all_nodes(self) -> bool:
        """Return whether all machines have joined, as the page's command says."""
        if not self.is_complete():
            return False
        status = self.office.type(docs_page.command(SECTION, "ray exec"))
        return f" {len(self.machines)} local.cluster.node" in status

    def start_afresh(self) -> None:
        """Switch every machine off and on, and start the cluster again."""
        self.store.refused_share = 0.0
        self.store.come_back()
        for machine in self.machines:
            if machine.is_on():
                machine.cut_power()
            machine.switch_on()
        self.up()

    def is_complete(self) -> bool:
        """Return whether all machines have joined, as far as their processes say."""
        return all(
            machine.processes("raylet/raylet") and machine.processes("dashboard/agent")
            for machine in self.machines
        )

    def count_nodes(self) -> int:
        """Return the nodes that the head takes for alive; 0 if it does not answer."""
        self._open_tunnel()
        token = (self.office.home / ".ray/auth_token").read_text().strip()
        try:
            answer = httpx.get(
                "http://127.0.0.1:8265/api/v0/nodes",
                headers={"Authorization": f"Bearer {token}"},
                timeout=10,
            )
        except httpx.TransportError:
            return 0
        nodes = answer.json()["data"]["result"]["result"]
        return sum(node["state"] == "ALIVE" for node in nodes)

    def join_again(self) -> None:
        """Wait until workers that were away have joined again."""
        wait_until(
            lambda: self.is_complete() and self.count_nodes() == len(self.machines),
            "the nodes that were away",
            UP_SECONDS,
        )

    def _open_tunnel(self) -> None:
        if self._tunnel is None or self._tunnel.poll() is not None:
            dashboard = docs_page.command(SECTION, "ray dashboard")
            self._tunnel = self.office.leave_open(dashboard)

    def submit(self, name: str, program: str = RUN) -> Job:
        """Submit the page's first job, as a small run below ``runs/NAME``, a search in
        the same way, or the whole demo as it is on the page.
        """
        job = Job(name, self, program)
        self._submit(job)
        return job

    def seconds_alone(self) -> float:
        """Run the whole demo of the page without a cluster, and return its time."""
        command = docs_page.command(SECTION, "ray job submit").partition(" -- ")[2]
        command = command.replace("s3://BUCKET/runs/demo", f"s3://{BUCKET}/runs/alone")
        variables = f"PYTHONPATH=. MLFLOW_TRACKING_URI={TRACKING_URL}"
        started = time.monotonic()
        self.office.type(f"unset RAY_ADDRESS; {variables} {command}", JOB_SECONDS)
        return time.monotonic() - started

    def submit_again(self, job: Job) -> None:
        """Give the same command again, under another submission id."""
        job.submissions += 1
        self._submit(job)

    def _submit(self, job: Job) -> None:
        command = docs_page.command(SECTION, "ray job submit")
        for documented, word in {
            "s3://BUCKET/runs/demo": f"s3://{BUCKET}/{job.prefix}",
            "--submission-id demo": f"--submission-id {job.name}-{job.submissions}",
            "http://127.0.0.1:5000": TRACKING_URL,
            RUN: SEARCH if job.program == SEARCH else RUN,
        }.items():
            assert documented in command, f"{documented} is not in {command}"
            command = command.replace(documented, word)
        command = f"{command} {shlex.join(OPTIONS[job.program])}"
        give_up_at = time.monotonic() + SUBMIT_SECONDS
        while True:
            self._open_tunnel()
            try:
                self.office.type(command)
                break
            except RuntimeError as error:
                is_starting = "Failed to connect" in str(error)
                if not is_starting or time.monotonic() > give_up_at:
                    raise
                time.sleep(1)  # the tunnel is not open yet
        wait_until(
            lambda: job.is_running() or job.is_finished(),
            f"the start of {job.name}",
            SUBMIT_SECONDS,
        )

    def finish(self, job: Job) -> None:
        """Wait until the job has ended."""
        wait_until(lambda: not job.is_running(), f"the end of {job.name}")
        job.seconds = time.time() - job.started
        job.tracked_steps = self.tracking.finished_steps()

    def kill(self, job: Job) -> None:
        """Kill the job's process, and wait until its calls have ended."""
        for process in self.head.processes(f"/runs/{job.name} "):
            process.kill()
        wait_until(lambda: not job.is_running(), f"the end of {job.name}")
        time.sleep(SECONDS_AFTER_KILL)

    def worker_with(self, title: str) -> Machine:
        """Return the worker on which a process of Ray with this title runs."""
        for machine in self.workers:
            if machine.processes(title):
                return machine
        raise LookupError(f"no worker runs {title!r}")

    def down(self) -> None:
        """End the cluster by the page's command, and wait until nothing of Ray runs."""
        self.office.type(docs_page.command(SECTION, "ray down"))
        wait_until(
            lambda: not self.ray_processes(), "the end of Ray's processes", DOWN_SECONDS
        )

    def ray_processes(self) -> list[psutil.Process]:
        """Return the processes of Ray on all machines."""
        return [
            process
            for machine in self.machines
            for word in RAY_PROCESSES
            for process in machine.processes(word)
        ]
