"""A client with a fake clock in front of scripted responses, and other helpers that
several tests of the cloud share."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from coin_ray.cloud import shared_governor
from coin_ray.cloud.accounts import governor_limits
from coin_ray.cloud.adapters.parsing import error_object
from coin_ray.cloud.adapters.reference import ReferenceAdapter
from coin_ray.cloud.client import CloudClient
from coin_ray.cloud.governor import (
    Governor,
    GovernorStats,
    Grant,
    LocalGovernor,
    Outcome,
)
from coin_ray.cloud.journal.base import Journal
from coin_ray.cloud.journal.opening import open_journal
from coin_ray.cloud.journal.record_format import HEADER, MAGIC
from coin_ray.cloud.protocol import (
    Adapter,
    Capabilities,
    Frame,
    Pending,
    PreparedRequest,
    Query,
    RawDetections,
)
from coin_ray.cloud.shared_governor import RemoteGovernor, SharedGovernor
from coin_ray.config import Cloud
from coin_ray.data.canonical import CanonicalImage, canonical_image
from coin_ray.errors import (
    AuthError,
    BadRequest,
    CloudError,
    ImageRejected,
    QuotaExhausted,
    Throttled,
    Transient,
)

CLASSES = ("car", "bus", "dog")
URL = "https://detector.example.com/api"
Reply = httpx.Response | Exception | Callable[[httpx.Request], httpx.Response]


class ProcessKilled(BaseException):
    """The process ends here: nothing that handles ``Exception`` catches it."""


class FakeTime:
    """A clock that sleeping advances; other tasks run meanwhile."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


def solid_image(seed: int = 0, width: int = 60, height: int = 40) -> CanonicalImage:
    """Return an image of one colour, which differs for the seeds 0 to 63."""
    sink = io.BytesIO()
    colour = (seed % 8 * 32, seed // 8 % 8 * 32, 7)
    Image.new("RGB", (width, height), colour).save(sink, "PNG")
    return canonical_image(sink.getvalue(), 4096)


def labelled_folder(folder: Path, labels: dict[str, list[tuple[str, str]]]) -> str:
    """Write a YOLO data set: the label and box (normalised) of each image's objects."""
    names = sorted({label for boxes in labels.values() for label, _ in boxes})
    for name, boxes in labels.items():
        (folder / "images").mkdir(parents=True, exist_ok=True)
        (folder / "labels").mkdir(exist_ok=True)
        Image.new("RGB", (2666, 400), (9, 99, 9)).save(
            folder / "images" / f"{name}.jpg"
        )
        lines = [f"{names.index(label)} {box}" for label, box in boxes]
        (folder / "labels" / f"{name}.txt").write_text("\n".join(lines))
    listed = "\n".join(f"  {k}: {name}" for k, name in enumerate(names))
    (folder / "data.yaml").write_text(f"path: .\ntrain: images\nnames:\n{listed}\n")
    return str(folder)


def detection_json(
    label: str = "car",
    score: float = 0.5,
    box: Iterable[float] = (1, 2, 30, 20),
    **fields: Any,
) -> dict[str, Any]:
    """Return one detection in the reference wire format."""
    return {"box": list(box), "label": label, "score": score, **fields}


def response_json(
    *detections: dict[str, Any], width: int = 60, height: int = 40
) -> dict[str, Any]:
    """Return a response in the reference wire format."""
    return {"image": {"w": width, "h": height}, "detections": list(detections)}


def ok_response(*detections: dict[str, Any]) -> httpx.Response:
    """Return a response of status 200, with one detection unless told otherwise."""
    return httpx.Response(200, json=response_json(*(detections or (detection_json(),))))


def status_response(
    code: int, headers: Mapping[str, str] | None = None, **problem: str
) -> httpx.Response:
    """Return a response of this status whose body is ``problem``."""
    return httpx.Response(code, headers=headers, content=json.dumps(problem).encode())


def same_detections(first: RawDetections, second: RawDetections) -> bool:
    """Return whether two results are equal, to the bit."""
    return (
        np.array_equal(first.boxes, second.boxes)
        and np.array_equal(first.class_scores, second.class_scores)
        and first.score_kind == second.score_kind
        and first.unmapped == second.unmapped
    )


def journal_text(folder: Path) -> str:
    """Return the text of all segments below a folder: as stored, and each body
    uncompressed.
    """
    texts = []
    for file in folder.rglob("*.segment"):
        segment, offset = file.read_bytes(), 0
        texts.append(segment.decode("latin-1"))
        while offset < len(segment):
            magic, head_length, body_length, _ = HEADER.unpack_from(segment, offset)
            assert magic == MAGIC
            start = offset + HEADER.size + head_length
            offset = start + body_length
            texts.append(zlib.decompress(segment[start:offset]).decode("latin-1"))
    return "\n".join(texts)


JOURNAL_WRITER = """
import sys
from coin_ray.cloud.journal.base import AnswerRecord
from coin_ray.cloud.journal.opening import open_journal
journal = open_journal(sys.argv[1])
for i in range(10**6):
    journal.attempt(str(i), 0.01)
    journal.put(str(i), AnswerRecord(b"%d" % i))
    print(i, flush=True)
"""
"""A process that writes responses ``0``, ``1``, ... and prints the number of each."""


def start_journal_writer(uri: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", JOURNAL_WRITER, uri], stdout=subprocess.PIPE, text=True
    )


def check_killed_journal_writer(uri: str, records: int) -> None:
    """Kill a writer after so many records, and check that all it reported is there and
    that at most one more call counts as spent.
    """
    process = start_journal_writer(uri)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(records)]
    os.kill(process.pid, signal.SIGKILL)
    lines += process.stdout.read().splitlines()
    process.stdout.close()
    process.wait()
    last = int(lines[-1])
    journal = open_journal(uri)
    assert all(journal.get(str(i)) is not None for i in range(last + 1))
    assert last + 1 <= journal.spent()[0] <= last + 2


