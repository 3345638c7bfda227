"""Limits of the server, and what it refuses before it costs memory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from coin_ray.serving import admission
from coin_ray.serving.fault_injection import RecentKeyCounts
from coin_ray.serving.server import create_app
from coin_ray.serving.wire import BODY_MAX, CLASSES_MAX, PROBLEM_JSON
from tests.images import encode, jpeg, png_bomb
from tests.serving.helpers import (
    BrightnessDetector,
    client_of,
    detect_request,
    encoded_image,
    post,
    run_server,
)

MEBIBYTE = 2**20
REQUEST = detect_request()
REQUEST_TEXT = json.dumps(REQUEST)


def _request_with_image(file_bytes: bytes) -> dict[str, Any]:
    return {**REQUEST, "image": encoded_image(file_bytes)}


REFUSED: list[tuple[str, Any, int, str]] = [
    ("threshold not a number", {**REQUEST, "threshold": "0.5"}, 400, "threshold"),
    ("threshold above 1", {**REQUEST, "threshold": 1.5}, 400, "threshold"),
    (
        "threshold too long for a float",
        REQUEST_TEXT.replace("0.05", "1" + "0" * 400).encode(),
        400,
        "threshold",
    ),
    ("threshold NaN", REQUEST_TEXT.replace("0.05", "NaN").encode(), 400, ""),
    ("a class twice", {**REQUEST, "classes": ["dark", "dark"]}, 400, "told apart"),
    ("an empty class", {**REQUEST, "classes": [""]}, 400, "classes.0"),
    (
        "too many classes",
        {**REQUEST, "classes": [str(number) for number in range(CLASSES_MAX + 1)]},
        400,
        "classes",
    ),
    (
        "half a surrogate",
        REQUEST_TEXT.replace("bright", "\\ud800").encode(),
        400,
        "",
    ),
    ("nested deep", b'{"image":' + b"[" * 100_000, 400, ""),
    ("no text", b"\xff\xfe\x00", 400, ""),
    (
        "an image of a few pixels",
        _request_with_image(jpeg(size=(3, 300))),
        415,
        "too small",
    ),
    (
        "a small file of many pixels",
        _request_with_image(png_bomb(13_000)),
        413,
        "make it smaller",
    ),
    (
        "more pixels than Pillow opens",
        _request_with_image(png_bomb(20_000)),
        415,
        "pixels",
    ),
]


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [case[1:] for case in REFUSED],
    ids=[case[0] for case in REFUSED],
)
def test_a_bad_upload_gets_its_reason(body: Any, status: int, reason: str) -> None:
    app = create_app(BrightnessDetector(), pixels_max=100_000_000)
    refused, answered = post(app, body, REQUEST)
    assert (refused.status_code, answered.status_code) == (status, 200)
    assert refused.headers["content-type"] == PROBLEM_JSON
    assert reason in refused.json()["detail"]
    assert len(refused.content) < 1000


def _post_chunks(
    app: FastAPI, chunks: AsyncIterable[bytes], **headers: str
) -> httpx.Response:
    async def run() -> httpx.Response:
        async with client_of(app) as client:
            return await client.post("/v1/detect", content=chunks, headers=headers)

    return asyncio.run(run())


class EndlessChunks:
    """Chunks of 1 MiB; counts how many were read."""

    read = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            self.read += 1
            yield b"x" * MEBIBYTE


def test_an_endless_body_is_abandoned_at_the_limit() -> None:
    chunks = EndlessChunks()
    app = create_app(BrightnessDetector())
    response = _post_chunks(app, chunks)
    assert response.status_code == 413
    assert chunks.read <= 2 * BODY_MAX / MEBIBYTE + 4, (
        "what is read to let the client see the answer is bounded too"
    )
    assert app.state.service._body_bytes.used == 0


@pytest.mark.parametrize("length", [str(BODY_MAX + 1), "9" * 5000])
def test_a_declared_length_that_is_too_large_is_refused_before_anything_is_held(
    length: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        admission.RequestBody, "_hold", lambda *_: pytest.fail("a byte was held")
    )
    app = create_app(BrightnessDetector())
    response = _post_chunks(app, EndlessChunks(), **{"content-length": length})
    assert response.status_code == 413


def test_a_body_that_does_not_arrive_is_a_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "READ_SECONDS", 0.05)
    monkeypatch.setattr(admission, "DRAIN_SECONDS", 0.05)

    async def slow_chunks() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(30)

    app = create_app(BrightnessDetector())
    assert _post_chunks(app, slow_chunks()).status_code == 408
    assert app.state.service.waiting == 0


@pytest.mark.parametrize("limiter_name", ["_body_bytes", "_image_pixels"])
def test_beyond_the_bytes_or_pixels_of_all_calls_the_answer_is_503(
    limiter_name: str,
) -> None:
    app = create_app(BrightnessDetector())
    limiter = getattr(app.state.service, limiter_name)
    with limiter.acquire(limiter.limit - 100):
        (busy,) = post(app, REQUEST)
    (answered,) = post(app, REQUEST)
    assert (busy.status_code, answered.status_code) == (503, 200)
    assert busy.headers["retry-after"] == "1"
    assert limiter.used == 0


def test_the_counts_of_images_are_bounded() -> None:
    counts = RecentKeyCounts(limit=3)
    assert [counts.increment(key) for key in "aabcad"] == [1, 2, 1, 1, 3, 1]
    assert len(counts) == 3
    assert counts.increment("b") == 1, "the key not seen for longest was dropped"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with run_server(create_app(BrightnessDetector(), token="right")) as server_url:
        yield server_url


@pytest.mark.parametrize(
    ("token", "size", "status"),
    [("right", BODY_MAX + 1, 413), ("wrong", 8 * MEBIBYTE, 401)],
)
def test_a_client_that_is_still_sending_sees_why_it_was_refused(
    url: str, token: str, size: int, status: int
) -> None:
    response = httpx.post(
        f"{url}/v1/detect",
        content=bytes(size),
        headers={"Authorization": f"Bearer {token}"},
        timeout=30,
    )
    assert response.status_code == status
    assert response.headers["content-type"] == PROBLEM_JSON


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return create_app(BrightnessDetector(), pixels_max=1_000_000)


SLOW_ALLOWED = settings(suppress_health_check=[HealthCheck.too_slow])


@SLOW_ALLOWED
@given(st.binary(max_size=400))
def test_any_bytes_as_an_image_are_a_4xx_with_a_reason_or_an_answer(
    app: FastAPI, file_bytes: bytes
) -> None:
    (response,) = post(app, _request_with_image(file_bytes))
    if response.status_code != 200:
        assert 400 <= response.status_code < 500
        assert response.json()["title"]


@SLOW_ALLOWED
@given(
    st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"]),
    st.integers(0, 600),
    st.binary(min_size=1, max_size=8),
)
def test_a_damaged_image_is_a_4xx_or_an_answer(
    app: FastAPI, file_format: str, offset: int, noise: bytes
) -> None:
    image = Image.linear_gradient("L").resize((24, 16)).convert("RGB")
    file_bytes = encode(image, file_format)
    damaged = file_bytes[:offset] + noise + file_bytes[offset + len(noise) :]
    (response,) = post(app, _request_with_image(damaged))
    assert response.status_code in (200, 413, 415)


@SLOW_ALLOWED
@given(
    st.integers(8, 200),
    st.integers(8, 200),
    st.sampled_from(["JPEG", "PNG", "WEBP"]),
    st.floats(0, 1),
)
def test_every_usable_image_is_answered_in_its_own_frame(
    app: FastAPI, width: int, height: int, file_format: str, threshold: float
) -> None:
    file_bytes = encode(Image.new("RGB", (width, height), "white"), file_format)
    body = {**_request_with_image(file_bytes), "threshold": threshold}
    (response,) = post(app, body)
    assert response.status_code == 200
    assert response.json()["image"] == {"w": width, "h": height}
