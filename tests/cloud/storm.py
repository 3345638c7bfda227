"""Query a server about many images and be killed meanwhile: the process that
``test_storm.py`` and ``test_budget.py`` run.

The process that sends requests is a fork without an event loop, threads or connections of
its parent, so each start costs milliseconds. It is killed with SIGKILL after a random
number of journal records and a random pause. The report is a line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, build_opener

from PIL import Image

from coin_ray.cloud.accounts import governor_limits
from coin_ray.cloud.client import CloudClient
from coin_ray.cloud.governor import Governor, LocalGovernor
from coin_ray.cloud.journal.record_format import EncodedRecord
from coin_ray.cloud.journal.segments import SegmentJournal
from coin_ray.config import Cloud
from coin_ray.data.canonical import CanonicalImage, canonical_image

CLASSES = ("car", "bus", "dog")
SIZE = (64, 48)
IN_FLIGHT = 16
COUNTING_SERVER = Path(__file__).parent / "counting_server.py"


class ObservedJournal(SegmentJournal):
    """Writes a byte to ``pipe`` before and after each record, so that a kill can happen
    on either side of it.
    """

    def __init__(self, folder: str, pipe: int) -> None:
        self.pipe = pipe
        super().__init__(folder)

    def _append_all(self, records: Sequence[EncodedRecord], *, durable: bool) -> None:
        os.write(self.pipe, b"<" * len(records))
        super()._append_all(records, durable=durable)
        os.write(self.pipe, b">" * len(records))


@dataclass(frozen=True)
class Job:
    """Images to query a server about. ``settings``: those of ``Cloud``."""

    url: str
    folder: str
    images: list[CanonicalImage]
    settings: Mapping[str, Any]

    @property
    def config(self) -> Cloud:
        return Cloud(url=self.url, in_flight=IN_FLIGHT, rate=1e5, **self.settings)


def numbered_images(count: int) -> list[CanonicalImage]:
    """Return images that differ: each shows its number in black and white blocks."""
    images = []
    for number in range(count):
        blocks = bytes(255 * (number >> bit & 1) for bit in range(12))
        small = Image.frombytes("L", (4, 3), blocks)
        large = small.resize(SIZE, Image.Resampling.NEAREST).convert("RGB")
        sink = io.BytesIO()
        large.save(sink, "JPEG", quality=90)
        images.append(canonical_image(sink.getvalue(), 4096))
    return images


async def query_all(job: Job, journal: SegmentJournal) -> dict[str, Any]:
    """Return status, calls, detections and error of each image, by its id."""
    governor = LocalGovernor(Governor(governor_limits(job.config), journal.spent()))
    client = CloudClient(
        job.config,
        CLASSES,
        job.url,
        journal,
        governor,
        skip_over_budget=True,
        uniform=lambda low, high: 0.01,
    )
    slots = asyncio.Semaphore(IN_FLIGHT)

    async def query(image: CanonicalImage) -> list[Any]:
        async with slots:
            answer = await client.answer(image)
        detections = None
        if answer.raw is not None:
            detections = [answer.raw.boxes.tolist(), answer.raw.class_scores.tolist()]
        return [answer.status, answer.calls, detections, answer.error]

    rows = await asyncio.gather(*(query(image) for image in job.images))
    await client.aclose()
    return {image.image_id: row for image, row in zip(job.images, rows, strict=True)}


def fork_client(job: Job, pipe: int, table: str) -> int:
    """Query in a forked process, which writes ``table`` at its end; return its id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        rows = asyncio.run(query_all(job, ObservedJournal(job.folder, pipe)))
        Path(table).write_text(json.dumps(rows))
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def start_client(job: Job, table: str) -> tuple[int, int]:
    """Return the id of the client's process, and the pipe that it reports records to."""
    read, write = os.pipe()
    process = fork_client(job, write, table)
    os.close(write)
    return process, read


def kill_client(job: Job, table: str, records: int, pause: float) -> bool:
    """Kill a client once it has begun or finished ``records`` records, and return
    whether that came before its end.
    """
    process, pipe = start_client(job, table)
    while records > 0:
        received = os.read(pipe, records)
        records -= len(received)
        if not received:
            break
    time.sleep(pause)
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    os.close(pipe)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("the client's process failed")
    return os.WIFSIGNALED(status)


def run_client(job: Job, table: str) -> dict[str, Any]:
    """Let a client finish, and return its table."""
    process, pipe = start_client(job, table)
    while os.read(pipe, 4096):
        pass
    os.close(pipe)
    if os.waitpid(process, 0)[1] != 0:
        raise RuntimeError("the client's process failed")
    rows: dict[str, Any] = json.loads(Path(table).read_text())
    return rows


def journal_state(job: Job) -> dict[str, Any]:
    """Return the recorded keys, the spending, the calls with an answer on record, and the
    calls the server has received.
    """
    journal = SegmentJournal(job.folder)
    state = {
        "recorded": journal.keys(),
        "spent": journal.spent(),
        "answered": journal.account().answered,
        "received": fetch_json(f"{job.url}/count"),
    }
    journal.close()
    return state


def fetch_json(url: str) -> Any:
    with build_opener(ProxyHandler({})).open(url, timeout=30) as response:
        return json.loads(response.read())


def kill_repeatedly(
    job: Job, kills: int, seed: int, records: int, table: str
) -> list[dict[str, Any]]:
    """Return the state after each kill. Every seventh kill happens while the process
    starts, the others after ``records`` records on average.
    """
    random_source = random.Random(seed)
    states = []
    for number in range(kills):
        if number % 7 == 6:
            records_before, pause = 0, random_source.uniform(0, 0.1)
        else:
            records_before = random_source.randint(1, 2 * records)
            pause = random_source.uniform(0, 0.01)
        if not kill_client(job, table, records_before, pause):
            break
        states.append(journal_state(job))
    return states


@contextmanager
def counting_server(
    faults: float = 0.0, seed: int = 0, latency: float = 0.02
) -> Iterator[str]:
    """Start a counting server for images of SIZE, and yield its address."""
    width, height = SIZE
    command = [sys.executable, str(COUNTING_SERVER)]
    command += ["--width", str(width), "--height", str(height)]
    command += ["--latency", str(latency), "--faults", str(faults), "--seed", str(seed)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.communicate()


def run_storm(**options: Any) -> dict[str, Any]:
    """Run this script in a process of its own, and return its report."""
    command = [sys.executable, str(Path(__file__)), json.dumps(options)]
    process = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False
    )
    if process.returncode:
        raise AssertionError(process.stderr[-3000:])
    report: dict[str, Any] = json.loads(process.stdout)
    return report


def main() -> None:
    """Options as JSON: url, folder, images, kills, seed, records, settings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("options", type=json.loads)
    options = parser.parse_args().options
    folder = options["folder"]
    job = Job(
        options["url"],
        f"{folder}/journal",
        numbered_images(options["images"]),
        options.get("settings", {}),
    )
    os.makedirs(folder, exist_ok=True)
    table = f"{folder}/table.json"
    states = kill_repeatedly(
        job, options["kills"], options["seed"], options["records"], table
    )
    kills = len(states)
    rows = run_client(job, table)
    states.append(journal_state(job))
    # the pipeline, too, queries again about images that ended in an error
    if any(status == "error" for status, *_ in rows.values()):
        rows = run_client(job, table)
        states.append(journal_state(job))
    print(json.dumps({"kills": kills, "states": states, "table": rows}))


if __name__ == "__main__":
    main()
