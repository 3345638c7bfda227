from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image

from coin_ray.cloud.adapters.reference import ReferenceAdapter
from coin_ray.errors import InputError, Throttled
from coin_ray.predictors.scored_boxes import ScoredBoxes
from coin_ray.serving.batching import FAILURES_MAX, BatchQueue
from coin_ray.serving.detectors import BatchDetector
from coin_ray.serving.server import create_app
from tests.images import jpeg
from tests.serving.helpers import BrightnessDetector, client_of, detect_request

QueuedCall = tuple[int, tuple[str, ...], float]
"""Width of the image, classes and threshold."""
UNLUCKY_WIDTH = 13
CAT = ("cat",)


class RecordingDetector:
    """Answers with the image's width and records the batches; waits while ``gate`` is
    closed. Fails for images of an unlucky width."""

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
    ) -> ScoredBoxes:
        return self.detect_batch([image], classes, score_min)[0]

    def detect_batch(
        self, images: Sequence[Image.Image], classes: Sequence[str], score_min: float
    ) -> list[ScoredBoxes]:
        self.gate.wait(10)
        self.threads.add(threading.get_ident())
        widths = [image.width for image in images]
        self.batches.append(widths)
        if UNLUCKY_WIDTH in widths:
            raise RuntimeError("unlucky")
        scores = np.ones((1, len(classes)), np.float32)
        return [(np.array([[0, 0, width, 1]], np.float32), scores) for width in widths]


