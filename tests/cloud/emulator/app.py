"""The clouds on one's own machine: one ASGI app that looks at the image it receives and
answers as the real services do.

An image of ``scene(...)`` holds its own ground truth: rectangles on a plain background
whose colour says class and object. Every service decodes the image that arrived, so a
mistake in encoding, scaling or turning changes the answer.

A provider is one file with one function, and one line in ``PROVIDERS``
(``__init__.py``)::

    def answer(call: Call) -> Reply:
        if call.headers.get("authorization") != f"Bearer {TOKEN}":
            return Reply(401, {"error": "bad key"})
        question = call.json()                                  # None if the body is
        not JSON
        try:
            scene = read_scene(base64.b64decode(question["inputs"]))
        except SceneError as error:
            return Reply(400, {"error": str(error)})
        return Reply(200, [{"label": o.name, "score": o.score, ...} for o in
        scene.objects])

It is reached at ``emulator.url(name)`` through ``emulator.transport()``. ``call.path``
is the path below that address, ``call.state`` a dictionary the provider may keep things
in. An answer of status 200 is billed unless ``billed=False``.

Faults never travel with a request: ``emulator.script([...])`` queues a ``Step`` for
each of the next requests::

    emulator.script([Fault(429, {"retry-after": "2"}), Fault(500), None,
    Fault(edit=lambda body: body[:-1]), Fault(delay=9)])

``None`` answers as always, and so does every request after the script's end.
``emulator.calls`` are the requests so far, the scripted ones too; ``emulator.billed``
counts billed calls by provider.
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
"""What class index 0, 1, ... of a scene is called in plain words; a provider with names
of its own translates."""
OBJECTS_MAX = 400
GAP_MIN = 8
"""Pixels of background around every rectangle that doesn't touch the image's border."""
SIDE_MIN = 20
BACKGROUND = 30
LEVEL_FIRST, LEVEL_STEP, LEVELS = 70, 8, 20
REACH = 4
"""Pixels on each side of an edge over which its exact place is measured."""
SHARP = 0.04


class SceneError(ValueError):
    """The bytes are not an image of ``scene``."""


@dataclass(frozen=True, slots=True)
class SceneObject:
    """box: xyxy pixels of the image received, right to 0.1 pixels, after downscaling to
    0.25."""

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


def score_of(object_id: int) -> float:
    """The score every provider gives object 0, 1, 2, ...: 0.99, 0.988, 0.986, ... down
    to 0.192."""
    return round(0.99 - 0.002 * object_id, 3)


def scene(
    classes: Sequence[int],
    boxes: Sequence[Sequence[int]],
    size: tuple[int, int],
    file_format: str = "PNG",
) -> bytes:
    """An image file of ``size`` (width, height) with one rectangle per object: class
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
        if (
            x1 - x0 < SIDE_MIN
            or y1 - y0 < SIDE_MIN
            or min(x0, y0) < 0
            or x1 > size[0]
            or y1 > size[1]
        ):
            raise ValueError(
                f"box {number} is thinner than {SIDE_MIN} pixels or outside the image"
            )
        if (
            pixels[
                max(0, y0 - GAP_MIN) : y1 + GAP_MIN, max(0, x0 - GAP_MIN) : x1 + GAP_MIN
            ]
            != BACKGROUND
        ).any():
            raise ValueError(f"box {number} is closer than {GAP_MIN} pixels to another")
        pixels[y0:y1, x0:x1] = _colour(index, number)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(
        sink,
        file_format,
        **({"quality": 95, "subsampling": 0} if file_format == "JPEG" else {}),
    )
    return sink.getvalue()


