"""Measure throughput, memory and resumption of the collect stage: ``python
tests/benchmarks/bench_cloud.py [--only NAME]``, or ``make bench-cloud``.

Every run goes through ``pipelines/collect.py`` (Ray Data, governor, journal) and queries
an emulator in another process (``tests/cloud/counting_server.py``). Prints a table, and
all figures as one line of JSON last.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.request import ProxyHandler, Request, build_opener

import numpy as np
import psutil
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]
CLIP = REPOSITORY / "coin_ray" / "demo" / "assets" / "coin_tiny"
CLASSES = "car,bus,dog"
GROUP_OF_TITLE = {
    "CloudActor": "cloud actor",
    "LabelerActor": "labeler actor",
    "raylet": "raylet",
}
"""Name of a group of processes by a part of their title; other descendants of the driver
are "other Ray"."""
COLLECTION_GROUPS = ("driver", "cloud actor", "labeler actor")
SAMPLE_SECONDS, MEMORY_EVERY = 0.5, 4


@dataclass
class Sizes:
    """Sizes and latencies of the measured runs."""

    images: int = 4000
    side: int = 350
    in_flight: int = 64
    latency: float = 0.5
    fast_latency: float = 0.02
    sequential: int = 60
    few: int = 2000
    many: int = 20_000
    answers: int = 100_000
    autodistill: str = sys.executable


SMOKE_SIZES: dict[str, Any] = {
    "images": 60,
    "sequential": 4,
    "few": 20,
    "many": 40,
    "answers": 200,
    "latency": 0.1,
}


@dataclass
class Usage:
    """CPU seconds and memory of a run's processes, by group. ``cpu``: CPU seconds so far at
    each of ``times``; ``pss`` and ``anon``: peak bytes of each group."""

    times: list[float] = field(default_factory=list)
    cpu: list[Counter[str]] = field(default_factory=list)
    pss: Counter[str] = field(default_factory=Counter)
    anon: Counter[str] = field(default_factory=Counter)
    together: int = 0
    """Peak of the sum of PSS over the driver and the actors, at one time."""

    def cpu_between(self, start: float, end: float) -> dict[str, float]:
        """Return the mean number of cores in use, by group."""
        first, last = (
            min(bisect_left(self.times, t), len(self.times) - 1) for t in (start, end)
        )
        seconds = max(self.times[last] - self.times[first], 1e-9)
        return {
            name: round((self.cpu[last][name] - self.cpu[first][name]) / seconds, 3)
            for name in self.cpu[last]
        }


@dataclass
class CollectRun:
    seconds: float
    calls: int
    rate: float
    """Answers per second between 10 % and 90 % of them, by the emulator's clock."""
    cores: dict[str, float]
    """Mean number of cores in use in that time, by group."""
    usage: Usage


class EmulatorProcess:
    """The emulated cloud in a process, whose CPU time is measured with the others'."""

    def __init__(self, size: tuple[int, int], latency: float) -> None:
        command = [
            sys.executable,
            str(REPOSITORY / "tests/cloud/counting_server.py"),
            "--latency",
            str(latency),
        ]
        command += ["--width", str(size[0]), "--height", str(size[1])]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()

    def get(self, path: str) -> Any:
        with build_opener(ProxyHandler({})).open(
            f"{self.url}{path}", timeout=60
        ) as response:
            return json.loads(response.read())

    def reset(self, latency: float) -> None:
        build_opener(ProxyHandler({})).open(
            Request(f"{self.url}/reset?latency={latency}", method="POST"), timeout=60
        ).close()

    def close(self) -> None:
        self.process.communicate()


@contextmanager
def start_emulator(size: tuple[int, int], latency: float) -> Iterator[EmulatorProcess]:
    emulator = EmulatorProcess(size, latency)
    try:
        yield emulator
    finally:
        emulator.close()


def image_size(side: int) -> tuple[int, int]:
    return side, side * 3 // 4