class SingleImageDetector(BrightnessDetector):
    """No ``BatchDetector``; counts how many images it works on at once."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.concurrent = 0
        self.concurrent_max = 0

    def detect(
        self, image: Image.Image, classes: Sequence[str], score_min: float
    ) -> ScoredBoxes:
        self.concurrent += 1
        self.concurrent_max = max(self.concurrent_max, self.concurrent)
        self.gate.wait(10)
        self.concurrent -= 1
        return super().detect(image, classes, score_min)


def _image(width: int) -> Image.Image:
    return Image.new("RGB", (width, 1))


def _detect_while_held(
    detector: RecordingDetector | SingleImageDetector, calls: Sequence[QueuedCall]
) -> list[Any]:
    """Queue all calls while the detector works on the first one; return their answers
    and errors."""

    async def run() -> list[Any]:
        queue = BatchQueue(detector, 0.0)
        detector.gate.clear()
        tasks = []
        for width, classes, score_min in calls:
            answer = queue.detect(_image(width), classes, score_min)
            tasks.append(asyncio.create_task(answer))
            if len(tasks) == 1:
                await asyncio.sleep(0.05)
        await asyncio.sleep(0.05)
        detector.gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    return asyncio.run(run())


def test_waiting_images_are_batched_by_classes_and_threshold() -> None:
    detector = RecordingDetector()
    dog = ("dog", "cat")
    calls = [
        (1, CAT, 0.1),
        (2, CAT, 0.1),
        (3, dog, 0.1),
        (4, CAT, 0.1),
        (5, CAT, 0.2),
        (6, CAT, 0.1),
        (7, CAT, 0.1),
        (8, CAT, 0.1),
    ]
    answers = _detect_while_held(detector, calls)
    assert detector.batches == [[1], [2, 4, 6, 7], [3], [5], [8]]
    widths = [float(boxes[0, 2]) for boxes, _ in answers]
    assert widths == [width for width, _, _ in calls]
    columns = [scores.shape[1] for _, scores in answers]
    assert columns == [len(classes) for _, classes, _ in calls]
    assert threading.get_ident() not in detector.threads


def test_an_image_that_fails_does_not_fail_those_of_its_batch() -> None:
    detector = RecordingDetector()
    calls = [(width, CAT, 0.1) for width in (1, 2, UNLUCKY_WIDTH, 3)]
    answers = _detect_while_held(detector, calls)
    failed = [isinstance(answer, RuntimeError) for answer in answers]
    assert failed == [False, False, True, False]
    assert detector.batches == [[1], [2, 13, 3], [2], [13], [3]]


def test_a_single_image_does_not_wait_for_others() -> None:
    async def run() -> float:
        queue = BatchQueue(RecordingDetector(), batch_wait=5.0)
        started = time.monotonic()
        await queue.detect(_image(1), CAT, 0.1)
        return time.monotonic() - started

    assert asyncio.run(run()) < 2.5


def test_a_partial_batch_waits_for_more_but_not_longer_than_batch_wait() -> None:
    detector = RecordingDetector()

    async def run() -> float:
        queue = BatchQueue(detector, batch_wait=0.3)
        started = time.monotonic()
        answers = [queue.detect(_image(width), CAT, 0.1) for width in (1, 2)]
        tasks = [asyncio.create_task(answer) for answer in answers]
        await asyncio.sleep(0.05)
        await asyncio.gather(*tasks, queue.detect(_image(3), CAT, 0.1))
        return time.monotonic() - started

    assert asyncio.run(run()) >= 0.29
    assert detector.batches == [[1, 2, 3]]


def test_a_detector_without_batches_gets_one_image_at_a_time() -> None:
    detector = SingleImageDetector()
    assert not isinstance(detector, BatchDetector)
    calls = [(width, ("dark",), 0.0) for width in (4, 8, 12)]
    answers = _detect_while_held(detector, calls)
    assert [float(boxes[0, 2]) for boxes, _ in answers] == [3, 6, 9]
    assert detector.concurrent_max == 1


def test_a_cancelled_call_leaves_the_queue() -> None:
    detector = RecordingDetector()

    async def run() -> None:
        queue = BatchQueue(detector, 0.0)
        detector.gate.clear()
        first = asyncio.create_task(queue.detect(_image(1), CAT, 0.1))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(queue.detect(_image(2), CAT, 0.1))
        await asyncio.sleep(0.01)
        second.cancel()
        await asyncio.sleep(0.01)
        detector.gate.set()
        await first
        await queue.detect(_image(3), CAT, 0.1)

    asyncio.run(run())
    assert detector.batches == [[1], [3]]


def test_a_full_queue_refuses_with_retry_after_and_health_has_its_length() -> None:
    detector = RecordingDetector(batch_max=1)
    app = create_app(detector, queue_max=2)
    service = app.state.service

    async def run() -> tuple[list[httpx.Response], httpx.Response, httpx.Response]:
        async with client_of(app) as client:
            detector.gate.clear()
            tasks = []
            for width in (20, 21, 22):
                body = detect_request(jpeg(size=(width, 20)), CAT)
                call = client.post("/v1/detect", json=body)
                tasks.append(asyncio.create_task(call))
                while not (
                    service.queue.in_detector
                    and service.waiting + service.queue.in_detector == len(tasks)
                ):
                    await asyncio.sleep(0.01)
            health = await client.get("/health")
            body = detect_request(jpeg(), CAT)
            refused = await client.post("/v1/detect", json=body)
            detector.gate.set()
            return await asyncio.gather(*tasks), health, refused

    answered, health, refused = asyncio.run(run())
    widths = [response.json()["image"]["w"] for response in answered]
    assert widths == [20, 21, 22]
    fields = health.json()
    assert (fields["status"], fields["model"]) == ("ok", "recorder")
    assert fields["ready"]
    assert (fields["queue"], fields["queue_max"]) == (2, 2)
    assert refused.status_code == 503
    error = ReferenceAdapter().classify_error(503, refused.headers, refused.content)
    assert isinstance(error, Throttled)
    assert error.retry_after is not None
    assert 1 <= error.retry_after <= 30
    stats = service.stats
    assert (stats.received, stats.answered, stats.busy) == (4, 3, 1)
    assert service.waiting == 0


def _post_and_read_health(
    app: FastAPI, *bodies: Any
) -> tuple[list[httpx.Response], dict[str, Any]]:
    async def run() -> tuple[list[httpx.Response], dict[str, Any]]:
        async with client_of(app) as client:
            responses = [await client.post("/v1/detect", json=body) for body in bodies]
            return responses, (await client.get("/health")).json()

    return asyncio.run(run())


def test_classes_that_a_detector_refuses_are_a_400_with_its_reason() -> None:
    (refused, answered), _ = _post_and_read_health(
        create_app(RecordingDetector()),
        detect_request(classes=("zebra",)),
        detect_request(classes=CAT),
    )
    assert (refused.status_code, answered.status_code) == (400, 200)
    assert refused.json()["detail"] == "ask about cat"


@pytest.mark.parametrize("failures", [FAILURES_MAX - 1, FAILURES_MAX])
def test_a_detector_that_fails_repeatedly_is_not_ready_until_it_answers(
    failures: int,
) -> None:
    app = create_app(RecordingDetector())
    unlucky = detect_request(jpeg(size=(UNLUCKY_WIDTH, 20)), CAT)
    responses, health = _post_and_read_health(app, *[unlucky] * failures)
    assert {response.status_code for response in responses} == {500}
    assert responses[0].json()["title"] == "the detector failed"
    assert health["ready"] == (failures < FAILURES_MAX)
    _, health = _post_and_read_health(app, detect_request(classes=CAT))
    assert health["ready"]