def read_scene(data: bytes) -> Scene:
    """What is in the image. Raises ``SceneError`` for damaged images, images with EXIF
    data and images that are no scene."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            if image.getexif():
                raise SceneError("the image carries EXIF data")
            file_format, pixels = (
                str(image.format),
                np.asarray(image.convert("RGB"), np.float64),
            )
    except SceneError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        raise SceneError(f"bad image data ({type(error).__name__})") from None
    height, width = pixels.shape[:2]
    return Scene(width, height, file_format, tuple(_objects(pixels)))


def _colour(class_index: int, object_id: int) -> tuple[int, int, int]:
    red, green, blue = (
        LEVEL_FIRST + LEVEL_STEP * n
        for n in (class_index, object_id // LEVELS, object_id % LEVELS)
    )
    return red, green, blue


def _objects(pixels: NDArray[np.float64]) -> Iterator[SceneObject]:
    """Each colour of the code with a solid 5 x 5 core in the middle of its pixels is an
    object."""
    steps = np.round((pixels - LEVEL_FIRST) / LEVEL_STEP).astype(np.int64)
    close = (np.abs(pixels - LEVEL_FIRST - steps * LEVEL_STEP) <= 3).all(2) & (
        (steps >= 0) & (steps < LEVELS)
    ).all(2)
    codes = np.where(
        close, (steps[..., 0] * LEVELS + steps[..., 1]) * LEVELS + steps[..., 2], -1
    )
    rows, columns = np.nonzero(codes >= 0)
    if len(rows) == 0:
        return
    order = np.argsort(codes[rows, columns], kind="stable")
    values, starts = np.unique(codes[rows, columns][order], return_index=True)
    for code, members in zip(values, np.split(order, starts[1:]), strict=True):
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
    """Edges seen from the object's middle: first roughly, then over all rows and
    columns that cross the object."""
    rough = (
        *_edges(pixels[y - 1 : y + 2].mean(0), x),
        *_edges(pixels[:, x - 1 : x + 2].mean(1), y),
    )
    left, right, top, bottom = (round(v) for v in rough)
    inner_rows = slice(min(top + REACH, y - 1), max(bottom - REACH, y + 2))
    inner_columns = slice(min(left + REACH, x - 1), max(right - REACH, x + 2))
    x0, x1 = _edges(pixels[inner_rows].mean(0), x)
    y0, y1 = _edges(pixels[:, inner_columns].mean(1), y)
    return x0, y0, x1, y1


def _edges(line: NDArray[np.float64], middle: int) -> tuple[float, float]:
    """Where the object around ``middle`` begins and ends on a line [N, 3], from how
    much of each pixel it covers."""
    own = line[middle] - BACKGROUND
    cover = (line - BACKGROUND) @ own / (own @ own)
    after = _end(cover[middle:])
    before = _end(cover[middle - 1 :: -1]) if middle else 0.0
    return middle - before, middle + after


def _end(cover: NDArray[np.float64]) -> float:
    """How far from its start the covered part of ``cover`` reaches; a sharp edge lies
    between two pixels."""
    gone = np.nonzero(cover < 0.5)[0]
    if len(gone) == 0:
        return float(len(cover))
    end = int(gone[0])
    if cover[end - 1] > 1 - SHARP and cover[end] < SHARP:
        return float(end)
    first = max(0, end - REACH)
    return first + float(cover[first : end + REACH].sum())


@dataclass(frozen=True, slots=True)
class Call:
    """A request as it arrived. ``path`` is below the provider's address, ``raw_path``
    the whole path, still quoted."""

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
        """The body's JSON value, None for anything else."""
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
    """``value``: bytes are sent as they are, anything else as JSON. ``billed`` None: if
    the status is 200."""

    status: int
    value: Any = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    content_type: str = "application/json"
    billed: bool | None = None

    @property
    def body(self) -> bytes:
        return (
            self.value
            if isinstance(self.value, bytes)
            else json.dumps(self.value).encode()
        )


