from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import uvicorn
from PIL import Image

from coin_ray.cloud.accounts import governor_limits
from coin_ray.cloud.client import CloudClient
from coin_ray.cloud.governor import Governor, LocalGovernor
from coin_ray.cloud.journal.opening import open_journal
from coin_ray.config import Cloud
from coin_ray.data.canonical import canonical_image
from coin_ray.demo import detector as demo_detector
from coin_ray.errors import CloudUnreachable
from coin_ray.predictors.onnx_detectors import Floats, fuse_weighted_boxes
from coin_ray.serving.launch import local_cloud
from coin_ray.serving.local_cloud import create_app

needs_weights = pytest.mark.skipif(
    not demo_detector.WEIGHTS.exists(),
    reason="the demo's cloud has not been trained yet",
)


class Brightness:
    """Sees one box in the middle half of each image."""

    name = "brightness"
    classes: Sequence[str] = ("dark", "bright")

    def detect(
        self, image: Image.Image, classes: Sequence[str], score_min: float
    ) -> tuple[Floats, Floats]:
        bright = float(np.asarray(image).mean()) / 255
        scores = {"dark": 1 - bright, "bright": bright}
        w, h = image.size
        return np.array([[w / 4, h / 4, w * 3 / 4, h * 3 / 4]], np.float32), np.array(
            [[scores[c] for c in classes]], np.float32
        )


def jpeg(value: int = 200, size: tuple[int, int] = (40, 20)) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", size, (value,) * 3).save(sink, "JPEG")
    return sink.getvalue()


def call(
    image: bytes = b"", classes: Sequence[str] = ("dark", "bright")
) -> dict[str, Any]:
    return {
        "image": {"b64": base64.b64encode(image or jpeg()).decode()},
        "classes": list(classes),
        "threshold": 0.05,
    }


def post(app: Any, *calls: Any, **headers: str) -> list[httpx.Response]:
    headers = {name.replace("_", "-"): value for name, value in headers.items()}

    async def run() -> list[httpx.Response]:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://local"
        ) as client:
            return [
                await client.post(
                    "/v1/detect",
                    content=c if isinstance(c, bytes) else json.dumps(c),
                    headers=headers,
                )
                for c in calls
            ]

    return asyncio.run(run())


def test_answers_in_the_reference_format() -> None:
    (response,) = post(create_app(Brightness()), call())
    assert response.status_code == 200
    answer = response.json()
    assert answer["image"] == {"w": 40, "h": 20}
    (element,) = answer["detections"]
    assert element["box"] == [10, 5, 30, 15]
    assert element["label"] == "bright"
    assert (
        element["score"]
        == element["scores"]["bright"]
        == pytest.approx(200 / 255, abs=1e-3)
    )


REFUSED = [
    (b"no json", 400),
    (b"[]", 400),
    ({"classes": ["dark"]}, 400),
    ({**call(), "classes": []}, 400),
    ({**call(), "classes": "dark"}, 400),
    ({**call(), "image": {"b64": 5}}, 400),
    ({**call(), "image": {"b64": "%%%"}}, 415),
    (call(b"text"), 415),
    (call(jpeg()[:200]), 415),
    (call(classes=("dark", "zebra")), 422),
]


@pytest.mark.parametrize(("question", "code"), REFUSED)
def test_refusals_are_problems(question: Any, code: int) -> None:
    app = create_app(Brightness())
    (response,) = post(app, question)
    assert response.status_code == code
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["status"] == code
    assert app.state.cloud.stats.rejected == 1


def test_token() -> None:
    app = create_app(Brightness(), token="right")
    assert post(app, call())[0].status_code == 401
    assert post(app, call(), authorization="Bearer wrong")[0].status_code == 401
    assert post(app, call(), authorization="Bearer right")[0].status_code == 200
    assert app.state.cloud.stats.unauthorized == 2