def write_noise_images(folder: Path, count: int, side: int) -> None:
    """Write distinct JPEG files with as much detail as photos: soft noise, and the file's
    number as blocks."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    size = image_size(side)
    backgrounds = []
    for _ in range(8):
        noise = draw.integers(0, 255, (side // 8, side // 8, 3), np.uint8)
        blurred = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
        backgrounds.append(blurred)
    for number in range(count):
        image = backgrounds[number % 8].copy()
        bits = bytes(255 * (number >> bit & 1) for bit in range(20))
        block_size = (side // 2, side // 3)
        blocks = Image.frombytes("L", (5, 4), bits).resize(
            block_size, Image.Resampling.NEAREST
        )
        image.paste(blocks, (4, 4))
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=88)
        (folder / f"{number:06d}.jpg").write_bytes(encoded.getvalue())
    os.sync()  # otherwise the journal would wait for these files to reach the disk


def collect_arguments(images: Path, root: Path, url: str, in_flight: int) -> list[str]:
    """Return arguments of ``pipelines/collect.py`` without a CLIP labeler, and with no limit
    but the number of calls in flight."""
    options = [
        "folder",
        "--images",
        str(images),
        "--classes",
        CLASSES,
        "--cloud",
        url,
        "--labeler",
        "none",
        "--root",
        str(root),
    ]
    options += [
        "--cloud.in-flight",
        str(in_flight),
        "--cloud.rate",
        "100000",
        "--tracking.no-enabled",
    ]
    return [*options, "--clip.model", f"{CLIP}.json", "--clip.pretrained", f"{CLIP}.pt"]


def run_collect(
    images: Path,
    root: Path,
    emulator: EmulatorProcess,
    in_flight: int,
    *options: str,
    repository: Path = REPOSITORY,
    python: str = sys.executable,
) -> CollectRun:
    """Run a repository's pipeline up to the collect stage and sample its processes."""
    calls_before = len(emulator.get("/stats")["times"])
    command = [
        python,
        "pipelines/collect.py",
        *collect_arguments(images, root, emulator.url, in_flight),
        *options,
    ]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command,
            cwd=repository,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )
        usage = sample_usage(process, emulator.process.pid)
        log.seek(0)
        log_text = log.read()
    if process.returncode:
        raise RuntimeError(log_text[-3000:])
    seconds = time.monotonic() - start
    times = emulator.get("/stats")["times"][calls_before:]
    if len(times) < 10:
        return CollectRun(seconds, len(times), 0.0, {}, usage)
    first, last = len(times) // 10, len(times) * 9 // 10
    rate = (last - first) / max(times[last] - times[first], 1e-9)
    cores = usage.cpu_between(times[first], times[last])
    return CollectRun(seconds, len(times), rate, cores, usage)


def sample_usage(process: subprocess.Popen[str], emulator: int) -> Usage:
    """Sample the process, its descendants and the emulator until the process ends."""
    usage, ended = Usage(), threading.Event()

    def sample() -> None:
        number = 0
        process_times: dict[int, tuple[str, float]] = {}
        while not ended.wait(SAMPLE_SECONDS):
            memory_by_group = Counter[str]()
            for pid, name in process_groups(process.pid, emulator):
                try:
                    times = psutil.Process(pid).cpu_times()
                    process_times[pid] = (name, times.user + times.system)
                    if number % MEMORY_EVERY == 0:
                        pss, anon = read_pss(pid)
                        memory_by_group[name] += pss
                        usage.anon[name] = max(usage.anon[name], anon)
                except (psutil.Error, OSError):
                    continue
            cpu = Counter[str]()
            for name, seconds in process_times.values():
                cpu[name] += seconds  # type: ignore[assignment]
            usage.times.append(time.monotonic())
            usage.cpu.append(cpu)
            usage.together = max(
                usage.together, sum(memory_by_group[name] for name in COLLECTION_GROUPS)
            )
            for name, size in memory_by_group.items():
                usage.pss[name] = max(usage.pss[name], size)
            number += 1

    thread = threading.Thread(target=sample)
    thread.start()
    process.wait()
    ended.set()
    thread.join()
    return usage


