"""A client whose time is a number, in front of scripted answers."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from coin_ray.cloud.adapters.parsing import error_object
from coin_ray.cloud.adapters.reference import ReferenceAdapter
from coin_ray.cloud.client import CloudClient, limits
from coin_ray.cloud.governor import Governor, LocalGovernor
from coin_ray.cloud.journal.journal import Journal
from coin_ray.cloud.protocol import (
    Adapter,
    Capabilities,
    Frame,
    Pending,
    PreparedRequest,
    Query,
    RawDetections,
)
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


class FakeTime:
    """Sleeping advances the clock and lets other tasks run."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


def picture(seed: int = 0, width: int = 60, height: int = 40) -> CanonicalImage:
    sink = io.BytesIO()
    Image.new("RGB", (width, height), (seed % 8 * 32, seed // 8 % 8 * 32, 7)).save(
        sink, "PNG"
    )
    return canonical_image(sink.getvalue(), 4096)


def element(
    label: str = "car",
    score: float = 0.5,
    box: Iterable[float] = (1, 2, 30, 20),
    **more: Any,
) -> dict[str, Any]:
    return {"box": list(box), "label": label, "score": score, **more}


def answer_body(
    *elements: dict[str, Any], width: int = 60, height: int = 40
) -> dict[str, Any]:
    return {"image": {"w": width, "h": height}, "detections": list(elements)}


def good(*elements: dict[str, Any]) -> httpx.Response:
    return httpx.Response(200, json=answer_body(*(elements or (element(),))))


def status(
    code: int, headers: Mapping[str, str] | None = None, **problem: str
) -> httpx.Response:
    return httpx.Response(code, headers=headers, content=json.dumps(problem).encode())


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
    """The reference format, but errors come as ``{"error": name}`` with status 200."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    """Capabilities that differ."""

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
    """A service of tasks: ``{"task": id}``, then ``{"wait": seconds}`` until an answer
    in the reference format or an error as above."""

    asynchronous: bool = True
    sync: InBodyAdapter = InBodyAdapter()

    @property
    def capabilities(self) -> Capabilities:
        return replace(
            self.sync.capabilities,
            name="tasks",
            asynchronous=self.asynchronous,
            health_path=None,
        )

    def encode(self, image: CanonicalImage, query: Query) -> PreparedRequest:
        return replace(self.sync.encode(image, query), path="/tasks")

    def decode(
        self, headers: Mapping[str, str], body: bytes, query: Query, frame: Frame
    ) -> RawDetections | Pending:
        answer = error_object(body)
        if "task" in answer:
            return Pending(
                PreparedRequest(
                    f"{answer.get('at', '/tasks/')}{answer['task']}", method="GET"
                ),
                answer.get("wait", 1.0),
            )
        if "wait" in answer:
            return Pending(None, answer["wait"])
        return self.sync.decode(headers, body, query, frame)

    def classify_error(
        self, status: int, headers: Mapping[str, str], body: bytes
    ) -> CloudError:
        return self.sync.classify_error(status, headers, body)


@dataclass
class Service:
    """Replies in order, the last one for ever; remembers the requests."""

    replies: list[Reply]
    requests: list[httpx.Request] = field(default_factory=list)
    answered_by: Callable[[httpx.Request], Awaitable[httpx.Response]] | None = None
    """Instead of the replies."""

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if self.answered_by is not None:
            return await self.answered_by(request)
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
class Bench:
    client: CloudClient
    service: Service
    journal: Journal
    governor: Governor
    time: FakeTime


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., Bench]:
    """Builds a client around scripted replies; settings are those of ``Cloud``."""

    def build(
        *replies: Reply,
        adapter: Adapter | None = None,
        skip_over_budget: bool = False,
        url: str = URL,
        folder: str = "journal",
        wall_clock: Callable[[], float] = time.time,
        **settings: Any,
    ) -> Bench:
        fake = FakeTime()
        config = Cloud(**{"url": url, "rate": 1000.0, **settings})
        service = Service(list(replies))
        journal = Journal.open(str(tmp_path / folder))
        governor = Governor(limits(config), journal.spent(), fake)
        client = CloudClient(
            config,
            CLASSES,
            url,
            journal,
            LocalGovernor(governor),
            adapter,
            transport=httpx.MockTransport(service),
            skip_over_budget=skip_over_budget,
            sleep=fake.sleep,
            clock=fake,
            uniform=lambda low, high: high,
            wall_clock=wall_clock,
        )
        return Bench(client, service, journal, governor, fake)

    return build