def test_too_many_calls() -> None:
    app = create_app(Brightness(), rate=4.0)
    first, second = post(app, call(), call())
    assert (first.status_code, second.status_code) == (200, 429)
    assert int(second.headers["retry-after"]) >= 1
    assert app.state.cloud.stats.throttled == 1


def outcomes(seed: int, order: Sequence[int]) -> dict[int, list[Any]]:
    app = create_app(Brightness(), faults=0.5, seed=seed)
    result: dict[int, list[Any]] = {}
    for value in order:
        (response,) = post(app, call(jpeg(value)))
        whole = response.status_code == 200 and response.content.endswith(b"}")
        result.setdefault(value, []).append(whole or response.status_code)
    return result


def test_faults_depend_on_seed_image_and_attempt_only() -> None:
    order = [v for v in range(0, 240, 20) for _ in range(3)]
    first = outcomes(0, order)
    assert first == outcomes(0, order[::-1])
    assert first != outcomes(1, order)
    kinds = {kind for row in first.values() for kind in row}
    assert kinds == {True, 500, 503, 200}


def test_duplicates_are_counted() -> None:
    app = create_app(Brightness())
    post(app, call(), call(), idempotency_key="a")
    post(app, call(), idempotency_key="b")
    stats = app.state.cloud.stats
    assert (stats.received, stats.answered, stats.billed, stats.duplicates) == (
        3,
        3,
        3,
        1,
    )


def test_call_log(tmp_path: Path) -> None:
    log = tmp_path / "calls.jsonl"
    post(
        create_app(Brightness(), call_log=str(log)),
        call(),
        b"no json",
        idempotency_key="k",
    )
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["key"] for line in lines] == ["k", "k"]
    assert len(lines[0]["image"]) == 64
    assert lines[1]["image"] == ""


def test_the_client_gets_all_images_through_faults(tmp_path: Path) -> None:
    config = Cloud(url="http://local", rate=10_000.0)
    app = create_app(Brightness(), faults=0.2)

    async def run() -> list[Any]:
        async def no_sleep(seconds: float) -> None:
            await asyncio.sleep(0)

        governor = LocalGovernor(Governor(governor_limits(config)))
        journal = open_journal(str(tmp_path))
        client = CloudClient(
            config,
            Brightness.classes,
            config.url,
            journal,
            governor,
            transport=httpx.ASGITransport(app),
            sleep=no_sleep,
        )
        await client.check()
        images = [canonical_image(jpeg(5 * i, (30 + i, 20)), 4096) for i in range(40)]
        return await asyncio.gather(*(client.answer(image) for image in images))

    answers = asyncio.run(run())
    answered = [(30 + i, a.raw) for i, a in enumerate(answers) if a.status == "ok"]
    # two broken bodies in a row
    assert all("ProtocolError" in a.error for a in answers if a.status == "error")
    assert len(answered) >= 36
    stats = app.state.cloud.stats
    assert (stats.answered, stats.duplicates) == (len(answered), 0)
    assert (
        stats.received
        == sum(a.attempts for a in answers)
        == stats.answered + stats.faults
    )
    for width, raw in answered:
        assert np.allclose(raw.boxes, [[width / 4, 5, width * 3 / 4, 15]], atol=1e-3)


def test_weighted_boxes_fusion() -> None:
    first = (
        np.array([[0, 0, 10, 10], [50, 50, 60, 60]], np.float32),
        np.array([[0.8, 0.1], [0.0, 0.4]], np.float32),
    )
    second = (
        np.array([[0, 0, 10, 12]], np.float32),
        np.array([[0.4, 0.0]], np.float32),
    )
    boxes, scores = fuse_weighted_boxes([first, second])
    assert np.allclose(boxes, [[0, 0, 10, 10 + 2 / 3], [50, 50, 60, 60]])
    assert np.allclose(scores, [[0.6, 0.05], [0, 0.2]])
    nothing = np.zeros((0, 4), np.float32), np.zeros((0, 2), np.float32)
    assert [a.shape for a in fuse_weighted_boxes([nothing, nothing])] == [
        (0, 4),
        (0, 2),
    ]


