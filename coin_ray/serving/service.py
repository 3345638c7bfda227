"""A detector behind HTTP: the reference wire format, OpenAPI, health, metrics, and a
page to try it.

What a server holds at once is bounded (``admission``): a call is admitted before its
body is read, and read before its image is decoded.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TextIO

from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from coin_ray.data.canonical import decode_rgb
from coin_ray.errors import InputError
from coin_ray.predictors.onnx_detectors import Detector
from coin_ray.serving.admission import BYTES_OPEN, PIXELS_OPEN, Body, Room
from coin_ray.serving.batching import BatchDetector, BatchQueue
from coin_ray.serving.fault_injection import Bucket, Manners, Recent, Stats
from coin_ray.serving.metrics import Metrics
from coin_ray.serving.teacher_proxy import CloudBeside, NotAnswered
from coin_ray.serving.wire import (
    Problem,
    Question,
    elements,
    parse,
    sent_image_id,
)

RETRY_AFTER_MAX = 30
DECODERS = 2
"""Images decoded at once: decoding takes several times the memory of the pixels."""
logger = logging.getLogger(__name__)


class LocalCloud:
    """The service's state and its answers."""

    def __init__(
        self,
        detector: Detector,
        manners: Manners,
        token: str | None,
        call_log: str,
        queue_max: int,
        batch_wait: float,
        pixels_max: int,
        beside: CloudBeside | None,
    ) -> None:
        self.stats = Stats()
        self.queue = BatchQueue(detector, batch_wait)
        self.metrics = Metrics(
            lambda: self.waiting, queue_max, lambda: float(self.queue.healthy)
        )
        self.queue.on_batch = self.metrics.batch
        self.metrics.serves(detector.name)
        self.beside = beside
        self._queue_max, self._pixels_max = queue_max, pixels_max
        self._open = 0
        self._bytes, self._pixels = (
            Room("bytes of requests", BYTES_OPEN),
            Room("pixels of images", PIXELS_OPEN),
        )
        self._decoders = ThreadPoolExecutor(DECODERS)
        self._manners, self._token = manners, token
        self._bucket = Bucket(manners.rate)
        self._asked, self._answered = Recent(), Recent()
        self._log: TextIO | None = (
            open(call_log, "a", buffering=1) if call_log else None  # noqa: SIM115
        )

    @property
    def waiting(self) -> int:
        """Calls taken on that the detector does not have yet."""
        return self._open - self.queue.under_way

    def swap(self, detector: Detector) -> None:
        """``detector`` answers from now on; calls taken on before are answered by the
        one before.
        """
        self.queue.replace(detector)
        self.metrics.serves(detector.name)
        self.metrics.swaps.inc()

    def health(self) -> dict[str, Any]:
        content = {
            "status": "ok",
            "live": True,
            "ready": self.queue.healthy,
            "model": self.queue.detector.name,
        }
        content |= {
            "classes": list(self.queue.detector.classes),
            "queue": self.waiting,
            "queue_max": self._queue_max,
        }
        return {
            **content,
            "cloud": self.beside.name if self.beside is not None else None,
        }

    def check_token(self, request: Request) -> None:
        """Raises ``Problem`` 401."""
        given = request.headers.get("authorization", "")
        if self._token is not None and not hmac.compare_digest(
            given.encode(), f"Bearer {self._token}".encode()
        ):
            raise Problem(401, "wrong or missing token")

    async def detect(self, request: Request) -> Response:
        """The answer, or the problem, of one call."""
        self.stats.received += 1
        try:
            async with self._question(request) as question:
                return await self._answer(question)
        except Problem as problem:
            self.stats.unauthorized += problem.status == 401
            self.stats.rejected += problem.status in (400, 408, 413, 415, 422)
            return problem.response

    async def ask_cloud(self, request: Request) -> Response:
        """What the configured cloud says of the image, about the classes it is
        configured for.
        """
        if self.beside is None:
            raise Problem(
                404,
                "no cloud is configured",
                "start the server with cloud=ROOT/config.yaml",
            )
        if request.headers.get("sec-fetch-site", "same-origin") not in (
            "same-origin",
            "none",
        ):
            raise Problem(
                403,
                "calls to the cloud cost money",
                "another site's page may not make them",
            )
        async with self._question(request) as question:
            try:
                return JSONResponse(
                    await self.beside.ask(question.data, question.threshold)
                )
            except InputError as error:
                raise Problem(415, "not a usable image", str(error)) from None
            except NotAnswered as error:
                raise Problem(
                    503,
                    "the cloud did not answer",
                    str(error),
                    Retry_After=str(RETRY_AFTER_MAX),
                ) from None

    @asynccontextmanager
    async def _question(self, request: Request) -> AsyncIterator[Question]:
        """One call, admitted and parsed; its body counts until the end of the block."""
        body, key = (
            Body(request, self._bytes),
            request.headers.get("idempotency-key", ""),
        )
        try:
            self.check_token(request)
            with self._admitted():
                content = await body.read()
                self._note(key, content)
                yield await asyncio.get_running_loop().run_in_executor(
                    self._decoders, parse, content, key, self._pixels_max
                )
        except Problem:
            if not body.complete:
                self._note(key, b"")
                body.release()
                await body.drain()
            raise
        finally:
            body.release()

    def _note(self, key: str, body: bytes) -> None:
        """One line per received call, written before it is answered."""
        if self._log is not None:
            self._log.write(
                json.dumps(
                    {"time": time.time(), "key": key, "image": sent_image_id(body)}
                )
                + "\n"
            )

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        """One call more, from before its body is read until it is answered. Beyond
        ``queue_max`` waiting ones: 503.
        """
        if self.waiting >= self._queue_max:
            self.stats.busy += 1
            seconds = math.ceil(self.waiting * self.queue.seconds_each)
            raise Problem(
                503,
                "too many calls are waiting",
                Retry_After=str(min(max(seconds, 1), RETRY_AFTER_MAX)),
            )
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1

    async def _answer(self, question: Question) -> Response:
        detector = self.queue.detector
        _check_classes(detector, question.classes)
        wait = self._bucket.wait()
        if wait > 0:
            self.stats.throttled += 1
            raise Problem(429, "too many calls", Retry_After=str(math.ceil(wait)))
        fault = (
            self._manners.fault(question.image_id, self._asked.again(question.image_id))
            if self._manners.faults
            else None
        )
        await asyncio.sleep(self._manners.latency)
        if fault in ("500", "503"):
            self.stats.faults += 1
            raise Problem(int(fault), "emulated fault")
        with self._pixels.taken(question.size[0] * question.size[1]):
            content = await self._detections(question, detector)
        self.stats.billed += 1
        if fault == "truncated":
            self.stats.faults += 1
            whole = json.dumps(content).encode()
            return Response(whole[: len(whole) // 2], media_type="application/json")
        self.stats.answered += 1
        self.stats.duplicates += (
            self._answered.again(f"{question.image_id} {question.key}") > 1
        )
        return JSONResponse(content)

    async def _detections(
        self, question: Question, detector: Detector
    ) -> dict[str, Any]:
        started = time.perf_counter()
        image = await asyncio.get_running_loop().run_in_executor(
            self._decoders, _decoded, question.data
        )
        try:
            boxes, scores = await self.queue.detect(
                image, question.classes, question.threshold, detector
            )
        except Exception as error:
            logger.exception("the detector failed")
            raise Problem(500, "the detector failed", type(error).__name__) from None
        return {
            "model": detector.name,
            "image": {"w": image.width, "h": image.height},
            "detections": elements(boxes, scores, question.classes),
            "usage": {"ms": round((time.perf_counter() - started) * 1000, 1)},
        }


def _decoded(data: bytes) -> Image.Image:
    try:
        return decode_rgb(data)
    except InputError as error:
        raise Problem(415, "not a usable image", str(error)) from None


def _check_classes(detector: Detector, classes: Sequence[str]) -> None:
    if isinstance(detector, BatchDetector):
        try:
            detector.check(classes)
        except InputError as error:
            raise Problem(
                400, "the model can't be asked about these classes", str(error)
            ) from None
        return
    unknown = [name for name in classes if name not in detector.classes]
    if unknown:
        raise Problem(
            422,
            "unknown classes",
            f"{', '.join(unknown)}; known are {', '.join(detector.classes)}",
        )
