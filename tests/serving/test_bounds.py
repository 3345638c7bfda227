"""What a server takes on, and what it refuses before it costs memory."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import struct
import zlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from coin_ray.serving import admission
from coin_ray.serving.fault_injection import Recent
from coin_ray.serving.server import create_app
from coin_ray.serving.wire import BODY_MAX, CLASSES_MAX, PROBLEM
from tests.serving.running import running
from tests.serving.test_local_cloud import Brightness, call, jpeg, post


def png_bomb(side: int) -> bytes:
    """A valid PNG of side x side black pixels in a few kilobytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    packer = zlib.compressobj(9)
    row = bytes(side // 8 + 1)
    rows = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", rows)
        + chunk(b"IEND", b"")
    )


def encoded(data: bytes) -> dict[str, str]:
    return {"b64": base64.b64encode(data).decode()}


REFUSED: list[tuple[str, Any, int, str]] = [
    ("threshold not a number", {**call(), "threshold": "0.5"}, 400, "threshold"),
    ("threshold above 1", {**call(), "threshold": 1.5}, 400, "threshold"),
    (
        "threshold too long for a float",
        json.dumps(call()).replace("0.05", "1" + "0" * 400).encode(),
        400,
        "threshold",
    ),
    ("threshold NaN", json.dumps(call()).replace("0.05", "NaN").encode(), 400, ""),
    ("a class twice", {**call(), "classes": ["dark", "dark"]}, 400, "told apart"),
    ("an empty class", {**call(), "classes": [""]}, 400, "classes.0"),
    (
        "too many classes",
        {**call(), "classes": [str(i) for i in range(CLASSES_MAX + 1)]},
        400,
        "classes",
    ),
    (
        "half a surrogate",
        json.dumps(call()).replace("bright", "\\ud800").encode(),
        400,
        "",
    ),
    ("nested deep", b'{"image":' + b"[" * 100_000, 400, ""),
    ("no text", b"\xff\xfe\x00", 400, ""),
    (
        "an image of a few pixels",
        {**call(), "image": encoded(jpeg(size=(3, 300)))},
        415,
        "too small",
    ),
    (
        "a small file of many pixels",
        {**call(), "image": encoded(png_bomb(13_000))},
        413,
        "make it smaller",
    ),
    (
        "more pixels than Pillow opens",
        {**call(), "image": encoded(png_bomb(20_000))},
        415,
        "pixels",
    ),
]


@pytest.mark.parametrize(
    ("question", "code", "reason"),
    [r[1:] for r in REFUSED],
    ids=[r[0] for r in REFUSED],
)
def test_a_bad_upload_gets_its_reason(question: Any, code: int, reason: str) -> None:
    app = create_app(Brightness(), pixels_max=100_000_000)
    response, fine = post(app, question, call())
    assert (response.status_code, fine.status_code) == (code, 200)
    assert response.headers["content-type"] == PROBLEM
    assert reason in response.json()["detail"]
    assert len(response.content) < 1000


def stream(app: Any, parts: Any, **headers: str) -> httpx.Response:
    async def run() -> httpx.Response:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://local"
        ) as client:
            return await client.post("/v1/detect", content=parts, headers=headers)

    return asyncio.run(run())


class Parts:
    """Parts of 1 MiB without end; remembers how many were taken."""

    taken = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            self.taken += 1
            yield b"x" * 2**20


def test_a_body_without_end_is_given_up_at_the_limit() -> None:
    parts = Parts()
    app = create_app(Brightness())
    response = stream(app, parts)
    assert response.status_code == 413
    assert parts.taken <= 2 * BODY_MAX / 2**20 + 4, (
        "what is read to let the client see the answer is bounded too"
    )
    assert app.state.cloud._bytes.used == 0


@pytest.mark.parametrize("length", [str(BODY_MAX + 1), "9" * 5000])
def test_a_length_that_is_too_large_is_refused_before_anything_is_kept(
    length: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        admission.Body, "_hold", lambda *_: pytest.fail("a byte was kept")
    )
    response = stream(create_app(Brightness()), Parts(), **{"content-length": length})
    assert response.status_code == 413


def test_a_body_that_does_not_arrive_is_a_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "READ_SECONDS", 0.05)
    monkeypatch.setattr(admission, "DRAIN_SECONDS", 0.05)

    async def slow() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(30)

    app = create_app(Brightness())
    assert stream(app, slow()).status_code == 408
    assert app.state.cloud.waiting == 0


@pytest.mark.parametrize("room", ["_bytes", "_pixels"])
def test_beyond_the_bytes_or_pixels_of_all_calls_the_answer_is_503(room: str) -> None:
    app = create_app(Brightness())
    shared = getattr(app.state.cloud, room)
    with shared.taken(shared.limit - 100):
        (busy,) = post(app, call())
    (fine,) = post(app, call())
    assert (busy.status_code, busy.headers["retry-after"], fine.status_code) == (
        503,
        "1",
        200,
    )
    assert shared.used == 0


def test_what_is_remembered_of_images_is_bounded() -> None:
    recent = Recent(limit=3)
    assert [recent.again(key) for key in "aabcad"] == [1, 2, 1, 1, 3, 1]
    assert len(recent) == 3
    assert recent.again("b") == 1, "the one not seen for longest was forgotten"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running(create_app(Brightness(), token="right")) as place:
        yield place


@pytest.mark.parametrize(
    ("token", "size", "code"), [("right", BODY_MAX + 1, 413), ("wrong", 8 * 2**20, 401)]
)
def test_a_client_that_is_still_sending_sees_why_it_was_refused(
    url: str, token: str, size: int, code: int
) -> None:
    response = httpx.post(
        f"{url}/v1/detect",
        content=bytes(size),
        headers={"Authorization": f"Bearer {token}"},
        timeout=30,
    )
    assert (response.status_code, response.headers["content-type"]) == (code, PROBLEM)


@pytest.fixture(scope="module")
def app() -> Any:
    return create_app(Brightness(), pixels_max=1_000_000)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(st.binary(max_size=400))
def test_any_bytes_as_an_image_are_a_4xx_with_a_reason_or_an_answer(
    app: Any, data: bytes
) -> None:
    (response,) = post(app, {**call(), "image": encoded(data)})
    assert response.status_code == 200 or (
        400 <= response.status_code < 500 and response.json()["title"]
    )


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"]),
    st.integers(0, 600),
    st.binary(min_size=1, max_size=8),
)
def test_a_damaged_image_is_a_4xx_or_an_answer(
    app: Any, kind: str, place: int, noise: bytes
) -> None:
    sink = io.BytesIO()
    Image.linear_gradient("L").resize((24, 16)).convert("RGB").save(sink, kind)
    whole = sink.getvalue()
    damaged = whole[:place] + noise + whole[place + len(noise) :]
    (response,) = post(app, {**call(), "image": encoded(damaged)})
    assert response.status_code in (200, 413, 415)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    st.integers(8, 200),
    st.integers(8, 200),
    st.sampled_from(["JPEG", "PNG", "WEBP"]),
    st.floats(0, 1),
)
def test_every_usable_image_is_answered_in_its_own_frame(
    app: Any, width: int, height: int, kind: str, threshold: float
) -> None:
    sink = io.BytesIO()
    Image.new("RGB", (width, height), "white").save(sink, kind)
    (response,) = post(
        app, {**call(), "image": encoded(sink.getvalue()), "threshold": threshold}
    )
    assert response.status_code == 200
    assert response.json()["image"] == {"w": width, "h": height}
