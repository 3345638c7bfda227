"""How fast, how big and how forgetful collection is: ``python
tests/benchmarks/bench_cloud.py [--only NAME]``, or ``make bench-cloud``.

Everything runs against an emulator of one's own in another process
(``tests/cloud/counting_server.py``), end to end through ``pipelines/collect.py``: Ray
Data, governor, journal. Prints a table, and all figures as one line of JSON last.
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
GROUPS = {
    "CloudActor": "cloud actor",
    "LabelerActor": "labeler actor",
    "raylet": "raylet",
}
"""What a process's title holds, and what it is called here; others below the driver are
"other Ray"."""
OURS = ("driver", "cloud actor", "labeler actor")
SAMPLE_SECONDS, MEMORY_EVERY = 0.5, 4


@dataclass
class Sizes:
    """What the figures are taken over."""

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


@dataclass
class Usage:
    """CPU seconds and memory of a run's processes, by group. ``cpu``: at each time;
    ``pss`` and ``anon``: peak bytes of each group."""

    times: list[float] = field(default_factory=list)
    cpu: list[Counter[str]] = field(default_factory=list)
    pss: Counter[str] = field(default_factory=Counter)
    anon: Counter[str] = field(default_factory=Counter)
    together: int = 0
    """Peak of the sum of PSS over the driver and the actors, at one time."""

    def cpu_between(self, start: float, end: float) -> dict[str, float]:
        """Cores in use on average, by group."""
        first, last = (
            min(bisect_left(self.times, t), len(self.times) - 1) for t in (start, end)
        )
        seconds = max(self.times[last] - self.times[first], 1e-9)
        return {
            name: round((self.cpu[last][name] - self.cpu[first][name]) / seconds, 3)
            for name in self.cpu[last]
        }


@dataclass
class Run:
    seconds: float
    calls: int
    rate: float
    """Answers per second between 10 % and 90 % of them, by the emulator's clock."""
    cores: dict[str, float]
    """In use in that time."""
    usage: Usage
    output: str


class Server:
    """The emulator; its ``process`` is measured with the others."""

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
def server(size: tuple[int, int], latency: float) -> Iterator[Server]:
    running = Server(size, latency)
    try:
        yield running
    finally:
        running.close()


def image_size(side: int) -> tuple[int, int]:
    return side, side * 3 // 4


