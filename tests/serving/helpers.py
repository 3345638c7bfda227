"""A detector, requests and a running server for the tests of serving."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import uvicorn
from fastapi import FastAPI
from PIL import Image

from coin_ray.predictors.scored_boxes import ScoredBoxes
from tests.images import jpeg

Request = tuple[str, str] | tuple[str, str, Any]
"""Method, path and JSON or bytes to send."""


class BrightnessDetector:
    """Detects one box in the middle half of each image."""

    name = "brightness"
    classes: Sequence[str] = ("dark", "bright")

    def detect(
        self, image: Image.Image, classes: Sequence[str], score_min: float
    ) -> ScoredBoxes:
        bright = float(np.asarray(image).mean()) / 255
        scores = {"dark": 1 - bright, "bright": bright}
        width, height = image.size
        box = [width / 4, height / 4, width * 3 / 4, height * 3 / 4]
        requested = [scores[name] for name in classes]
        return np.array([box], np.float32), np.array([requested], np.float32)


def detect_request(
    image: bytes = b"", classes: Sequence[str] = ("dark", "bright")
) -> dict[str, Any]:
    return {
        "image": encoded_image(image or jpeg()),
        "classes": list(classes),
        "threshold": 0.05,
    }


def encoded_image(file_bytes: bytes) -> dict[str, str]:
    return {"b64": base64.b64encode(file_bytes).decode()}


def client_of(
    app: FastAPI, headers: Mapping[str, str] | None = None
) -> httpx.AsyncClient:
    """Return a client that calls ``app`` without a socket."""
    transport = httpx.ASGITransport(app)
    return httpx.AsyncClient(
        transport=transport, base_url="http://local", headers=headers
    )


def send(app: FastAPI, *requests: Request, **headers: str) -> list[httpx.Response]:
    """Send requests one after the other; underscores in header names become dashes."""
    dashed = {name.replace("_", "-"): text for name, text in headers.items()}

    async def send_all() -> list[httpx.Response]:
        async with client_of(app, dashed) as client:
            return [await _send_one(client, *request) for request in requests]

    return asyncio.run(send_all())


async def _send_one(
    client: httpx.AsyncClient, method: str, path: str, body: Any = None
) -> httpx.Response:
    encoded = body if body is None or isinstance(body, bytes) else json.dumps(body)
    return await client.request(method, path, content=encoded)


def post(app: FastAPI, *bodies: Any, **headers: str) -> list[httpx.Response]:
    """Send each body, JSON or bytes, to the detection route."""
    return send(app, *(("POST", "/v1/detect", body) for body in bodies), **headers)


@contextmanager
def run_server(app: FastAPI) -> Iterator[str]:
    """Serve on a real socket, in a thread of the test; yield the URL."""
    config = uvicorn.Config(app, port=0, log_level="error")
    socket, server = config.bind_socket(), uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
