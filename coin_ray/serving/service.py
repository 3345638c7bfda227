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
from dataclasses import dataclass
from typing import TextIO

from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from coin_ray.data.canonical import PIXELS_MAX, decode_rgb
from coin_ray.data.pixels import IntensityRange
from coin_ray.errors import InputError
from coin_ray.serving.admission import (
    BODY_BYTES_MAX,
    IMAGE_PIXELS_MAX,
    CapacityLimiter,
    RequestBody,
)
from coin_ray.serving.batching import BATCH_WAIT, BatchQueue
from coin_ray.serving.detectors import (
    BatchDetector,
    ServedDetector,
    intensity_range_of,
)
from coin_ray.serving.fault_injection import (
    CallStatistics,
    Fault,
    FaultInjection,
    RecentKeyCounts,
    TokenBucket,
)
from coin_ray.serving.metrics import ServerMetrics
from coin_ray.serving.teacher_proxy import TeacherProxy, TeacherUnavailable
from coin_ray.serving.wire import (
    DetectResponseJson,
    HttpProblem,
    ParsedRequest,
    detections_as_json,
    image_id_of_request,
    parse_request,
    unusable_image,
)

QUEUE_MAX = 256
RETRY_AFTER_MAX = 30
DECODERS = 2
"""Images decoded at once: decoding takes several times the memory of the pixels."""
REJECTED = (400, 408, 413, 415, 422)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServiceLimits:
    """``queue_max``: calls that may wait for the detector before 503; ``batch_wait``:
    seconds that a partial batch waits for more; ``pixels_max``: of an image.
    """

    queue_max: int = QUEUE_MAX
    batch_wait: float = BATCH_WAIT
    pixels_max: int = PIXELS_MAX