def test_a_server_that_does_not_start_shows_its_log(tmp_path: Path) -> None:
    config = Cloud(serve="onnx", onnx_models=("absent.onnx",))
    with (
        pytest.raises(CloudUnreachable, match=r"absent\.onnx"),
        local_cloud(config, str(tmp_path)),
    ):
        pass


@needs_weights
def test_server_process(tmp_path: Path) -> None:
    config = Cloud(serve="demo", serve_latency=0.0, serve_faults=0.0)
    with local_cloud(config, str(tmp_path)) as url:
        assert httpx.get(f"{url}/health").json()["status"] == "ok"
        response = httpx.post(
            f"{url}/v1/detect",
            json=call(jpeg(size=(192, 192)), ("cat", "car")),
            timeout=30,
        )
        assert response.status_code == 200
        assert httpx.get(f"{url}/stats").json()["answered"] == 1
    assert json.loads((tmp_path / "stats.json").read_text())["answered"] == 1
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


HOLDER = """
import sys, time
from coin_ray.config import Cloud
from coin_ray.serving.launch import local_cloud
with local_cloud(Cloud(serve="demo"), sys.argv[1]) as url:
    print(url, flush=True)
    time.sleep(600)
"""


@needs_weights
def test_the_server_ends_with_a_killed_parent(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline().startswith("http://127.0.0.1:")
    (server,) = psutil.Process(holder.pid).children()
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    give_up_at = time.monotonic() + 15
    while server.is_running() and server.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < give_up_at, "the server outlived its parent"
        time.sleep(0.1)


CLIENT = """
import asyncio, io, sys
from PIL import Image
from coin_ray.cloud.accounts import governor_limits
from coin_ray.cloud.client import CloudClient
from coin_ray.cloud.journal.opening import open_journal
from coin_ray.cloud.governor import Governor, LocalGovernor
from coin_ray.config import Cloud
from coin_ray.data.canonical import canonical_image

async def main(url, folder):
    config = Cloud(url=url, in_flight=4, rate=1000.0)
    journal = open_journal(folder)
    client = CloudClient(config, ("dark", "bright"), url, journal, LocalGovernor(Governor(governor_limits(config), journal.spent())))
    async def one(i):
        sink = io.BytesIO()
        Image.new("RGB", (30 + i, 20), "white").save(sink, "JPEG")
        answer = await client.answer(canonical_image(sink.getvalue(), 4096))
        print(answer.status, flush=True)
    await asyncio.gather(*(one(i) for i in range(60)))
    print("spent", journal.spent()[0], flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A server in a thread; yields its URL and logs its calls to ``calls.jsonl``."""
    app = create_app(Brightness(), latency=0.02, call_log=str(tmp_path / "calls.jsonl"))
    config = uvicorn.Config(app, port=0, log_level="error")
    socket, running = config.bind_socket(), uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [socket]})
    thread.start()
    yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    running.should_exit = True
    thread.join()


def test_a_killed_client_pays_again_only_for_calls_under_way(
    server: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", CLIENT, server, str(tmp_path / "journal")]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    for _ in range(20):
        assert first.stdout.readline() == "ok\n"
    first.kill()
    first.wait()
    first.stdout.close()
    before = len((tmp_path / "calls.jsonl").read_text().splitlines())
    second = subprocess.run(
        command, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    calls = (tmp_path / "calls.jsonl").read_text().splitlines()
    assert second.count("ok") + second.count("cached") == 60
    assert second.count("cached") >= 20
    assert 20 <= before < 60
    assert 60 <= len(calls) <= 60 + 4
    assert len(calls) <= int(second[-1].split()[1]) <= len(calls) + 4
