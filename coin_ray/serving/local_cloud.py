"""A detection API on this machine, in the reference wire format, with the manners and the faults of a real one.

``python -m coin_ray.serving.local_cloud --serve demo --port 8080`` serves the demo's detector, ``--serve onnx --models
a.onnx b.onnx`` fused ONNX detectors, ``--serve transformers --models NAME`` Grounding DINO or OWLv2, ``--serve checkpoint
--models FOLDER`` an exported student, or a Co-DETR's file. Faults are drawn from (seed, image, how often it was asked), so a run repeats exactly.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import logging
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any, Literal, NoReturn, TextIO, get_args

import numpy as np
import psutil
import torch
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from coin_ray import storage
from coin_ray.data.canonical import decode_rgb
from coin_ray.demo import detector as demo_detector
from coin_ray.demo.drawings import CLASSES
from coin_ray.errors import ConfigError, InputError
from coin_ray.serving.batching import BATCH_WAIT, BatchDetector, BatchQueue
from coin_ray.serving.launch import EMULATED
from coin_ray.serving.onnx_detectors import Detector, Floats, load_detector
from coin_ray.serving.student import load_student

Serve = Literal["demo", "onnx", "transformers", "checkpoint"]
Fault = Literal["500", "503", "truncated"]
FAULTS: tuple[Fault, ...] = ("500", "503", "truncated")
BODY_MAX = 64 * 2**20
QUEUE_MAX = 256
RETRY_AFTER_MAX = 30

logger = logging.getLogger(__name__)


@dataclass
class Stats:
    """Calls since the start. ``billed``: a detection was made; ``duplicates``: it had been answered for the same image and key before;
    ``busy``: refused because the queue was full.
    """

    received: int = 0
    answered: int = 0
    billed: int = 0
    throttled: int = 0
    faults: int = 0
    rejected: int = 0
    unauthorized: int = 0
    duplicates: int = 0
    busy: int = 0


@dataclass(frozen=True)
class _Question:
    """One parsed call."""

    image: Image.Image
    image_id: str
    classes: tuple[str, ...]
    threshold: float
    key: str


class _Problem(Exception):
    """An answer in ``application/problem+json``."""

    def __init__(self, status: int, title: str, detail: str = "", **headers: str) -> None:
        super().__init__(title)
        content = {"status": status, "title": title, "detail": detail}
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        self.response = JSONResponse(content, status, names, media_type="application/problem+json")


class DemoDetector:
    """The demo's stand-in for a cloud."""

    name = "demo"
    classes: Sequence[str] = CLASSES

    def __init__(self) -> None:
        self._model = demo_detector.load()

    def detect(self, image: Image.Image, classes: Sequence[str], score_min: float) -> tuple[Floats, Floats]:
        """Boxes [N, 4] xyxy pixels and scores [N, len(classes)], best first."""
        boxes, scores = demo_detector.detect(self._model, image, score_min)
        scores = scores[:, [CLASSES.index(name) for name in classes]]
        kept = scores.amax(1) >= score_min
        return boxes[kept].numpy(), scores[kept].numpy()