class DetectionService:
    """The server's state and its answers. ``call_log``: a file that gets one JSON line
    per received call; empty: none. ``token``: what callers must send; None: nothing.
    """

    def __init__(
        self,
        detector: ServedDetector,
        injection: FaultInjection,
        limits: ServiceLimits,
        token: str | None,
        call_log: str,
        teacher_proxy: TeacherProxy | None,
    ) -> None:
        self.stats = CallStatistics()
        self.queue = BatchQueue(detector, limits.batch_wait)
        self.metrics = ServerMetrics(
            lambda: self.waiting, limits.queue_max, lambda: float(self.queue.healthy)
        )
        self.queue.on_batch = self.metrics.record_batch
        self.metrics.set_model(detector.name)
        self.teacher_proxy = teacher_proxy
        self._limits = limits
        self._open_calls = 0
        self._body_bytes = CapacityLimiter("bytes of requests", BODY_BYTES_MAX)
        self._image_pixels = CapacityLimiter("pixels of images", IMAGE_PIXELS_MAX)
        self._decoders = ThreadPoolExecutor(DECODERS)
        self._injection, self._token = injection, token
        self._rate_limit = TokenBucket(injection.rate)
        self._attempts, self._answers = RecentKeyCounts(), RecentKeyCounts()
        self._call_log: TextIO | None = None
        if call_log:
            self._call_log = open(call_log, "a", buffering=1)  # noqa: SIM115

    @property
    def waiting(self) -> int:
        """Admitted calls whose image the detector is not working on."""
        return self._open_calls - self.queue.in_detector

    def swap(self, detector: ServedDetector) -> None:
        """Answer with ``detector`` from now on; calls admitted earlier are answered by
        the previous one.
        """
        self.queue.replace(detector)
        self.metrics.set_model(detector.name)
        self.metrics.model_swaps.inc()

    def health(self) -> dict[str, object]:
        """Return the fields of ``wire.Health``."""
        detector, proxy = self.queue.detector, self.teacher_proxy
        return {
            "status": "ok",
            "live": True,
            "ready": self.queue.healthy,
            "model": detector.name,
            "classes": list(detector.classes),
            "queue": self.waiting,
            "queue_max": self._limits.queue_max,
            "cloud": proxy.name if proxy is not None else None,
        }

    def check_token(self, request: Request) -> None:
        """Raise ``HttpProblem`` 401 if the token is wrong."""
        if self._token is None:
            return
        header = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(header, f"Bearer {self._token}".encode()):
            raise HttpProblem(401, "wrong or missing token")

    async def detect(self, request: Request) -> Response:
        """Return the answer, or the problem, of one call."""
        self.stats.received += 1
        try:
            async with self._admit(request) as parsed:
                return await self._answer(parsed)
        except HttpProblem as problem:
            self.stats.unauthorized += problem.status == 401
            self.stats.rejected += problem.status in REJECTED
            return problem.response

    async def ask_cloud(self, request: Request) -> Response:
        """Return what the configured cloud detects in the image, for the classes it is
        configured for.
        """
        if self.teacher_proxy is None:
            raise HttpProblem(
                404,
                "no cloud is configured",
                "start the server with cloud=ROOT/config.yaml",
            )
        _check_same_site(request)
        async with self._admit(request) as parsed:
            try:
                answer = await self.teacher_proxy.ask(
                    parsed.image_bytes, parsed.threshold
                )
            except InputError as error:
                raise unusable_image(error) from None
            except TeacherUnavailable as error:
                raise HttpProblem(
                    503,
                    "the cloud did not answer",
                    str(error),
                    Retry_After=str(RETRY_AFTER_MAX),
                ) from None
            return JSONResponse(answer)

    @asynccontextmanager
    async def _admit(self, request: Request) -> AsyncIterator[ParsedRequest]:
        """Check, read and parse one call; its body counts until the end of the block."""
        body = RequestBody(request, self._body_bytes)
        key = request.headers.get("idempotency-key", "")
        try:
            self.check_token(request)
            with self._count_open_call():
                body_bytes = await body.read()
                self._log_call(key, body_bytes)
                yield await asyncio.get_running_loop().run_in_executor(
                    self._decoders,
                    parse_request,
                    body_bytes,
                    key,
                    self._limits.pixels_max,
                )
        except HttpProblem:
            if not body.complete:
                self._log_call(key, b"")
                body.release()
                await body.drain()
            raise
        finally:
            body.release()

    def _log_call(self, key: str, body: bytes) -> None:
        """Write one line for a received call, before it is answered."""
        if self._call_log is None:
            return
        image_id = image_id_of_request(body)
        record = {"time": time.time(), "key": key, "image": image_id}
        self._call_log.write(json.dumps(record) + "\n")

    @contextmanager
    def _count_open_call(self) -> Iterator[None]:
        """Count one call more, from before its body is read until it is answered.
        Raises ``HttpProblem`` 503 beyond ``queue_max`` waiting ones.
        """
        if self.waiting >= self._limits.queue_max:
            self.stats.busy += 1
            seconds = math.ceil(self.waiting * self.queue.seconds_per_image)
            retry_after = min(max(seconds, 1), RETRY_AFTER_MAX)
            title = "too many calls are waiting"
            raise HttpProblem(503, title, Retry_After=str(retry_after))
        self._open_calls += 1
        try:
            yield
        finally:
            self._open_calls -= 1

    async def _answer(self, parsed: ParsedRequest) -> Response:
        detector = self.queue.detector
        _check_classes(detector, parsed.classes)
        wait = self._rate_limit.take()
        if wait > 0:
            self.stats.throttled += 1
            raise HttpProblem(429, "too many calls", Retry_After=str(math.ceil(wait)))
        fault = self._draw_fault(parsed.image_id)
        await asyncio.sleep(self._injection.latency)
        if fault in ("500", "503"):
            self.stats.faults += 1
            raise HttpProblem(int(fault), "emulated fault")
        width, height = parsed.size
        with self._image_pixels.acquire(width * height):
            answer = await self._detect(parsed, detector)
        self.stats.billed += 1
        if fault == "truncated":
            self.stats.faults += 1
            serialised = json.dumps(answer).encode()
            first_half = serialised[: len(serialised) // 2]
            return Response(first_half, media_type="application/json")
        self.stats.answered += 1
        times_answered = self._answers.increment(f"{parsed.image_id} {parsed.key}")
        self.stats.duplicates += times_answered > 1
        return JSONResponse(answer)

    def _draw_fault(self, image_id: str) -> Fault | None:
        if not self._injection.faults:
            return None
        return self._injection.draw_fault(image_id, self._attempts.increment(image_id))

    async def _detect(
        self, parsed: ParsedRequest, detector: ServedDetector
    ) -> DetectResponseJson:
        started = time.perf_counter()
        image = await asyncio.get_running_loop().run_in_executor(
            self._decoders, _decode, parsed.image_bytes, intensity_range_of(detector)
        )
        try:
            boxes, scores = await self.queue.detect(
                image, parsed.classes, parsed.threshold, detector
            )
        except Exception as error:
            logger.exception("the detector failed")
            reason = type(error).__name__
            raise HttpProblem(500, "the detector failed", reason) from None
        milliseconds = (time.perf_counter() - started) * 1000
        return {
            "model": detector.name,
            "image": {"w": image.width, "h": image.height},
            "detections": detections_as_json(boxes, scores, parsed.classes),
            "usage": {"ms": round(milliseconds, 1)},
        }


def _check_same_site(request: Request) -> None:
    """Raise ``HttpProblem`` 403 for a browser on another site's page."""
    site = request.headers.get("sec-fetch-site", "same-origin")
    if site not in ("same-origin", "none"):
        raise HttpProblem(
            403,
            "calls to the cloud cost money",
            "another site's page may not make them",
        )


def _decode(image_bytes: bytes, intensity_range: IntensityRange | None) -> Image.Image:
    try:
        return decode_rgb(image_bytes, intensity_range)
    except InputError as error:
        raise unusable_image(error) from None


def _check_classes(detector: ServedDetector, classes: Sequence[str]) -> None:
    """Raise ``HttpProblem`` 400 or 422 for classes that the detector can't detect."""
    if isinstance(detector, BatchDetector):
        try:
            detector.check(classes)
        except InputError as error:
            title = "the model can't be asked about these classes"
            raise HttpProblem(400, title, str(error)) from None
        return
    unknown = [name for name in classes if name not in detector.classes]
    if unknown:
        raise HttpProblem(
            422,
            "unknown classes",
            f"{', '.join(unknown)}; known are {', '.join(detector.classes)}",
        )
