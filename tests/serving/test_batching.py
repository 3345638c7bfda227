from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from coin_ray.cloud.adapters.reference import ReferenceAdapter
from coin_ray.errors import InputError, Throttled
from coin_ray.serving.batching import FAILURES_MAX, BatchDetector, BatchQueue, Found
from coin_ray.serving.local_cloud import create_app
from tests.serving.test_local_cloud import Brightness, call, jpeg

Question = tuple[int, tuple[str, ...], float]


class Recorder:
    """Answers with the image's width and remembers the batches; ``gate`` holds it while
    it is closed."""

    name = "recorder"
    classes: Sequence[str] = ()

    def __init__(self, batch_max: int = 4) -> None:
        self.batch_max = batch_max
        self.batches: list[list[int]] = []
        self.threads: set[int] = set()
        self.gate = threading.Event()
        self.gate.set()

    def check(self, classes: Sequence[str]) -> None:
        if "zebra" in classes:
            raise InputError("ask about cat")

    def detect(
        self, image: Image.Image, classes: Sequence[str], score_min: float
    ) -> Found:
        return self.detect_batch([image], classes, score_min)[0]

    def detect_batch(
        self, images: Sequence[Image.Image], classes: Sequence[str], score_min: float
    ) -> list[Found]:
        self.gate.wait(10)
        self.threads.add(threading.get_ident())
        self.batches.append([image.width for image in images])
        if any(image.width == 13 for image in images):
            raise RuntimeError("unlucky")
        row = np.ones((1, len(classes)), np.float32)
        return [
            (np.array([[0, 0, image.width, 1]], np.float32), row) for image in images
        ]


def image(width: int) -> Image.Image:
    return Image.new("RGB", (width, 1))


def asked(
    detector: Any, questions: Sequence[Question], closed: bool = True
) -> list[Any]:
    """All at once; with ``closed`` the detector is held until all wait behind the first
    one."""

    async def run() -> list[Any]:
        queue = BatchQueue(detector, 0.0)
        if closed:
            detector.gate.clear()
        tasks = [
            asyncio.create_task(queue.detect(image(w), c, s))
            for w, c, s in questions[:1]
        ]
        await asyncio.sleep(0.05)
        tasks += [
            asyncio.create_task(queue.detect(image(w), c, s))
            for w, c, s in questions[1:]
        ]
        await asyncio.sleep(0.05)
        detector.gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    return asyncio.run(run())


def test_images_that_wait_are_batched_by_question_and_each_gets_its_own_answer() -> (
    None
):
    detector = Recorder()
    cat, dog = ("cat",), ("dog", "cat")
    questions = [
        (1, cat, 0.1),
        (2, cat, 0.1),
        (3, dog, 0.1),
        (4, cat, 0.1),
        (5, cat, 0.2),
        (6, cat, 0.1),
        (7, cat, 0.1),
        (8, cat, 0.1),
    ]
    results = asked(detector, questions)
    assert detector.batches == [[1], [2, 4, 6, 7], [3], [5], [8]]
    assert [float(boxes[0, 2]) for boxes, _ in results] == [w for w, _, _ in questions]
    assert [scores.shape[1] for _, scores in results] == [
        len(c) for _, c, _ in questions
    ]
    assert threading.get_ident() not in detector.threads


def test_an_image_that_fails_does_not_fail_those_of_its_batch() -> None:
    detector = Recorder()
    results = asked(detector, [(w, ("cat",), 0.1) for w in (1, 2, 13, 3)])
    assert [isinstance(r, RuntimeError) for r in results] == [False, False, True, False]
    assert detector.batches == [[1], [2, 13, 3], [2], [13], [3]]


def test_one_image_alone_does_not_wait_for_others() -> None:
    async def run() -> float:
        queue = BatchQueue(Recorder(), batch_wait=5.0)
        started = time.monotonic()
        await queue.detect(image(1), ("cat",), 0.1)
        return time.monotonic() - started

    assert asyncio.run(run()) < 2.5


def test_several_wait_for_a_full_batch_but_not_longer_than_told() -> None:
    detector = Recorder()

    async def run() -> float:
        queue = BatchQueue(detector, batch_wait=0.3)
        started = time.monotonic()
        first = [
            asyncio.create_task(queue.detect(image(w), ("cat",), 0.1)) for w in (1, 2)
        ]
        await asyncio.sleep(0.05)
        await asyncio.gather(*first, queue.detect(image(3), ("cat",), 0.1))
        return time.monotonic() - started

    assert asyncio.run(run()) >= 0.29
    assert detector.batches == [[1, 2, 3]]