@dataclass(frozen=True, slots=True)
class Fault:
    """What becomes of one request. With a ``status`` the provider never sees it and
    ``body`` (bytes, or a value for JSON) is the reply; without one its answer is sent
    after ``delay`` seconds, with ``headers`` added and its body changed by ``edit``.
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
        self._app = Starlette(
            routes=[
                Route(
                    "/{provider}{path:path}",
                    self._respond,
                    methods=["GET", "POST", "PUT", "DELETE"],
                )
            ]
        )

    def url(self, provider: str) -> str:
        return f"https://{HOST}/{provider}"

    def transport(self) -> httpx.ASGITransport:
        return httpx.ASGITransport(self._app)

    def script(self, steps: Iterable[Step]) -> None:
        """Queue what becomes of the next requests, one step each."""
        self._script.extend(steps)

    def state(self, provider: str) -> dict[str, Any]:
        """What a provider keeps between requests, for tests to look at or to set."""
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
        self.billed[call.provider] += (
            (reply.status == 200) if reply.billed is None else reply.billed
        )
        if fault is None:
            return reply
        body = fault.edit(reply.body) if fault.edit is not None else reply.body
        return Reply(
            reply.status, body, {**reply.headers, **fault.headers}, reply.content_type
        )


def decoded_base64(text: Any) -> bytes:
    """Strict: raises ``SceneError`` for what is not a base64 string, also for a data
    URL."""
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, TypeError):
        raise SceneError("the image is not base64") from None


def sigv4_problem(call: Call, service: str, region: str) -> tuple[str, str] | None:
    """Type and message of AWS's error for a request's signature (version 4), or None:
    everything is computed anew from what arrived."""
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
    scheme, _, rest = call.headers.get("authorization", "").partition(" ")
    given = dict(part.strip().partition("=")[::2] for part in rest.split(","))
    moment = call.headers.get("x-amz-date", "")
    scope = f"{moment[:8]}/{region}/{service}/aws4_request"
    if (
        scheme != "AWS4-HMAC-SHA256"
        or given.get("Credential") != f"{AWS_KEY_ID}/{scope}"
    ):
        return unknown
    if call.headers.get("x-amz-security-token", AWS_SESSION) != AWS_SESSION:
        return unknown
    signed = given.get("SignedHeaders", "").split(";")
    needed = {"host", *(name for name in call.headers if name.startswith("x-amz-"))}
    digest = hashlib.sha256(call.body).hexdigest()
    if (
        not needed <= set(signed)
        or signed != sorted(signed)
        or call.headers.get("x-amz-content-sha256", digest) != digest
    ):
        return wrong
    ahead = _aws_time(moment) - call.received
    if not abs(ahead) <= CLOCK_SKEW_MAX:
        return (
            wrong[0],
            f"Signature {'not yet current' if ahead > 0 else 'expired'}: {moment}",
        )
    text = "\n".join(
        (
            "AWS4-HMAC-SHA256",
            moment,
            scope,
            hashlib.sha256(_canonical(call, signed, digest)).hexdigest(),
        )
    )
    key = f"AWS4{AWS_SECRET}".encode()
    for part in (*scope.split("/"), text):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    return None if hmac.compare_digest(key.hex(), given.get("Signature", "")) else wrong


def _canonical(call: Call, signed: Sequence[str], digest: str) -> bytes:
    """AWS's canonical request; services other than S3 quote the path once more."""
    query = sorted(
        (quote(k, safe="-_.~"), quote(v, safe="-_.~")) for k, v in call.params.items()
    )
    headers = "".join(
        f"{name}:{' '.join(call.headers.get(name, '').split())}\n" for name in signed
    )
    lines = (
        call.method,
        quote(call.raw_path or "/", safe="/-_.~"),
        "&".join(f"{k}={v}" for k, v in query),
        headers,
        ";".join(signed),
        digest,
    )
    return "\n".join(lines).encode()


def _aws_time(moment: str) -> float:
    try:
        return (
            datetime.strptime(moment, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp()
        )
    except ValueError:
        return -math.inf
