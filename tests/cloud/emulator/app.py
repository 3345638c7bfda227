"""Local emulators of the clouds: one ASGI app that decodes the image it receives and
answers as the real services do.

An image of ``scene(...)`` contains its own ground truth: rectangles on a plain background
whose colour encodes class and object. Every service decodes the image that arrived, so a
mistake in encoding, scaling or rotation changes the response.

A provider is one file with one function, and one line in ``PROVIDERS``
(``__init__.py``)::

    def answer(call: Call) -> Reply:
        if call.headers.get("authorization") != f"Bearer {TOKEN}":
            return Reply(401, {"error": "bad key"})
        request_json = call.json()  # None if the body is not JSON
        try:
            scene = read_scene(base64.b64decode(request_json["inputs"]))
        except SceneError as error:
            return Reply(400, {"error": str(error)})
        return Reply(200, [{"label": object.name, ...} for object in scene.objects])

It is reached at ``emulator.url(name)`` through ``emulator.transport()``. ``call.path``
is the path below that address, ``call.state`` a dictionary for what the provider stores
between requests. A reply of status 200 is billed unless ``billed=False``.

Faults never travel with a request: ``emulator.script([...])`` queues a ``Step`` for
each of the next requests::

    emulator.script([Fault(429, {"retry-after": "2"}), Fault(500), None,
                     Fault(edit=lambda body: body[:-1]), Fault(delay=9)])

``None`` means no fault, as do all requests after the script's end. ``emulator.calls`` are
the requests so far, the scripted ones too; ``emulator.billed`` counts billed calls by
provider.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import io
import json
import math
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import formatdate
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl, quote

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

TOKEN = "emulated-token-0123456789"
AWS_KEY_ID = "AKIAEMULATED01234567"
AWS_SECRET = "emulated/secret+0123456789abcdefghijklmno"
AWS_SESSION = "emulated-session-token=="
"""A request may carry this session token, or none."""
HOST = "emulator.example.com"
CLOCK_SKEW_MAX = 300.0

SCENE_CLASSES = (
    "car",
    "bus",
    "dog",
    "person",
    "bicycle",
    "truck",
    "train",
    "motorcycle",
    "cat",
    "horse",
    "boat",
    "chair",
    "bottle",
    "traffic light",
    "airplane",
    "sheep",
)
"""Plain names of class index 0, 1, ... of a scene; a provider with other names translates
them."""
OBJECTS_MAX = 400
GAP_MIN = 8
"""Pixels of background around every rectangle that doesn't touch the image's border."""
SIDE_MIN = 20
BACKGROUND = 30
LEVEL_FIRST, LEVEL_STEP, LEVELS = 70, 8, 20
REACH = 4
"""Pixels on each side of an edge over which its exact position is measured."""
SHARP = 0.04


class SceneError(ValueError):
    """The bytes are not an image of ``scene``."""


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One rectangle. ``box``: xyxy pixels of the image received, exact to 0.1 pixels, after
    downscaling to 0.25.
    """

    class_index: int
    object_id: int
    box: tuple[float, float, float, float]

    @property
    def name(self) -> str:
        return SCENE_CLASSES[self.class_index]

    @property
    def score(self) -> float:
        return score_of(self.object_id)


@dataclass(frozen=True, slots=True)
class Scene:
    width: int
    height: int
    format: str
    objects: tuple[SceneObject, ...]

    def ratios(self, scene_object: SceneObject) -> tuple[float, float, float, float]:
        """Return an object's box as ratios of the image's sides."""
        x0, y0, x1, y1 = scene_object.box
        width, height = self.width, self.height
        return x0 / width, y0 / height, x1 / width, y1 / height


def score_of(object_id: int) -> float:
    """Return the score every provider gives object 0, 1, 2, ...: 0.99, 0.988, 0.986, ...
    down to 0.192.
    """
    return round(0.99 - 0.002 * object_id, 3)


