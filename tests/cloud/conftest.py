"""A client whose time is a number, in front of scripted answers."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from coin_ray.cloud.client import CloudClient, limits
from coin_ray.cloud.journal import Journal
from coin_ray.cloud.limiter import Governor, LocalGovernor
from coin_ray.config import Cloud
from coin_ray.data.canonical import CanonicalImage, canonical_image

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
    Image.new("RGB", (width, height), (seed % 8 * 32, seed // 8 % 8 * 32, 7)).save(sink, "PNG")
    return canonical_image(sink.getvalue(), 4096)


def element(label: str = "car", score: float = 0.5, box: Iterable[float] = (1, 2, 30, 20), **more: Any) -> dict[str, Any]:
    return {"box": list(box), "label": label, "score": score, **more}


def answer_body(*elements: dict[str, Any], width: int = 60, height: int = 40) -> dict[str, Any]:
    return {"image": {"w": width, "h": height}, "detections": list(elements)}


def good(*elements: dict[str, Any]) -> httpx.Response:
    return httpx.Response(200, json=answer_body(*(elements or (element(),))))


def status(code: int, headers: Mapping[str, str] | None = None, **problem: str) -> httpx.Response:
    return httpx.Response(code, headers=headers, content=json.dumps(problem).encode())


@dataclass
class Service:
    """Replies in order, the last one for ever; remembers the requests."""

    replies: list[Reply]
    requests: list[httpx.Request] = field(default_factory=list)

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        reply = self.replies[min(len(self.requests), len(self.replies)) - 1]
        await asyncio.sleep(0)
        if isinstance(reply, Exception):
            raise reply
        if callable(reply):
            return reply(request)
        return httpx.Response(reply.status_code, headers=reply.headers, content=reply.content)


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

    def build(*replies: Reply, skip_over_budget: bool = False, url: str = URL, folder: str = "journal", **settings: Any) -> Bench:
        time = FakeTime()
        config = Cloud(**{"url": url, "rate": 1000.0, **settings})
        service = Service(list(replies))
        journal = Journal.open(str(tmp_path / folder))
        governor = Governor(limits(config), journal.spent(), time)
        client = CloudClient(
            config,
            CLASSES,
            url,
            journal,
            LocalGovernor(governor),
            transport=httpx.MockTransport(service),
            skip_over_budget=skip_over_budget,
            sleep=time.sleep,
            clock=time,
            uniform=lambda low, high: high,
        )
        return Bench(client, service, journal, governor, time)

    return build