class LocalCloud:
    """The service's state and its three routes."""

    def __init__(
        self,
        detector: Detector,
        latency: float,
        rate: float,
        faults: float,
        token: str | None,
        seed: int,
        call_log: str,
        queue_max: int,
        batch_wait: float,
    ) -> None:
        self.stats = Stats()
        self.queue = BatchQueue(detector, batch_wait)
        self._detector, self._queue_max = detector, queue_max
        self._open = 0
        self._latency, self._faults, self._seed, self._token = latency, faults, seed, token
        self._bucket = _Bucket(rate)
        self._asked: Counter[str] = Counter()
        self._answered: set[tuple[str, str]] = set()
        self._log: TextIO | None = open(call_log, "a", buffering=1) if call_log else None  # noqa: SIM115

    async def health(self, request: Request) -> Response:
        if not self._authorized(request):
            return _Problem(401, "wrong or missing token").response
        content = {"status": "ok", "ready": self.queue.healthy, "model": self._detector.name, "classes": list(self._detector.classes)}
        return JSONResponse({**content, "queue": self.waiting, "queue_max": self._queue_max})

    @property
    def waiting(self) -> int:
        """Calls taken on that the detector does not have yet."""
        return self._open - self.queue.under_way

    async def statistics(self, _: Request) -> Response:
        return JSONResponse(asdict(self.stats))

    async def detect(self, request: Request) -> Response:
        self.stats.received += 1
        body = await request.body()
        self._note(request, body)
        try:
            if not self._authorized(request):
                self.stats.unauthorized += 1
                raise _Problem(401, "wrong or missing token")
            with self._admitted():
                return await self._answer(await asyncio.to_thread(_parse, body, request.headers.get("idempotency-key", "")))
        except _Problem as problem:
            self.stats.rejected += problem.response.status_code in (400, 413, 415, 422)
            return problem.response

    def _authorized(self, request: Request) -> bool:
        given = request.headers.get("authorization", "")
        return self._token is None or hmac.compare_digest(given.encode(), f"Bearer {self._token}".encode())

    def _note(self, request: Request, body: bytes) -> None:
        """One line per received call, written before anything else happens to it."""
        if self._log is not None:
            call = {"time": time.time(), "key": request.headers.get("idempotency-key", ""), "image": _sent_image_id(body)}
            self._log.write(json.dumps(call) + "\n")

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        """One call more, from before its image is decoded until it is answered. Beyond ``queue_max`` waiting ones: 503."""
        if self.waiting >= self._queue_max:
            self.stats.busy += 1
            seconds = math.ceil(self.waiting * self.queue.seconds_each)
            raise _Problem(503, "too many calls are waiting", Retry_After=str(min(max(seconds, 1), RETRY_AFTER_MAX)))
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1

    def _check_classes(self, classes: Sequence[str]) -> None:
        if isinstance(self._detector, BatchDetector):
            try:
                self._detector.check(classes)
            except InputError as error:
                raise _Problem(400, "the model can't be asked about these classes", str(error)) from None
            return
        unknown = [name for name in classes if name not in self._detector.classes]
        if unknown:
            raise _Problem(422, "unknown classes", f"{', '.join(unknown)}; known are {', '.join(self._detector.classes)}")

    async def _answer(self, question: _Question) -> Response:
        self._check_classes(question.classes)
        wait = self._bucket.wait()
        if wait > 0:
            self.stats.throttled += 1
            raise _Problem(429, "too many calls", Retry_After=str(math.ceil(wait)))
        fault = self._fault(question.image_id)
        await asyncio.sleep(self._latency)
        if fault in ("500", "503"):
            self.stats.faults += 1
            raise _Problem(int(fault), "emulated fault")
        return await self._detections(question, truncated=fault == "truncated")

    async def _detections(self, question: _Question, *, truncated: bool) -> Response:
        started = time.perf_counter()
        try:
            boxes, scores = await self.queue.detect(question.image, question.classes, question.threshold)
        except Exception as error:
            logger.exception("the detector failed")
            raise _Problem(500, "the detector failed", type(error).__name__) from None
        content = {
            "model": self._detector.name,
            "image": {"w": question.image.width, "h": question.image.height},
            "detections": _elements(boxes, scores, question.classes),
            "usage": {"ms": round((time.perf_counter() - started) * 1000, 1)},
        }
        self.stats.billed += 1
        if truncated:
            self.stats.faults += 1
            whole = json.dumps(content).encode()
            return Response(whole[: len(whole) // 2], media_type="application/json")
        self.stats.answered += 1
        identity = (question.image_id, question.key)
        self.stats.duplicates += identity in self._answered
        self._answered.add(identity)
        return JSONResponse(content)

    def _fault(self, image_id: str) -> Fault | None:
        self._asked[image_id] += 1
        digest = hashlib.sha256(f"{self._seed}:{image_id}:{self._asked[image_id]}".encode()).digest()
        if int.from_bytes(digest[:8], "big") / 2**64 >= self._faults:
            return None
        return FAULTS[digest[8] % len(FAULTS)]


class _Bucket:
    """Calls per second, with a burst of a quarter second's worth."""

    def __init__(self, rate: float) -> None:
        self._interval = 1 / rate
        self._burst = max(1.0, rate / 4)
        self._next_arrival = 0.0

    def wait(self) -> float:
        """0 and the call is counted, or the seconds after which to come again."""
        now = time.monotonic()
        arrival = max(self._next_arrival, now)
        wait = arrival - now - (self._burst - 1) * self._interval
        if wait <= 1e-9:
            self._next_arrival = arrival + self._interval
        return max(0.0, wait - 1e-9)


def create_app(
    detector: Detector,
    *,
    latency: float = 0.0,
    rate: float = math.inf,
    faults: float = 0.0,
    token: str | None = None,
    seed: int = 0,
    call_log: str = "",
    queue_max: int = QUEUE_MAX,
    batch_wait: float = BATCH_WAIT,
) -> Starlette:
    """The service as an ASGI application; its ``state.cloud`` is the ``LocalCloud``.

    ``latency``: seconds before each answer; ``rate``: calls per second before 429; ``faults``: share of calls that fail;
    ``call_log``: file that gets one JSON line per received call; ``queue_max``: calls that may wait for the detector
    before 503; ``batch_wait``: seconds that several waiting calls, fewer than a batch, wait for others.
    """
    cloud = LocalCloud(detector, latency, rate, faults, token, seed, call_log, queue_max, batch_wait)
    routes = [
        Route("/v1/detect", cloud.detect, methods=["POST"]),
        Route("/health", cloud.health),
        Route("/stats", cloud.statistics),
    ]
    app = Starlette(routes=routes)
    app.state.cloud = cloud
    return app


def load(serve: Serve, models: Sequence[str]) -> Detector:
    """The detector to serve; ``models`` are ONNX files, or one name or folder. Raises ConfigError and InputError."""
    if serve == "demo":
        return DemoDetector()
    if serve == "onnx":
        return load_detector(models)
    if len(models) != 1:
        raise ConfigError(f"serve {serve} needs one model, a name or a folder; got {len(models)}")
    if serve == "checkpoint":
        return load_student(models[0])
    from coin_ray.serving.transformers_detectors import load_transformers

    return load_transformers(models[0])


def _parse(body: bytes, key: str) -> _Question:
    if len(body) > BODY_MAX:
        raise _Problem(413, "the request is too large")
    try:
        call = json.loads(body)
        encoded, classes, threshold = call["image"]["b64"], call["classes"], float(call.get("threshold", 0))
    except (ValueError, TypeError, KeyError, RecursionError, AttributeError):
        raise _Problem(400, "the request is not in the reference format") from None
    if not (isinstance(classes, list) and classes and all(isinstance(name, str) for name in classes)):
        raise _Problem(400, "classes must be a list of names")
    image, image_id = _decode_image(encoded)
    return _Question(image, image_id, tuple(classes), threshold, key)


def _decode_image(encoded: str) -> tuple[Image.Image, str]:
    try:
        data = base64.b64decode(encoded, validate=True)
        return decode_rgb(data), hashlib.sha256(data).hexdigest()
    except (binascii.Error, TypeError, ValueError, InputError) as error:
        raise _Problem(415, "not a usable image", str(error)) from None


def _sent_image_id(body: bytes) -> str:
    """sha256 of the image in a request, or an empty string."""
    try:
        return hashlib.sha256(base64.b64decode(json.loads(body)["image"]["b64"])).hexdigest()
    except (ValueError, TypeError, KeyError, RecursionError):
        return ""


def _elements(boxes: Floats, scores: Floats, classes: Sequence[str]) -> list[dict[str, Any]]:
    elements = []
    for box, row in zip(boxes, scores, strict=True):
        best = int(np.argmax(row))
        named = {name: round(float(score), 6) for name, score in zip(classes, row, strict=True)}
        element = {"box": [round(float(v), 3) for v in box], "label": classes[best], "score": named[classes[best]], "scores": named}
        elements.append(element)
    return elements


class _Watch:
    """Tells the outside where the server is, and ends it with its parent."""

    def __init__(self, server: uvicorn.Server, stats: Stats, arguments: argparse.Namespace) -> None:
        self._server = server
        self._stats = stats
        self._arguments = arguments
        self._parent = psutil.Process(arguments.parent_pid) if arguments.parent_pid else None

    async def run(self, url: str) -> None:
        while not self._server.started:
            await asyncio.sleep(0.02)
        if self._arguments.ready_file:
            storage.write_bytes(self._arguments.ready_file, url.encode())
        written = None
        while not self._server.should_exit:
            current = asdict(self._stats)
            if self._arguments.stats_file and current != written:
                storage.write_json(self._arguments.stats_file, current)
                written = current
            if self._parent is not None and _is_dead(self._parent):
                self._server.should_exit = True
            await asyncio.sleep(1)


def _is_dead(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def _serve(app: Starlette, arguments: argparse.Namespace) -> None:
    config = uvicorn.Config(
        app, host=arguments.host, port=arguments.port, log_level="warning", access_log=False, timeout_graceful_shutdown=2
    )
    socket = config.bind_socket()
    server = uvicorn.Server(config)
    stats = app.state.cloud.stats
    watch = asyncio.create_task(_Watch(server, stats, arguments).run(f"http://{arguments.host}:{socket.getsockname()[1]}"))
    signal.signal(signal.SIGTERM, _exit)
    try:
        await server.serve(sockets=[socket])
    finally:
        watch.cancel()
        if arguments.stats_file:
            storage.write_json(arguments.stats_file, asdict(stats))


def _exit(number: int, _: FrameType | None) -> NoReturn:
    """Where uvicorn hands a signal on after its orderly end; the default handler would skip the last statistics."""
    raise SystemExit(0 if number == signal.SIGTERM else 128 + number)


def _arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="coin_ray.serving.local_cloud", description=__doc__)
    parser.add_argument("--serve", choices=get_args(Serve), default="demo")
    parser.add_argument("--models", nargs="*", default=[], help="ONNX files, a model on the hub, or a folder")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument("--rate", type=float, default=math.inf, help="calls per second before 429")
    parser.add_argument("--faults", type=float, default=0.0, help="share of calls that fail")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--queue-max", type=int, default=QUEUE_MAX, help="calls that may wait for the detector before 503")
    parser.add_argument("--batch-wait", type=float, default=BATCH_WAIT, help="seconds that several waiting calls wait for a full batch")
    parser.add_argument("--token-env", help="name of the environment variable with the token to demand")
    parser.add_argument("--ready-file", help="gets the URL once the server listens")
    parser.add_argument("--stats-file", help="gets the statistics every second")
    parser.add_argument("--call-log", default="", help="gets one JSON line per received call")
    parser.add_argument("--parent-pid", type=int, help="exit when this process does")
    return parser.parse_args(words)


def main() -> None:
    arguments = _arguments()
    if arguments.serve in EMULATED:
        torch.set_num_threads(1)
    detector = load(arguments.serve, arguments.models)
    token = os.environ[arguments.token_env] if arguments.token_env else None
    app = create_app(
        detector,
        latency=arguments.latency,
        rate=arguments.rate,
        faults=arguments.faults,
        token=token,
        seed=arguments.seed,
        call_log=arguments.call_log,
        queue_max=arguments.queue_max,
        batch_wait=arguments.batch_wait,
    )
    asyncio.run(_serve(app, arguments))


if __name__ == "__main__":
    main()