def scene(
    classes: Sequence[int],
    boxes: Sequence[Sequence[int]],
    size: tuple[int, int],
    file_format: str = "PNG",
) -> bytes:
    """Return an image file of ``size`` (width, height) with one rectangle per object: class
    index and xyxy box in whole pixels each.

    Rectangles are at least 20 pixels wide and high and have 8 pixels of background
    around them, or touch the border; an image that will be made smaller needs as much
    after it. The object's number in the list is its id.
    """
    if len(classes) > OBJECTS_MAX or len(classes) != len(boxes):
        raise ValueError(
            f"{len(classes)} classes and {len(boxes)} boxes; at most {OBJECTS_MAX}"
            " objects"
        )
    pixels = np.full((size[1], size[0], 3), BACKGROUND, np.uint8)
    for number, (index, (x0, y0, x1, y1)) in enumerate(
        zip(classes, boxes, strict=True)
    ):
        too_thin = min(x1 - x0, y1 - y0) < SIDE_MIN
        if too_thin or min(x0, y0) < 0 or x1 > size[0] or y1 > size[1]:
            raise ValueError(
                f"box {number} is thinner than {SIDE_MIN} pixels or outside the image"
            )
        gap_columns = slice(max(0, x0 - GAP_MIN), x1 + GAP_MIN)
        gap_rows = slice(max(0, y0 - GAP_MIN), y1 + GAP_MIN)
        if (pixels[gap_rows, gap_columns] != BACKGROUND).any():
            raise ValueError(f"box {number} is closer than {GAP_MIN} pixels to another")
        pixels[y0:y1, x0:x1] = _colour(index, number)
    options = {"quality": 95, "subsampling": 0} if file_format == "JPEG" else {}
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, file_format, **options)
    return sink.getvalue()


@lru_cache(maxsize=128)
def read_scene(image_file: bytes) -> Scene:
    """Decode a scene's objects. Raises ``SceneError`` for damaged images, images with EXIF
    data and images that are not a scene.
    """
    try:
        with Image.open(io.BytesIO(image_file)) as image:
            image.load()
            if image.getexif():
                raise SceneError("the image has EXIF data")
            file_format = str(image.format)
            pixels = np.asarray(image.convert("RGB"), np.float64)
    except SceneError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        raise SceneError(f"bad image data ({type(error).__name__})") from None
    height, width = pixels.shape[:2]
    return Scene(width, height, file_format, tuple(_objects(pixels)))