ERRORS: dict[str, Callable[[], CloudError]] = {
    "throttled": lambda: Throttled("too fast", 3.0),
    "throttled long": lambda: Throttled("much too fast", 1e9),
    "quota": lambda: QuotaExhausted("out of quota"),
    "auth": lambda: AuthError("the token has expired"),
    "rejected": lambda: ImageRejected("not an image"),
    "busy": lambda: Transient("try later"),
    "paid": lambda: Transient("failed while computing", may_have_billed=True),
    "unknown": lambda: BadRequest("what is that?"),
}


@dataclass(frozen=True)
class InBodyAdapter(ReferenceAdapter):
    """The reference format, except that errors are ``{"error": name}`` with status 200."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    """Capabilities that differ from those of the reference adapter."""

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, **self.changes)

    def decode(
        self, headers: Mapping[str, str], body: bytes, query: Query, frame: Frame
    ) -> RawDetections:
        name = error_object(body).get("error")
        if isinstance(name, str):
            raise ERRORS[name]()
        return super().decode(headers, body, query, frame)


@dataclass(frozen=True)
class TaskAdapter:
    """A service of tasks: ``{"task": id}``, then ``{"wait": seconds}`` until a response
    in the reference format or an error as above.
    """

    asynchronous: bool = True
    reference: InBodyAdapter = InBodyAdapter()

    @property
    def capabilities(self) -> Capabilities:
        return replace(
            self.reference.capabilities,
            name="tasks",
            asynchronous=self.asynchronous,
            health_path=None,
        )

    def encode(self, image: CanonicalImage, query: Query) -> PreparedRequest:
        return replace(self.reference.encode(image, query), path="/tasks")

    def decode(
        self, headers: Mapping[str, str], body: bytes, query: Query, frame: Frame
    ) -> RawDetections | Pending:
        response = error_object(body)
        if "task" in response:
            path = f"{response.get('at', '/tasks/')}{response['task']}"
            poll = PreparedRequest(path, method="GET")
            return Pending(poll, response.get("wait", 1.0))
        if "wait" in response:
            return Pending(None, response["wait"])
        return self.reference.decode(headers, body, query, frame)

    def classify_error(
        self, status: int, headers: Mapping[str, str], body: bytes
    ) -> CloudError:
        return self.reference.classify_error(status, headers, body)


@dataclass
class ScriptedService:
    """A service that replies in order and repeats its last reply; it records requests."""

    replies: list[Reply]
    requests: list[httpx.Request] = field(default_factory=list)
    handler: Callable[[httpx.Request], Awaitable[httpx.Response]] | None = None
    """Answers instead of the replies, if there is one."""

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if self.handler is not None:
            return await self.handler(request)
        reply = self.replies[min(len(self.requests), len(self.replies)) - 1]
        await asyncio.sleep(0)
        if isinstance(reply, Exception):
            raise reply
        if callable(reply):
            return reply(request)
        return httpx.Response(
            reply.status_code, headers=reply.headers, content=reply.content
        )


@dataclass
class ClientHarness:
    """A client, the scripted service it talks to, and what both share."""

    client: CloudClient
    service: ScriptedService
    journal: Journal
    governor: Governor
    time: FakeTime


HarnessBuilder = Callable[..., ClientHarness]


class SharedPerLoop:
    """A worker's side of a shared governor, as cloud actors have it, for tests that use
    several event loops. What became of a call is told at once.
    """

    def __init__(self, governor: Governor) -> None:
        self.governor = governor
        self.remote: dict[asyncio.AbstractEventLoop, RemoteGovernor] = {}

    def here(self) -> RemoteGovernor:
        loop = asyncio.get_running_loop()
        if loop not in self.remote:
            shared = SharedGovernor(self.governor)
            self.remote[loop] = RemoteGovernor(shared.exchange, "worker")
        return self.remote[loop]

    async def reserve(self, usd: float, retry: bool = False, key: str = "") -> Grant:
        return await self.here().reserve(usd, retry, key)

    async def arrived(self, lease: int) -> None:
        await self.here().arrived(lease)
        await self.here().flush()

    async def settle(
        self,
        lease: int,
        outcome: Outcome,
        billed: bool,
        error: CloudError | None = None,
    ) -> None:
        await self.here().settle(lease, outcome, billed, error)
        await self.here().flush()

    async def pause(self, seconds: float) -> None:
        await self.here().pause(seconds)
        await self.here().flush()

    async def stats(self) -> GovernorStats:
        return self.governor.stats()


@pytest.fixture(params=["own governor", "shared governor"])
def build_harness(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> HarnessBuilder:
    """Return a function that builds a client in front of scripted replies; its settings
    are those of ``Cloud``. Its governor is its own, or that of several cloud actors.
    """
    is_shared = request.param == "shared governor"
    monkeypatch.setattr(shared_governor, "GROUP_SECONDS", 0.0)

    def build(
        *replies: Reply,
        adapter: Adapter | None = None,
        skip_over_budget: bool = False,
        url: str = URL,
        folder: str = "journal",
        wall_clock: Callable[[], float] = time.time,
        **settings: Any,
    ) -> ClientHarness:
        clock = FakeTime()
        config = Cloud(**{"url": url, "rate": 1000.0, **settings})
        service = ScriptedService(list(replies))
        journal = open_journal(str(tmp_path / folder))
        governor = Governor(governor_limits(config), journal.spent(), clock)
        client = CloudClient(
            config,
            CLASSES,
            url,
            journal,
            SharedPerLoop(governor) if is_shared else LocalGovernor(governor),
            adapter,
            transport=httpx.MockTransport(service),
            skip_over_budget=skip_over_budget,
            sleep=clock.sleep,
            clock=clock,
            uniform=lambda low, high: high,
            wall_clock=wall_clock,
        )
        return ClientHarness(client, service, journal, governor, clock)

    return build