class Slow(Brightness):
    """No ``BatchDetector``."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.together = 0
        self.most = 0

    def detect(
        self, image: Image.Image, classes: Sequence[str], score_min: float
    ) -> Found:
        self.together += 1
        self.most = max(self.most, self.together)
        self.gate.wait(10)
        self.together -= 1
        return super().detect(image, classes, score_min)


def test_a_detector_without_batches_gets_one_image_at_a_time() -> None:
    detector = Slow()
    assert not isinstance(detector, BatchDetector)
    results = asked(detector, [(w, ("dark",), 0.0) for w in (4, 8, 12)])
    assert [float(boxes[0, 2]) for boxes, _ in results] == [3, 6, 9]
    assert detector.most == 1


def test_a_call_that_is_given_up_leaves_the_queue() -> None:
    detector = Recorder()

    async def run() -> None:
        queue = BatchQueue(detector, 0.0)
        detector.gate.clear()
        first = asyncio.create_task(queue.detect(image(1), ("cat",), 0.1))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(queue.detect(image(2), ("cat",), 0.1))
        await asyncio.sleep(0.01)
        second.cancel()
        await asyncio.sleep(0.01)
        detector.gate.set()
        await first
        await queue.detect(image(3), ("cat",), 0.1)

    asyncio.run(run())
    assert detector.batches == [[1], [3]]


def test_a_full_queue_refuses_with_retry_after_and_health_tells_its_length() -> None:
    detector = Recorder(batch_max=1)
    app = create_app(detector, queue_max=2)

    async def run() -> tuple[list[httpx.Response], httpx.Response, httpx.Response]:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://local"
        ) as client:
            detector.gate.clear()
            tasks = []
            for width in (20, 21, 22):
                tasks.append(
                    asyncio.create_task(
                        client.post(
                            "/v1/detect", json=call(jpeg(size=(width, 20)), ("cat",))
                        )
                    )
                )
                while (
                    app.state.cloud.waiting + app.state.cloud.queue.under_way
                    < len(tasks)
                    or not app.state.cloud.queue.under_way
                ):
                    await asyncio.sleep(0.01)
            health = await client.get("/health")
            refused = await client.post("/v1/detect", json=call(jpeg(), ("cat",)))
            detector.gate.set()
            return await asyncio.gather(*tasks), health, refused

    answered, health, refused = asyncio.run(run())
    assert [r.json()["image"]["w"] for r in answered] == [20, 21, 22]
    content = health.json()
    assert (content["status"], content["ready"], content["model"]) == (
        "ok",
        True,
        "recorder",
    )
    assert (content["queue"], content["queue_max"]) == (2, 2)
    assert refused.status_code == 503
    error = ReferenceAdapter().classify_error(503, refused.headers, refused.content)
    assert isinstance(error, Throttled)
    assert error.retry_after is not None
    assert 1 <= error.retry_after <= 30
    stats = app.state.cloud.stats
    assert (stats.received, stats.answered, stats.busy, app.state.cloud.waiting) == (
        4,
        3,
        1,
        0,
    )


def exchange(app: Any, *calls: Any) -> tuple[list[httpx.Response], dict[str, Any]]:
    async def run() -> tuple[list[httpx.Response], dict[str, Any]]:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://local"
        ) as client:
            responses = [await client.post("/v1/detect", json=c) for c in calls]
            return responses, (await client.get("/health")).json()

    return asyncio.run(run())


def test_classes_that_a_detector_refuses_are_a_400_with_its_reason() -> None:
    (refused, answered), _ = exchange(
        create_app(Recorder()), call(classes=("zebra",)), call(classes=("cat",))
    )
    assert (refused.status_code, answered.status_code) == (400, 200)
    assert refused.json()["detail"] == "ask about cat"


@pytest.mark.parametrize("failures", [FAILURES_MAX - 1, FAILURES_MAX])
def test_a_detector_that_fails_again_and_again_is_not_ready_until_it_answers(
    failures: int,
) -> None:
    app = create_app(Recorder())
    bad = call(jpeg(size=(13, 20)), ("cat",))
    responses, health = exchange(app, *[bad] * failures)
    assert {r.status_code for r in responses} == {500}
    assert responses[0].json()["title"] == "the detector failed"
    assert health["ready"] == (failures < FAILURES_MAX)
    assert exchange(app, call(classes=("cat",)))[1]["ready"]