def _colour(class_index: int, object_id: int) -> tuple[int, int, int]:
    return (
        LEVEL_FIRST + LEVEL_STEP * class_index,
        LEVEL_FIRST + LEVEL_STEP * (object_id // LEVELS),
        LEVEL_FIRST + LEVEL_STEP * (object_id % LEVELS),
    )


def _objects(pixels: NDArray[np.float64]) -> Iterator[SceneObject]:
    """Yield an object for each code that has a solid 5 x 5 core in the middle of its
    pixels.
    """
    steps = np.round((pixels - LEVEL_FIRST) / LEVEL_STEP).astype(np.int64)
    is_level = np.abs(pixels - LEVEL_FIRST - steps * LEVEL_STEP) <= 3
    is_code = (is_level & (steps >= 0) & (steps < LEVELS)).all(2)
    red, green, blue = steps[..., 0], steps[..., 1], steps[..., 2]
    codes = np.where(is_code, (red * LEVELS + green) * LEVELS + blue, -1)
    rows, columns = np.nonzero(codes >= 0)
    if len(rows) == 0:
        return
    pixel_codes = codes[rows, columns]
    order = np.argsort(pixel_codes, kind="stable")
    object_codes, starts = np.unique(pixel_codes[order], return_index=True)
    for code, members in zip(object_codes, np.split(order, starts[1:]), strict=True):
        y, x = int(np.median(rows[members])), int(np.median(columns[members]))
        core = codes[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3]
        if core.shape != (5, 5) or (core != code).any():
            continue
        class_index, object_id = divmod(int(code), LEVELS**2)
        if class_index >= len(SCENE_CLASSES):
            raise SceneError(f"no class has the colour of the object at {x}, {y}")
        yield SceneObject(class_index, object_id, _box(pixels, x, y))


def _box(
    pixels: NDArray[np.float64], x: int, y: int
) -> tuple[float, float, float, float]:
    """Measure the edges from the object's middle: first roughly, then over all rows and
    columns that cross the object.
    """
    rough_x0, rough_x1 = _edges(pixels[y - 1 : y + 2].mean(0), x)
    rough_y0, rough_y1 = _edges(pixels[:, x - 1 : x + 2].mean(1), y)
    inner_rows = slice(
        min(round(rough_y0) + REACH, y - 1), max(round(rough_y1) - REACH, y + 2)
    )
    inner_columns = slice(
        min(round(rough_x0) + REACH, x - 1), max(round(rough_x1) - REACH, x + 2)
    )
    x0, x1 = _edges(pixels[inner_rows].mean(0), x)
    y0, y1 = _edges(pixels[:, inner_columns].mean(1), y)
    return x0, y0, x1, y1


def _edges(line: NDArray[np.float64], middle: int) -> tuple[float, float]:
    """Return where the object around ``middle`` begins and ends on a line [N, 3], from the
    share of each pixel that it covers.
    """
    contrast = line[middle] - BACKGROUND
    cover = (line - BACKGROUND) @ contrast / (contrast @ contrast)
    after = _end(cover[middle:])
    before = _end(cover[middle - 1 :: -1]) if middle else 0.0
    return middle - before, middle + after


def _end(cover: NDArray[np.float64]) -> float:
    """Return the length of the covered part at the start of ``cover``; a sharp edge lies
    between two pixels.
    """
    uncovered = np.nonzero(cover < 0.5)[0]
    if len(uncovered) == 0:
        return float(len(cover))
    end = int(uncovered[0])
    if cover[end - 1] > 1 - SHARP and cover[end] < SHARP:
        return float(end)
    first = max(0, end - REACH)
    return first + float(cover[first : end + REACH].sum())


@dataclass(frozen=True, slots=True)
class Call:
    """A request as it arrived. ``path`` is below the provider's address, ``raw_path`` the
    whole path, still quoted.
    """

    provider: str
    method: str
    path: str
    raw_path: str
    query: str
    headers: Mapping[str, str]
    body: bytes = field(repr=False)
    state: dict[str, Any] = field(repr=False)
    received: float

    def json(self) -> Any:
        """Return the body's JSON value, None for anything else."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    @property
    def params(self) -> dict[str, str]:
        return dict(parse_qsl(self.query, keep_blank_values=True))

    @property
    def media_type(self) -> str:
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply to send. ``payload``: bytes, or a value for JSON. ``billed``: None means
    that it is if the status is 200.
    """

    status: int
    payload: Any = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    content_type: str = "application/json"
    billed: bool | None = None

    @property
    def body(self) -> bytes:
        if isinstance(self.payload, bytes):
            return self.payload
        return json.dumps(self.payload).encode()


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault of one request. With a ``status`` the provider never receives the request
    and ``body`` (bytes, or a value for JSON) is the reply; without one the provider's reply
    is sent after ``delay`` seconds, with ``headers`` added and its body changed by ``edit``.
    """

    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Any = b""
    delay: float = 0.0
    edit: Callable[[bytes], bytes] | None = None


Step = Fault | None
Provider = Callable[[Call], Reply]


class Emulator:
    """The app. ``sleep`` and ``clock`` (seconds since 1970) may be a test's own."""

    def __init__(
        self,
        providers: Mapping[str, Provider],
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.calls: list[Call] = []
        self.billed: Counter[str] = Counter()
        self._providers, self._sleep, self._clock = providers, sleep, clock
        self._script: deque[Step] = deque()
        self._states: dict[str, dict[str, Any]] = {name: {} for name in providers}
        methods = ["GET", "POST", "PUT", "DELETE"]
        route = Route("/{provider}{path:path}", self._respond, methods=methods)
        self._app = Starlette(routes=[route])

    def url(self, provider: str) -> str:
        return f"https://{HOST}/{provider}"

    def transport(self) -> httpx.ASGITransport:
        return httpx.ASGITransport(self._app)

    def script(self, steps: Iterable[Step]) -> None:
        """Queue faults for the next requests, one step each."""
        self._script.extend(steps)

    def state(self, provider: str) -> dict[str, Any]:
        """Return what a provider stores between requests; tests may change it."""
        return self._states[provider]

    async def _respond(self, request: Request) -> Response:
        name = request.path_params["provider"]
        if name not in self._providers:
            return Response(f"the emulator has no provider {name!r}", 404)
        scope = request.scope
        call = Call(
            name,
            request.method,
            request.path_params["path"],
            scope["raw_path"].decode().partition("?")[0],
            scope["query_string"].decode(),
            dict(request.headers),
            await request.body(),
            self._states[name],
            self._clock(),
        )
        self.calls.append(call)
        fault = self._script.popleft() if self._script else None
        reply = await self._reply(call, fault)
        return Response(
            reply.body,
            reply.status,
            {"date": formatdate(call.received, usegmt=True), **reply.headers},
            reply.content_type,
        )

    async def _reply(self, call: Call, fault: Step) -> Reply:
        if fault is not None and fault.delay:
            await self._sleep(fault.delay)
        if fault is not None and fault.status is not None:
            return Reply(fault.status, fault.body, fault.headers)
        reply = self._providers[call.provider](call)
        billed = reply.status == 200 if reply.billed is None else reply.billed
        self.billed[call.provider] += billed
        if fault is None:
            return reply
        body = fault.edit(reply.body) if fault.edit is not None else reply.body
        headers = {**reply.headers, **fault.headers}
        return Reply(reply.status, body, headers, reply.content_type)


def decode_base64(text: Any) -> bytes:
    """Decode base64. Raises ``SceneError`` for anything else, data URLs included."""
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, TypeError):
        raise SceneError("the image is not base64") from None


def sigv4_problem(call: Call, service: str, region: str) -> tuple[str, str] | None:
    """Verify a request's AWS signature (version 4), computed from what arrived. Returns the
    type and message of AWS's error, or None.
    """
    unknown = (
        "UnrecognizedClientException",
        "The security token included in the request is invalid.",
    )
    wrong = (
        "InvalidSignatureException",
        (
            "The request signature we calculated does not match the signature you"
            " provided."
        ),
    )
    scheme, _, parameters = call.headers.get("authorization", "").partition(" ")
    fields = {}
    for parameter in parameters.split(","):
        name, _, text = parameter.strip().partition("=")
        fields[name] = text
    moment = call.headers.get("x-amz-date", "")
    scope = f"{moment[:8]}/{region}/{service}/aws4_request"
    credential = f"{AWS_KEY_ID}/{scope}"
    if scheme != "AWS4-HMAC-SHA256" or fields.get("Credential") != credential:
        return unknown
    if call.headers.get("x-amz-security-token", AWS_SESSION) != AWS_SESSION:
        return unknown
    signed = fields.get("SignedHeaders", "").split(";")
    required = {"host", *(name for name in call.headers if name.startswith("x-amz-"))}
    digest = hashlib.sha256(call.body).hexdigest()
    if (
        not required <= set(signed)
        or signed != sorted(signed)
        or call.headers.get("x-amz-content-sha256", digest) != digest
    ):
        return wrong
    ahead = _aws_time(moment) - call.received
    if not abs(ahead) <= CLOCK_SKEW_MAX:
        reason = "not yet current" if ahead > 0 else "expired"
        return wrong[0], f"Signature {reason}: {moment}"
    request_hash = hashlib.sha256(_canonical_request(call, signed, digest)).hexdigest()
    string_to_sign = "\n".join(("AWS4-HMAC-SHA256", moment, scope, request_hash))
    key = f"AWS4{AWS_SECRET}".encode()
    for part in (*scope.split("/"), string_to_sign):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    matches = hmac.compare_digest(key.hex(), fields.get("Signature", ""))
    return None if matches else wrong


def _canonical_request(call: Call, signed: Sequence[str], digest: str) -> bytes:
    """Return AWS's canonical request; services other than S3 quote the path once more."""
    parameters = []
    for name, text in call.params.items():
        parameters.append((quote(name, safe="-_.~"), quote(text, safe="-_.~")))
    headers = ""
    for name in signed:
        text = " ".join(call.headers.get(name, "").split())
        headers += f"{name}:{text}\n"
    lines = (
        call.method,
        quote(call.raw_path or "/", safe="/-_.~"),
        "&".join(f"{name}={text}" for name, text in sorted(parameters)),
        headers,
        ";".join(signed),
        digest,
    )
    return "\n".join(lines).encode()


def _aws_time(moment: str) -> float:
    try:
        date = datetime.strptime(moment, "%Y%m%dT%H%M%SZ")
        return date.replace(tzinfo=UTC).timestamp()
    except ValueError:
        return -math.inf
