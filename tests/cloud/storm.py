"""Ask about many images and be killed meanwhile: what ``test_storm.py`` and
``test_budget.py`` run.

The process that asks is a fork without an event loop, threads or connections of the
parent's, so each start costs milliseconds. It is killed with SIGKILL after a random
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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, build_opener

from PIL import Image

from coin_ray.cloud.client import CloudClient, limits
from coin_ray.cloud.governor import Governor, LocalGovernor
from coin_ray.cloud.journal.journal import SegmentJournal
from coin_ray.config import Cloud
from coin_ray.data.canonical import CanonicalImage, canonical_image

CLASSES = ("car", "bus", "dog")
SIZE = (64, 48)
IN_FLIGHT = 16
HERE = Path(__file__).parent


class Watched(SegmentJournal):
    """Writes a byte to ``pipe`` before and after each record, so that a kill can come
    at either side of it."""

    def __init__(self, folder: str, pipe: int) -> None:
        self.pipe = pipe
        super().__init__(folder)

    def _append(
        self, head: dict[str, Any], body: bytes = b"", *, durable: bool = False
    ) -> None:
        os.write(self.pipe, b"<")
        super()._append(head, body, durable=durable)
        os.write(self.pipe, b">")


@dataclass(frozen=True)
class Job:
    url: str
    folder: str
    pictures: list[CanonicalImage]
    settings: Mapping[str, Any]
    """Of ``Cloud``."""

    @property
    def config(self) -> Cloud:
        return Cloud(url=self.url, in_flight=IN_FLIGHT, rate=1e5, **self.settings)


def pictures(count: int) -> list[CanonicalImage]:
    """Images that differ: the number in black and white blocks."""
    made = []
    for number in range(count):
        bits = bytes(255 * (number >> bit & 1) for bit in range(12))
        sink = io.BytesIO()
        Image.frombytes("L", (4, 3), bits).resize(
            SIZE, Image.Resampling.NEAREST
        ).convert("RGB").save(sink, "JPEG", quality=90)
        made.append(canonical_image(sink.getvalue(), 4096))
    return made


async def ask_all(job: Job, journal: SegmentJournal) -> dict[str, Any]:
    """Status, calls and answer of each image."""
    governor = LocalGovernor(Governor(limits(job.config), journal.spent()))
    client = CloudClient(
        job.config,
        CLASSES,
        job.url,
        journal,
        governor,
        skip_over_budget=True,
        uniform=lambda low, high: 0.01,
    )
    places = asyncio.Semaphore(IN_FLIGHT)

    async def ask(image: CanonicalImage) -> list[Any]:
        async with places:
            answer = await client.answer(image)
        found = (
            None
            if answer.raw is None
            else [answer.raw.boxes.tolist(), answer.raw.class_scores.tolist()]
        )
        return [answer.status, answer.calls, found, answer.error]

    rows = await asyncio.gather(*(ask(image) for image in job.pictures))
    await client.aclose()
    return {image.image_id: row for image, row in zip(job.pictures, rows, strict=True)}


def child(job: Job, pipe: int, table: str) -> int:
    """Start asking in a process of its own; returns its id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        answers = asyncio.run(ask_all(job, Watched(job.folder, pipe)))
        Path(table).write_text(json.dumps(answers))
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def started(job: Job, table: str) -> tuple[int, int]:
    """Id of the asking process, and the pipe that it reports its records to."""
    read, write = os.pipe()
    process = child(job, write, table)
    os.close(write)
    return process, read


def killed(job: Job, table: str, records: int, pause: float) -> bool:
    """Let a process ask until it has begun or finished that many ``records``, then kill
    it; False if it finished before."""
    process, pipe = started(job, table)
    ended = False
    while records > 0 and not ended:
        received = os.read(pipe, records)
        records -= len(received)
        ended = not received
    time.sleep(pause)
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    os.close(pipe)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("the asking process failed")
    return os.WIFSIGNALED(status)


def undisturbed(job: Job, table: str) -> dict[str, Any]:
    process, pipe = started(job, table)
    while os.read(pipe, 4096):
        pass
    os.close(pipe)
    if os.waitpid(process, 0)[1] != 0:
        raise RuntimeError("the asking process failed")
    answers: dict[str, Any] = json.loads(Path(table).read_text())
    return answers


def state(job: Job) -> dict[str, Any]:
    """What is on record, and how many calls the server has received."""
    journal = SegmentJournal(job.folder)
    found = {
        "recorded": journal.keys(),
        "spent": journal.spent(),
        "received": fetched(f"{job.url}/count"),
    }
    journal.close()
    return found


def fetched(url: str) -> Any:
    with build_opener(ProxyHandler({})).open(url, timeout=30) as response:
        return json.loads(response.read())


def storm(
    job: Job, kills: int, seed: int, records: int, table: str
) -> list[dict[str, Any]]:
    """The state after each kill; every seventh comes while the process starts, the
    others after at most ``records`` records."""
    draw = random.Random(seed)
    states = []
    for number in range(kills):
        after, pause = (
            (0, draw.uniform(0, 0.1))
            if number % 7 == 6
            else (draw.randint(1, 2 * records), draw.uniform(0, 0.01))
        )
        if not killed(job, table, after, pause):
            break
        states.append(state(job))
    return states


@contextmanager
def server(faults: float = 0.0, seed: int = 0, latency: float = 0.02) -> Iterator[str]:
    """The address of a counting server with images of SIZE."""
    command = [
        sys.executable,
        str(HERE / "counting_server.py"),
        "--width",
        str(SIZE[0]),
        "--height",
        str(SIZE[1]),
    ]
    command += ["--latency", str(latency), "--faults", str(faults), "--seed", str(seed)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.communicate()


def run(**options: Any) -> dict[str, Any]:
    """The report of this script as a process of its own."""
    command = [sys.executable, str(Path(__file__)), json.dumps(options)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode:
        raise AssertionError(done.stderr[-3000:])
    report: dict[str, Any] = json.loads(done.stdout)
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
        pictures(options["images"]),
        options.get("settings", {}),
    )
    os.makedirs(folder, exist_ok=True)
    table = f"{folder}/table.json"
    states = storm(job, options["kills"], options["seed"], options["records"], table)
    kills, answers = len(states), undisturbed(job, table)
    states.append(state(job))
    # as the pipeline does, which asks again about those
    if any(status == "error" for status, *_ in answers.values()):
        answers = undisturbed(job, table)
        states.append(state(job))
    print(json.dumps({"kills": kills, "states": states, "table": answers}))


if __name__ == "__main__":
    main()