def process_groups(driver: int, emulator: int) -> Iterator[tuple[int, str]]:
    """Yield the process id and the group of each process of a run."""
    yield driver, "driver"
    yield emulator, "emulator"
    try:
        children = psutil.Process(driver).children(recursive=True)
    except psutil.Error:
        return
    for child in children:
        try:
            title = " ".join(child.cmdline()) or child.name()
        except psutil.Error:
            continue
        names = [name for part, name in GROUP_OF_TITLE.items() if part in title]
        yield child.pid, names[0] if names else "other Ray"


def read_pss(pid: int) -> tuple[int, int]:
    """Return the proportional set size in bytes, and its part that is neither shared memory
    nor mapped files."""
    sizes = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, kibibytes = line.split()[:2]
        sizes[name] = int(kibibytes) * 1024
    return sizes["Pss:"], sizes["Pss_Anon:"]


def measure_throughput(sizes: Sizes, work: Path) -> dict[str, Any]:
    """Measure images per second in steady state, and their share of the bound: the smaller
    of the rate limit and in_flight / latency."""
    images = work / "images"
    write_noise_images(images, sizes.images, sizes.side)
    with start_emulator(image_size(sizes.side), sizes.latency) as emulator:
        run = run_collect(images, work / "root", emulator, sizes.in_flight)
    bound = sizes.in_flight / sizes.latency
    return {
        "images": sizes.images,
        "calls": run.calls,
        "seconds": round(run.seconds, 1),
        "images_per_second": round(run.rate, 1),
        "bound": bound,
        "share_of_bound": round(run.rate / bound, 3),
        "cores": run.cores,
    }


def measure_ceiling(sizes: Sizes, work: Path) -> dict[str, Any]:
    """Measure images per second where the CPU is the limit, the CPU time of each group, and
    how fast a complete journal is replayed."""
    images = work / "images"
    write_noise_images(images, sizes.images, sizes.side)
    with start_emulator(image_size(sizes.side), sizes.fast_latency) as emulator:
        run = run_collect(images, work / "root", emulator, sizes.in_flight)
        for step in (work / "root" / "steps").glob("collect-*"):
            shutil.rmtree(step)
        replay = run_collect(images, work / "root", emulator, sizes.in_flight)
    total = sum(v for k, v in run.cores.items())
    return {
        "images": sizes.images,
        "images_per_second": round(run.rate, 1),
        "seconds": round(run.seconds, 1),
        "cores": run.cores,
        "cpu_ms_per_image": (
            {k: round(1000 * v / run.rate, 2) for k, v in run.cores.items()}
            if run.rate
            else {}
        ),
        "cores_in_all": round(total, 2),
        "replay_seconds": round(replay.seconds, 1),
        "replay_calls": replay.calls,
    }


def measure_sequential(sizes: Sizes, work: Path) -> dict[str, Any]:
    """Measure images per second of one blocking call after the other."""
    images = work / "images"
    write_noise_images(images, sizes.sequential, sizes.side)
    with start_emulator(image_size(sizes.side), sizes.latency) as emulator:
        script = str(Path(__file__).with_name("one_by_one.py"))
        command = [
            sizes.autodistill,
            script,
            emulator.url,
            str(images),
            str(work / "out"),
        ]
        completed = subprocess.run(command, capture_output=True, text=True, check=False)
        if completed.returncode:
            raise RuntimeError(completed.stderr[-3000:])
        times = emulator.get("/stats")["times"]
    if completed.stdout.strip().endswith("plain loop"):
        print(
            "no autodistill: python -m venv V; V/bin/pip install autodistill; then"
            " --autodistill V/bin/python",
            file=sys.stderr,
        )
    rate = (len(times) - 1) / (times[-1] - times[0])
    return {
        "images": len(times),
        "images_per_second": round(rate, 3),
        "loop": completed.stdout.strip().splitlines()[-1],
    }


