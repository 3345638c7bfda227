"""Send a bounded load of valid and invalid requests to a detection server, and record the
memory of its processes."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
import random
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
"""Memory is flat if the median of its last third exceeds that of its first third by at
most the larger of both, after a warm-up of a fifth of the time."""
PAUSE = 0.002
OTHER_SECONDS = 1.0


@dataclass
class LoadRecord:
    """Answers by (kind of request, status), seconds of good answers, MiB of the
    server's processes by time."""

    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)

    def bad_statuses(self) -> list[tuple[str, int]]:
        """Return the answers that are neither 2xx, 4xx nor 503."""
        return sorted(
            k
            for k in self.answers
            if not (200 <= k[1] < 300 or 400 <= k[1] < 500 or k[1] == 503)
        )

    def growth(self) -> dict[str, float]:
        """Return MiB: medians of the first and the last third after the warm-up, allowed
        growth, slope per hour (least squares)."""
        start, end = self.memory[0][0], self.memory[-1][0]
        warm = np.array(
            [sample for sample in self.memory if sample[0] >= start + (end - start) / 5]
        )
        times, mib = warm[:, 0], warm[:, 1]
        third = max(1, len(mib) // 3)
        before, after = float(np.median(mib[:third])), float(np.median(mib[-third:]))
        slope = np.polyfit(times, mib, 1)[0] * 3600 if len(mib) > 2 else 0.0
        return {
            "before_mib": round(before, 1),
            "after_mib": round(after, 1),
            "allowed_mib": round(max(GROWTH_MIB, GROWTH_SHARE * before), 1),
            "slope_mib_per_hour": round(float(slope), 1),
        }

    def is_flat(self) -> bool:
        growth = self.growth()
        return growth["after_mib"] - growth["before_mib"] <= growth["allowed_mib"]

    def as_json(self) -> dict[str, Any]:
        percentiles = {}
        if self.seconds:
            good = sorted(self.seconds)
            for percent in (50, 95, 99):
                position = min(len(good) - 1, len(good) * percent // 100)
                percentiles[f"p{percent}_ms"] = round(1000 * good[position], 1)
        statuses = Counter[int]()
        for (_, status), count in self.answers.items():
            statuses[status] += count
        return {
            "seconds": round(self.memory[-1][0] - self.memory[0][0]),
            "requests": self.answers.total(),
            "statuses": {str(k): statuses[k] for k in sorted(statuses)},
            "failed": dict(self.failed),
            **percentiles,
            **self.growth(),
        }

    def table(self) -> str:
        lines = ["| request | answers by status |", "|---|---|"]
        for kind in sorted({kind for kind, _ in self.answers}):
            counts = [
                f"{status}: {count}"
                for (kind_of_count, status), count in sorted(self.answers.items())
                if kind_of_count == kind
            ]
            lines.append(f"| {kind} | {', '.join(counts)} |")
        return "\n".join(lines)


def encoded_photo(seed: int) -> bytes:
    draw = np.random.default_rng(seed)
    size = (int(draw.integers(60, 900)), int(draw.integers(60, 700)))
    image = Image.fromarray(draw.integers(0, 255, (6, 8, 3), np.uint8)).resize(size)
    sink = io.BytesIO()
    image.save(sink, ("JPEG", "PNG", "WEBP")[seed % 3])
    return sink.getvalue()


def encode_request(image: bytes, classes: Sequence[str], **changes: Any) -> bytes:
    return json.dumps(
        {
            "image": {"b64": base64.b64encode(image).decode()},
            "classes": list(classes),
            "threshold": 0.3,
        }
        | changes
    ).encode()


def invalid_requests(classes: Sequence[str]) -> list[tuple[str, bytes]]:
    whole = encoded_photo(0)
    return [
        ("no json", b"\x00no json"),
        ("nested deep", b'{"image":' + b"[" * 50_000),
        ("no image", json.dumps({"classes": list(classes)}).encode()),
        (
            "no base64",
            json.dumps({"image": {"b64": "%%%"}, "classes": list(classes)}).encode(),
        ),
        ("text as image", encode_request(b"text", classes)),
        ("half an image", encode_request(whole[: len(whole) // 2], classes)),
        ("image bomb", encode_request(png_bomb(8000), classes)),
        ("unknown class", encode_request(whole, ["zebra", *classes])),
        ("threshold", encode_request(whole, classes, threshold=7)),
        ("a megabyte of zeros", bytes(MIB)),
    ]


class Load:
    """``clients`` send requests to ``url`` until the time is over, each its next one when
    the previous one is answered."""

    def __init__(self, url: str, classes: Sequence[str], clients: int) -> None:
        self.record = LoadRecord()
        self._url, self._clients = url, clients
        good = [
            ("good", encode_request(encoded_photo(seed), classes)) for seed in range(24)
        ]
        self._requests = itertools.cycle(
            random.Random(0).sample(
                [*good * 2, *invalid_requests(classes)], len(good) * 2 + 10
            )
        )
        self._end = 0.0

    async def run(self, seconds: float, memory: Callable[[], float]) -> LoadRecord:
        self._end = time.monotonic() + seconds
        limits = httpx.Limits(max_connections=self._clients + 4)
        async with httpx.AsyncClient(
            base_url=self._url, timeout=60, limits=limits
        ) as http:
            tasks = [self._send_requests(http) for _ in range(self._clients)]
            await asyncio.gather(
                *tasks,
                self._send_other_routes(http),
                self._disconnect_early(),
                self._sample_memory(memory),
            )
        return self.record

    async def _send_requests(self, http: httpx.AsyncClient) -> None:
        while time.monotonic() < self._end:
            kind, body = next(self._requests)
            started = time.monotonic()
            status = await self._record_status(
                kind,
                http.post(
                    "/v1/detect",
                    content=body,
                    headers={"Content-Type": "application/json"},
                ),
            )
            if kind == "good" and status == 200:
                self.record.seconds.append(time.monotonic() - started)
            await asyncio.sleep(0.1 if status == 503 else PAUSE)

    async def _send_other_routes(self, http: httpx.AsyncClient) -> None:
        """Request every other route, and a path and a method that do not exist, once a
        second."""
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
                await self._record_status(path, http.get(path))
            await self._record_status("DELETE", http.delete("/v1/detect"))
            await asyncio.sleep(OTHER_SECONDS)

    async def _disconnect_early(self) -> None:
        """Disconnect in the middle of a request twice a second."""
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

    async def _sample_memory(self, memory: Callable[[], float]) -> None:
        while time.monotonic() < self._end:
            self.record.memory.append(
                (time.monotonic(), await asyncio.to_thread(memory))
            )
            await asyncio.sleep(1.0)

    async def _record_status(self, kind: str, request: Any) -> int:
        try:
            status: int = (await request).status_code
        except httpx.HTTPError as error:
            self.record.failed[f"{kind}: {type(error).__name__}"] += 1
            return 0
        self.record.answers[kind, status] += 1
        return status


def process_tree_mib(process: psutil.Process) -> float:
    """Return the resident memory of a process and its descendants."""
    total = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            total += member.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total / MIB
