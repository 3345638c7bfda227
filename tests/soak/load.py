"""Bounded mixed load on a detection server, good requests and bad ones, and what its
processes' memory does meanwhile."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image

from tests.images import png_bomb

MIB = 2**20
GROWTH_MIB = 32.0
GROWTH_SHARE = 0.05
"""Memory is flat if the median of its last third is at most so much above that of its
first third: the larger of both, after a fifth to warm up."""
PAUSE = 0.002
OTHER_SECONDS = 1.0


@dataclass
class Seen:
    """Answers by (kind of request, status), seconds of good answers, MiB of the
    server's processes by time."""

    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)

    def bad_statuses(self) -> list[tuple[str, int]]:
        """Neither 2xx, 4xx nor 503."""
        return sorted(
            k
            for k in self.answers
            if not (200 <= k[1] < 300 or 400 <= k[1] < 500 or k[1] == 503)
        )

    def growth(self) -> dict[str, float]:
        """MiB: medians of the first and the last third after the warm-up, allowed
        growth, slope per hour (least squares)."""
        start, end = self.memory[0][0], self.memory[-1][0]
        kept = [(t, m) for t, m in self.memory if t >= start + (end - start) / 5]
        third = max(1, len(kept) // 3)
        before, after = (
            statistics.median(m for _, m in part)
            for part in (kept[:third], kept[-third:])
        )
        slope = (
            np.polyfit([t for t, _ in kept], [m for _, m in kept], 1)[0] * 3600
            if len(kept) > 2
            else 0.0
        )
        return {
            "before_mib": round(before, 1),
            "after_mib": round(after, 1),
            "allowed_mib": round(max(GROWTH_MIB, GROWTH_SHARE * before), 1),
            "slope_mib_per_hour": round(float(slope), 1),
        }

    def flat(self) -> bool:
        found = self.growth()
        return found["after_mib"] - found["before_mib"] <= found["allowed_mib"]

    def as_json(self) -> dict[str, Any]:
        good = sorted(self.seconds)
        shares = (
            {
                f"p{p}_ms": round(
                    1000 * good[min(len(good) - 1, len(good) * p // 100)], 1
                )
                for p in (50, 95, 99)
            }
            if good
            else {}
        )
        statuses = Counter[int]()
        for (_, status), count in self.answers.items():
            statuses[status] += count
        return {
            "seconds": round(self.memory[-1][0] - self.memory[0][0]),
            "requests": self.answers.total(),
            "statuses": {str(k): statuses[k] for k in sorted(statuses)},
            "failed": dict(self.failed),
            **shares,
            **self.growth(),
        }

    def table(self) -> str:
        kinds = sorted({kind for kind, _ in self.answers})
        rows = [
            f"| {kind} |"
            f" {', '.join(f'{s}: {n}' for (k, s), n in sorted(self.answers.items()) if k == kind)} |"
            for kind in kinds
        ]
        return "\n".join(["| request | answers by status |", "|---|---|", *rows])


def photo(seed: int) -> bytes:
    draw = np.random.default_rng(seed)
    size = (int(draw.integers(60, 900)), int(draw.integers(60, 700)))
    image = Image.fromarray(draw.integers(0, 255, (6, 8, 3), np.uint8)).resize(size)
    sink = io.BytesIO()
    image.save(sink, ("JPEG", "PNG", "WEBP")[seed % 3])
    return sink.getvalue()


def question(image: bytes, classes: Sequence[str], **changes: Any) -> bytes:
    return json.dumps(
        {
            "image": {"b64": base64.b64encode(image).decode()},
            "classes": list(classes),
            "threshold": 0.3,
        }
        | changes
    ).encode()


def bad_questions(classes: Sequence[str]) -> list[tuple[str, bytes]]:
    whole = photo(0)
    return [
        ("no json", b"\x00no json"),
        ("nested deep", b'{"image":' + b"[" * 50_000),
        ("no image", json.dumps({"classes": list(classes)}).encode()),
        (
            "no base64",
            json.dumps({"image": {"b64": "%%%"}, "classes": list(classes)}).encode(),
        ),
        ("text as image", question(b"text", classes)),
        ("half an image", question(whole[: len(whole) // 2], classes)),
        ("image bomb", question(png_bomb(8000), classes)),
        ("unknown class", question(whole, ["zebra", *classes])),
        ("threshold", question(whole, classes, threshold=7)),
        ("a megabyte of zeros", bytes(MIB)),
    ]


class Load:
    """``clients`` ask ``url`` until the time is over, each its next request when the
    one before is answered."""

    def __init__(self, url: str, classes: Sequence[str], clients: int) -> None:
        self.seen = Seen()
        self._url, self._clients = url, clients
        good = [("good", question(photo(seed), classes)) for seed in range(24)]
        self._questions = itertools.cycle(
            random.Random(0).sample(
                [*good * 2, *bad_questions(classes)], len(good) * 2 + 10
            )
        )
        self._end = 0.0

    async def run(self, seconds: float, memory: Callable[[], float]) -> Seen:
        self._end = time.monotonic() + seconds
        limits = httpx.Limits(max_connections=self._clients + 4)
        async with httpx.AsyncClient(
            base_url=self._url, timeout=60, limits=limits
        ) as http:
            tasks = [self._asking(http) for _ in range(self._clients)]
            await asyncio.gather(
                *tasks, self._others(http), self._leaving(), self._watching(memory)
            )
        return self.seen

    async def _asking(self, http: httpx.AsyncClient) -> None:
        while time.monotonic() < self._end:
            kind, body = next(self._questions)
            started = time.monotonic()
            status = await self._noted(
                kind,
                http.post(
                    "/v1/detect",
                    content=body,
                    headers={"Content-Type": "application/json"},
                ),
            )
            if kind == "good" and status == 200:
                self.seen.seconds.append(time.monotonic() - started)
            await asyncio.sleep(0.1 if status == 503 else PAUSE)

    async def _others(self, http: httpx.AsyncClient) -> None:
        """Once a second every other route, a path and a method that are none."""
        while time.monotonic() < self._end:
            for path in (
                "/",
                "/health",
                "/health/live",
                "/health/ready",
                "/metrics",
                "/openapi.json",
                "/no/such",
            ):
                await self._noted(path, http.get(path))
            await self._noted("DELETE", http.delete("/v1/detect"))
            await asyncio.sleep(OTHER_SECONDS)

    async def _leaving(self) -> None:
        """Twice a second a client that goes away in the middle of its request."""
        host, _, port = self._url.removeprefix("http://").partition(":")
        while time.monotonic() < self._end:
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(
                b"POST /v1/detect HTTP/1.1\r\nHost: x\r\nContent-Length:"
                b" 1000000\r\n\r\n" + bytes(1000)
            )
            await writer.drain()
            await asyncio.sleep(0.1)
            writer.close()
            await asyncio.sleep(0.4)

    async def _watching(self, memory: Callable[[], float]) -> None:
        while time.monotonic() < self._end:
            self.seen.memory.append((time.monotonic(), await asyncio.to_thread(memory)))
            await asyncio.sleep(1.0)

    async def _noted(self, kind: str, request: Any) -> int:
        try:
            status: int = (await request).status_code
        except httpx.HTTPError as error:
            self.seen.failed[f"{kind}: {type(error).__name__}"] += 1
            return 0
        self.seen.answers[kind, status] += 1
        return status


def tree_mib(process: psutil.Process) -> float:
    """Resident memory of a process and all below it."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total / MIB