def measure_memory(sizes: Sizes, work: Path) -> dict[str, Any]:
    """Measure peak memory of the driver and the actors for few and for many images."""
    figures: dict[str, Any] = {}
    peaks = {}
    for count in (sizes.few, sizes.many):
        images = work / f"images{count}"
        write_noise_images(images, count, 224)
        with start_emulator(image_size(224), 0.005) as emulator:
            run = run_collect(images, work / f"root{count}", emulator, sizes.in_flight)
        shutil.rmtree(images)
        usage = run.usage
        peaks[count] = usage.together
        megabytes = {
            name: {
                "pss": round(usage.pss[name] / 2**20),
                "anon": round(usage.anon[name] / 2**20),
            }
            for name in usage.pss
        }
        figures[str(count)] = {
            "driver_and_actors_mib": round(usage.together / 2**20),
            "seconds": round(run.seconds, 1),
            "mib": megabytes,
        }
    return figures | {"growth": round(peaks[sizes.many] / max(peaks[sizes.few], 1), 3)}


def measure_finished(sizes: Sizes, work: Path) -> dict[str, Any]:
    """Measure seconds until a finished run is recognised: by its step, and by its journal
    alone."""
    images, root = work / "images", work / "root"
    write_noise_images(images, sizes.answers, 32)
    with start_emulator(image_size(32), 0.0) as emulator:
        options = collect_arguments(images, root, emulator.url, sizes.in_flight)
        start = time.monotonic()
        write_finished_run(options, images, emulator.url)
        fill_seconds = time.monotonic() - start
        step_run = time_collect(options)
        for step in (root / "steps").glob("collect-*"):
            shutil.rmtree(step)
        journal_run = time_collect([*options, "--dry-run"])
        calls = emulator.get("/count")
    answered = next(
        line for line in journal_run[1].splitlines() if "answered already" in line
    ).strip()
    return {
        "answers": sizes.answers,
        "step_seconds": round(step_run[0], 2),
        "journal_seconds": round(journal_run[0], 2),
        "journal_says": answered,
        "calls": calls,
        "preparing_seconds": round(fill_seconds, 1),
    }


