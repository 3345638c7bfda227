"""A cheap detection server in the reference wire format that counts calls: ``python
counting_server.py --width 64 --height 48``.

It reports one size for every image; boxes and scores follow from the request's bytes, so
equal requests get equal responses. It prints its address, and ends when its standard
input is closed.

``GET /stats``: ``calls`` received, each as [key, kind], and ``times``, the seconds at
which responses were sent. ``GET /count``: the number of calls received. ``POST
/reset?latency=0.5``: forget them. The server ignores repeated keys: a request sent twice
is billed twice.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import sys
import time
from dataclasses import dataclass, field
from urllib.parse import parse_qsl

BILLED = ("ok", "broken", "drop", "500")
"""Kinds of calls that are billed; the others are ``429`` and ``503``."""
REPLIED = ("ok", "broken")
"""Kinds of calls that get a body, whole or not."""
FAULTS = ("429", "503", "500", "broken", "drop")
STATUS = {
    "429": "429 Too Many Requests\r\nRetry-After: 0",
    "503": "503 Service Unavailable",
    "500": "500 Internal Server Error",
}


@dataclass
class Service:
    """State and settings of the server. ``faults``: share of the calls that fail, each
    kind alike, drawn from ``seed`` and the number of the call.
    """

    size: tuple[int, int]
    latency: float = 0.0
    faults: float = 0.0
    seed: int = 0
    boxes: int = 2
    labels: tuple[str, str, str] = ("car", "bus", "dog")
    calls: list[tuple[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def received(self, key: str) -> str:
        """Count a call, and return its kind."""
        kind = "ok"
        if self.faults:
            random_source = random.Random(f"{self.seed}:{len(self.calls)}")
            if random_source.random() < self.faults:
                kind = random_source.choice(FAULTS)
        self.calls.append((key, kind))
        return kind

    def stats(self) -> bytes:
        return json.dumps(
            {
                "calls": self.calls,
                "times": self.times,
                "cpu_seconds": time.process_time(),
            }
        ).encode()

    def count(self) -> bytes:
        return json.dumps(len(self.calls)).encode()

    def reset(self, query: str) -> None:
        self.calls, self.times = [], []
        self.latency = float(dict(parse_qsl(query)).get("latency", self.latency))

    def answer(self, body: bytes) -> bytes:
        digest = hashlib.sha256(body).digest()
        width, height = self.size
        detections = []
        for i in range(self.boxes):
            x0, y0, x1, y1, label, score = (
                byte / 256 for byte in digest[5 * i : 5 * i + 6]
            )
            box = [
                x0 * width / 2,
                y0 * height / 2,
                (1 + x1) * width / 2,
                (1 + y1) * height / 2,
            ]
            detection = {
                "box": box,
                "label": self.labels[int(3 * label)],
                "score": 0.1 + 0.9 * score,
            }
            detections.append(detection)
        image = {"w": width, "h": height}
        return json.dumps({"image": image, "detections": detections}).encode()


class Connection(asyncio.Protocol):
    """The part of HTTP/1.1 with keep-alive that httpx uses."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, received: bytes) -> None:
        self.buffer += received
        head_end = self.buffer.find(b"\r\n\r\n")
        if head_end < 0:
            return
        head = self.buffer[:head_end].decode("latin-1").split("\r\n")
        headers = {}
        for line in head[1:]:
            name, _, text = line.partition(": ")
            headers[name.lower()] = text
        end = head_end + 4 + int(headers.get("content-length", 0))
        if len(self.buffer) < end:
            return
        body = bytes(self.buffer[head_end + 4 : end])
        del self.buffer[:end]
        method, target, _ = head[0].split(" ")
        path, _, query = target.partition("?")
        self.respond(method, path, query, headers, body)

    def respond(
        self, method: str, path: str, query: str, headers: dict[str, str], body: bytes
    ) -> None:
        service = self.service
        if path == "/v1/detect" and method == "POST":
            kind = service.received(headers.get("idempotency-key", ""))
            asyncio.get_running_loop().call_later(
                service.latency, self.finish, kind, body
            )
            return
        if path == "/reset":
            service.reset(query)
        pages = {"/stats": service.stats, "/count": service.count}
        self.send("200 OK", pages[path]() if path in pages else b"{}")

    def finish(self, kind: str, body: bytes) -> None:
        if self.transport.is_closing():
            return
        if kind == "drop":
            self.transport.close()
        elif kind in STATUS:
            self.send(STATUS[kind], b"{}")
        else:
            response = self.service.answer(body)
            if kind == "broken":
                response = response[: len(response) // 2]
            self.send("200 OK", response)
            self.service.times.append(time.monotonic())

    def send(self, status: str, body: bytes) -> None:
        head = (
            f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length:"
            f" {len(body)}\r\n\r\n"
        )
        self.transport.write(head.encode() + body)


async def serve(service: Service) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: Connection(service), "127.0.0.1", 0, backlog=1000
    )
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    server.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--height", type=int, default=48)
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--faults", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--labels", nargs=3, default=["car", "bus", "dog"])
    options = parser.parse_args()
    service = Service(
        (options.width, options.height),
        options.latency,
        options.faults,
        options.seed,
        labels=tuple(options.labels),
    )
    asyncio.run(serve(service))


if __name__ == "__main__":
    main()