def write_images(folder: Path, count: int, side: int) -> None:
    """JPEG files that differ, with as much detail as photos: soft noise, and the file's
    number as blocks."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    size = image_size(side)
    grounds = [
        Image.fromarray(
            draw.integers(0, 255, (side // 8, side // 8, 3), np.uint8)
        ).resize(size, Image.Resampling.BICUBIC)
        for _ in range(8)
    ]
    for number in range(count):
        image = grounds[number % 8].copy()
        bits = bytes(255 * (number >> bit & 1) for bit in range(20))
        image.paste(
            Image.frombytes("L", (5, 4), bits).resize(
                (side // 2, side // 3), Image.Resampling.NEAREST
            ),
            (4, 4),
        )
        sink = io.BytesIO()
        image.save(sink, "JPEG", quality=88)
        (folder / f"{number:06d}.jpg").write_bytes(sink.getvalue())
    os.sync()  # or the journal would wait for these files to reach the disk


def arguments(images: Path, root: Path, url: str, in_flight: int) -> list[str]:
    """Of ``pipelines/collect.py``: no CLIP labeler, no limit but the calls under way."""
    given = [
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
    given += [
        "--cloud.in-flight",
        str(in_flight),
        "--cloud.rate",
        "100000",
        "--tracking.no-enabled",
    ]
    return [*given, "--clip.model", f"{CLIP}.json", "--clip.pretrained", f"{CLIP}.pt"]


def collect(
    images: Path, root: Path, running: Server, in_flight: int, *more: str
) -> Run:
    """One run of the pipeline up to the answers, watched from outside."""
    before = len(running.get("/stats")["times"])
    command = [
        sys.executable,
        "pipelines/collect.py",
        *arguments(images, root, running.url, in_flight),
        *more,
    ]
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT, text=True
        )
        usage = watch(process, running.process.pid)
        log.seek(0)
        output = log.read()
    if process.returncode:
        raise RuntimeError(output[-3000:])
    seconds = time.monotonic() - begin
    times = running.get("/stats")["times"][before:]
    if len(times) < 10:
        return Run(seconds, len(times), 0.0, {}, usage, output)
    start, end = times[len(times) // 10], times[len(times) * 9 // 10]
    rate = (len(times) * 9 // 10 - len(times) // 10) / max(end - start, 1e-9)
    return Run(seconds, len(times), rate, usage.cpu_between(start, end), usage, output)


def watch(process: subprocess.Popen[str], emulator: int) -> Usage:
    """Sample the process, all below it and the emulator until it ends."""
    usage, ended = Usage(), threading.Event()

    def sample() -> None:
        number = 0
        seen: dict[int, tuple[str, float]] = {}
        while not ended.wait(SAMPLE_SECONDS):
            memory = Counter[str]()
            for pid, name in groups(process.pid, emulator):
                try:
                    times = psutil.Process(pid).cpu_times()
                    seen[pid] = (name, times.user + times.system)
                    if number % MEMORY_EVERY == 0:
                        pss, anon = pss_of(pid)
                        memory[name] += pss
                        usage.anon[name] = max(usage.anon[name], anon)
                except (psutil.Error, OSError):
                    continue
            cpu = Counter[str]()
            for name, seconds in seen.values():
                cpu[name] += seconds  # type: ignore[assignment]
            usage.times.append(time.monotonic())
            usage.cpu.append(cpu)
            usage.together = max(usage.together, sum(memory[name] for name in OURS))
            for name, size in memory.items():
                usage.pss[name] = max(usage.pss[name], size)
            number += 1

    thread = threading.Thread(target=sample)
    thread.start()
    process.wait()
    ended.set()
    thread.join()
    return usage


def groups(driver: int, emulator: int) -> Iterator[tuple[int, str]]:
    """The processes of a run, and what each is."""
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
        yield (
            child.pid,
            next((name for part, name in GROUPS.items() if part in title), "other Ray"),
        )


def pss_of(pid: int) -> tuple[int, int]:
    """Proportional set size, and its part that is not shared memory or files, in bytes."""
    found = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split()[:2]
        found[name] = int(value) * 1024
    return found["Pss:"], found["Pss_Anon:"]


def throughput(sizes: Sizes, work: Path) -> dict[str, Any]:
    """Images per second in steady state, as a share of the least of the rate and
    in_flight / latency."""
    images = work / "images"
    write_images(images, sizes.images, sizes.side)
    with server(image_size(sizes.side), sizes.latency) as running:
        run = collect(images, work / "root", running, sizes.in_flight)
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


def ceiling(sizes: Sizes, work: Path) -> dict[str, Any]:
    """Images per second where the CPU is the limit, what it is spent on, and how fast a
    full journal is replayed."""
    images = work / "images"
    write_images(images, sizes.images, sizes.side)
    with server(image_size(sizes.side), sizes.fast_latency) as running:
        run = collect(images, work / "root", running, sizes.in_flight)
        for step in (work / "root" / "steps").glob("collect-*"):
            shutil.rmtree(step)
        again = collect(images, work / "root", running, sizes.in_flight)
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
        "replay_seconds": round(again.seconds, 1),
        "replay_calls": again.calls,
    }


def sequential(sizes: Sizes, work: Path) -> dict[str, Any]:
    """Images per second of one blocking call after the other."""
    images = work / "images"
    write_images(images, sizes.sequential, sizes.side)
    with server(image_size(sizes.side), sizes.latency) as running:
        script = str(Path(__file__).with_name("one_by_one.py"))
        command = [
            sizes.autodistill,
            script,
            running.url,
            str(images),
            str(work / "out"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        times = running.get("/stats")["times"]
    if done.stdout.strip().endswith("plain loop"):
        print(
            "no autodistill: python -m venv V; V/bin/pip install autodistill; then"
            " --autodistill V/bin/python",
            file=sys.stderr,
        )
    rate = (len(times) - 1) / (times[-1] - times[0])
    return {
        "images": len(times),
        "images_per_second": round(rate, 3),
        "loop": done.stdout.strip().splitlines()[-1],
    }


def memory(sizes: Sizes, work: Path) -> dict[str, Any]:
    """Peak memory of the driver and the actors for few and for many images."""
    found: dict[str, Any] = {}
    peaks = {}
    for count in (sizes.few, sizes.many):
        images = work / f"images{count}"
        write_images(images, count, 224)
        with server(image_size(224), 0.005) as running:
            run = collect(images, work / f"root{count}", running, sizes.in_flight)
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
        found[str(count)] = {
            "driver_and_actors_mib": round(usage.together / 2**20),
            "seconds": round(run.seconds, 1),
            "mib": megabytes,
        }
    return found | {"growth": round(peaks[sizes.many] / max(peaks[sizes.few], 1), 3)}


def finished(sizes: Sizes, work: Path) -> dict[str, Any]:
    """Seconds until a finished set is known to be finished: by its step, and by its
    journal alone."""
    images, root = work / "images", work / "root"
    write_images(images, sizes.answers, 32)
    with server(image_size(32), 0.0) as running:
        given = arguments(images, root, running.url, sizes.in_flight)
        begin = time.monotonic()
        fill(given, images, running.url)
        filled = time.monotonic() - begin
        whole = timed(given)
        for step in (root / "steps").glob("collect-*"):
            shutil.rmtree(step)
        estimate = timed([*given, "--dry-run"])
        calls = running.get("/count")
    answered = next(
        line for line in estimate[1].splitlines() if "answered already" in line
    ).strip()
    return {
        "answers": sizes.answers,
        "step_seconds": round(whole[0], 2),
        "journal_seconds": round(estimate[0], 2),
        "journal_says": answered,
        "calls": calls,
        "preparing_seconds": round(filled, 1),
    }


def timed(given: Sequence[str]) -> tuple[float, str]:
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "pipelines/collect.py", *given],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return time.monotonic() - begin, done.stdout


def fill(given: Sequence[str], images: Path, url: str) -> None:
    """What a finished run leaves behind, made without running it: the images' step, a
    journal with every answer, the manifests."""
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

    config, options = parse_run_arguments(given)
    steps = build_steps(config)
    run_step(steps["images"], config, options.root)
    journal = SegmentJournal(storage.join(options.root, "journal"))
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
    storage.make_folder(step.folder(options.root))
    manifest = {
        "step": step.name,
        "fingerprint": step.fingerprint,
        "metrics": metrics,
        "seconds": 1.0,
    }
    storage.write_json(
        storage.join(step.folder(options.root), "manifest.json"), manifest
    )


FIGURES: dict[str, Callable[[Sizes, Path], dict[str, Any]]] = {
    "throughput": throughput,
    "ceiling": ceiling,
    "sequential": sequential,
    "memory": memory,
    "finished": finished,
}


def goals(found: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    """What, measured, wanted, and whether it is reached; of what was measured."""
    rows = []
    if "throughput" in found:
        share = found["throughput"]["share_of_bound"]
        rate, bound = (
            found["throughput"]["images_per_second"],
            found["throughput"]["bound"],
        )
        rows.append(
            (
                "images/s of min(rate, in_flight / latency)",
                f"{rate:.1f} of {bound:.0f}: {share:.3f}",
                ">= 0.95",
                share >= 0.95,
            )
        )
    if "throughput" in found and "sequential" in found:
        ratio = (
            found["throughput"]["images_per_second"]
            / found["sequential"]["images_per_second"]
        )
        found["sequential"]["times_slower"] = round(ratio, 1)
        rows.append(
            (
                f"times faster than one by one ({found['sequential']['loop']})",
                f"{ratio:.1f}",
                ">= 40",
                ratio >= 40,
            )
        )
    if "ceiling" in found:
        rows.append(
            (
                "images/s where the CPU is the limit",
                f"{found['ceiling']['images_per_second']:.1f}",
                "",
                True,
            )
        )
    if "memory" in found:
        growth = found["memory"]["growth"]
        rows.append(
            (
                "memory for ten times the images",
                f"x {growth:.3f}",
                "<= 1.1",
                growth <= 1.1,
            )
        )
    if "finished" in found:
        for name, what in (
            ("step_seconds", "finished step"),
            ("journal_seconds", "journal alone, --dry-run"),
        ):
            seconds = found["finished"][name]
            rows.append(
                (
                    f"s until {found['finished']['answers']} answers are known: {what}",
                    f"{seconds:.2f}",
                    "<= 10",
                    seconds <= 10,
                )
            )
        rows.append(
            (
                "calls made for them",
                str(found["finished"]["calls"]),
                "0",
                found["finished"]["calls"] == 0,
            )
        )
    return rows


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
        help="tiny sizes: does it run? The figures then mean nothing",
    )
    for name, value in asdict(Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value))
    given = vars(parser.parse_args())
    only, smoke = given.pop("only"), given.pop("smoke")
    small = (
        {
            "images": 60,
            "sequential": 4,
            "few": 20,
            "many": 40,
            "answers": 200,
            "latency": 0.1,
        }
        if smoke
        else {}
    )
    sizes = Sizes(
        **(small | {name: value for name, value in given.items() if value is not None})
    )
    found: dict[str, Any] = {}
    for name in only:
        print(f"{name} ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="bench_cloud_") as work:
            found[name] = FIGURES[name](sizes, Path(work))
        print(json.dumps(found[name]), file=sys.stderr, flush=True)
    rows = goals(found)
    for what, measured, wanted, reached in rows:
        print(
            f"{what:<60} {measured:>24}  {wanted:<8} {'' if reached else 'MISSED'}".rstrip()
        )
    found["machine"] = {
        "cpus": os.cpu_count(),
        "load_average": [round(v, 1) for v in os.getloadavg()],
    }
    print(json.dumps(found))
    return 0 if all(row[3] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