def time_collect(options: Sequence[str]) -> tuple[float, str]:
    start = time.monotonic()
    completed = subprocess.run(
        [sys.executable, "pipelines/collect.py", *options],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    if completed.returncode:
        raise RuntimeError(completed.stderr[-3000:])
    return time.monotonic() - start, completed.stdout


def write_finished_run(options: Sequence[str], images: Path, url: str) -> None:
    """Write the files of a finished run without running it: the images step, a journal with
    every answer, and the manifests."""
    from concurrent.futures import ThreadPoolExecutor

    from coin_ray import storage
    from coin_ray.cloud.accounts import governor_limits
    from coin_ray.cloud.client import CloudClient
    from coin_ray.cloud.governor import Governor, LocalGovernor
    from coin_ray.cloud.journal.base import AnswerRecord
    from coin_ray.cloud.journal.segments import SegmentJournal
    from coin_ray.commands.arguments import parse_run_arguments
    from coin_ray.data.canonical import canonical_image
    from coin_ray.runs.graph import build_steps
    from coin_ray.runs.steps import run_step

    config, run_options = parse_run_arguments(options)
    steps = build_steps(config)
    run_step(steps["images"], config, run_options.root)
    journal = SegmentJournal(storage.join(run_options.root, "journal"))
    client = CloudClient(
        config.cloud,
        config.classes,
        url,
        journal,
        LocalGovernor(Governor(governor_limits(config.cloud))),
    )
    size = image_size(32)
    body = json.dumps(
        {
            "image": {"w": size[0], "h": size[1]},
            "detections": [{"box": [1, 2, 20, 20], "label": "car", "score": 0.5}],
        }
    ).encode()

    def put(file: Path) -> None:
        key = client.key(canonical_image(file.read_bytes(), client.max_side))
        journal.attempt(key, 0.0)
        journal.put(key, AnswerRecord(body))

    with patch("os.fsync"), ThreadPoolExecutor(2) as pool:
        for _ in pool.map(put, sorted(images.glob("*.jpg"))):
            pass
    journal.close()
    asyncio.run(client.aclose())
    step = steps["collect"]
    metrics = {
        "calls": {
            "made": len(os.listdir(images)),
            "cached": 0,
            "failed": 0,
            "cost_usd": 0.0,
        }
    }
    storage.make_folder(step.folder(run_options.root))
    manifest = {
        "step": step.name,
        "fingerprint": step.fingerprint,
        "metrics": metrics,
        "seconds": 1.0,
    }
    storage.write_json(
        storage.join(step.folder(run_options.root), "manifest.json"), manifest
    )


FIGURES: dict[str, Callable[[Sizes, Path], dict[str, Any]]] = {
    "throughput": measure_throughput,
    "ceiling": measure_ceiling,
    "sequential": measure_sequential,
    "memory": measure_memory,
    "finished": measure_finished,
}


Goal = tuple[str, str, str, bool]
"""Description, measurement, goal, and whether it is reached."""


def _throughput_goals(figures: dict[str, Any]) -> list[Goal]:
    rate, bound = figures["images_per_second"], figures["bound"]
    share = figures["share_of_bound"]
    measurement = f"{rate:.1f} of {bound:.0f}: {share:.3f}"
    description = "images/s of min(rate, in_flight / latency)"
    return [(description, measurement, ">= 0.95", share >= 0.95)]


def _sequential_goals(
    throughput: dict[str, Any], sequential: dict[str, Any]
) -> list[Goal]:
    """Compare with one blocking call after the other; add ``times_slower`` to its figures."""
    ratio = throughput["images_per_second"] / sequential["images_per_second"]
    sequential["times_slower"] = round(ratio, 1)
    description = f"times faster than one by one ({sequential['loop']})"
    return [(description, f"{ratio:.1f}", ">= 40", ratio >= 40)]


def _ceiling_goals(figures: dict[str, Any]) -> list[Goal]:
    rate = f"{figures['images_per_second']:.1f}"
    return [("images/s where the CPU is the limit", rate, "", True)]


def _memory_goals(figures: dict[str, Any]) -> list[Goal]:
    growth = figures["growth"]
    description = "memory for ten times the images"
    return [(description, f"x {growth:.3f}", "<= 1.1", growth <= 1.1)]


def _finished_goals(figures: dict[str, Any]) -> list[Goal]:
    goals = []
    for name, source in (
        ("step_seconds", "finished step"),
        ("journal_seconds", "journal alone, --dry-run"),
    ):
        seconds = figures[name]
        description = f"s until {figures['answers']} answers are known: {source}"
        goals.append((description, f"{seconds:.2f}", "<= 10", seconds <= 10))
    calls = figures["calls"]
    goals.append(("calls made for them", str(calls), "0", calls == 0))
    return goals


def compare_with_goals(figures: dict[str, Any]) -> list[Goal]:
    """Return the goals of the figures that were measured."""
    goals: list[Goal] = []
    if "throughput" in figures:
        goals += _throughput_goals(figures["throughput"])
    if "throughput" in figures and "sequential" in figures:
        goals += _sequential_goals(figures["throughput"], figures["sequential"])
    if "ceiling" in figures:
        goals += _ceiling_goals(figures["ceiling"])
    if "memory" in figures:
        goals += _memory_goals(figures["memory"])
    if "finished" in figures:
        goals += _finished_goals(figures["finished"])
    return goals


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        choices=FIGURES,
        nargs="+",
        default=list(FIGURES),
        help="take these figures only",
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="use tiny sizes to test that the benchmark runs; the figures mean nothing",
    )
    for name, default in asdict(Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default))
    arguments = vars(parser.parse_args())
    names, smoke = arguments.pop("only"), arguments.pop("smoke")
    overrides = {name: size for name, size in arguments.items() if size is not None}
    sizes = Sizes(**((SMOKE_SIZES if smoke else {}) | overrides))
    figures: dict[str, Any] = {}
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="bench_cloud_") as work:
            figures[name] = FIGURES[name](sizes, Path(work))
        print(json.dumps(figures[name]), file=sys.stderr, flush=True)
    goals = compare_with_goals(figures)
    for description, measurement, goal, is_reached in goals:
        missed = "" if is_reached else "MISSED"
        print(f"{description:<60} {measurement:>24}  {goal:<8} {missed}".rstrip())
    figures["machine"] = {
        "cpus": os.cpu_count(),
        "load_average": [round(v, 1) for v in os.getloadavg()],
    }
    print(json.dumps(figures))
    return 0 if all(is_reached for *_, is_reached in goals) else 1


if __name__ == "__main__":
    sys.exit(main())
