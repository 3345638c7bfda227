"""The interface of a service's adapter: capabilities and three pure functions, without
I/O, secrets or torch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from email.utils import parsedate_to_datetime
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from coin_ray.cloud.label_map import LabelMap
from coin_ray.data.canonical import CanonicalImage
from coin_ray.errors import (
    AuthError,
    BadRequest,
    CloudError,
    ImageRejected,
    QuotaExhausted,
    Refused,
    Throttled,
    Transient,
)

ScoreKind = Literal["per_class", "label", "self_reported", "none"]
"""``per_class``: each class was scored; ``label``: one score for the box's one label;
``self_reported``: a number that a language model wrote; ``none``: the service gives no
score, and the column of the label holds 1.
"""


@dataclass(frozen=True, slots=True)
class Auth:
    """The way a secret is sent: in a header after a prefix, as a member of the JSON body
    (``json_key``: its key), or as an AWS signature (``sigv4``: the name of the AWS
    service).
    """

    header: str = "Authorization"
    prefix: str = "Bearer "
    sigv4: str | None = None
    json_key: str = ""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a service can do. ``name`` is part of the journal's key."""

    name: str
    open_vocabulary: bool
    per_class_scores: bool
    idempotent: bool
    """Whether the service recognises a repeated Idempotency-Key."""
    url: str = ""
    """Its public address; empty if every user has another."""
    auth: Auth | None = Auth()
    """None: the service never takes a secret."""
    health_path: str | None = None
    """A page that costs nothing; None: the first call shows whether it works."""
    max_bytes: int = 20_000_000
    """Largest image file it takes."""
    max_side: int = 4096
    min_side: int = 8
    max_classes: int | None = None
    score_min: float = 0.0
    """Lowest score threshold of a request."""
    asynchronous: bool = False
    """The service answers with a task to be polled."""
    max_pixels: int | None = None
    """Most pixels of an image that it does not make smaller itself."""
    phrases_per_call: int | None = None
    """Most classes or phrases of one call; more are asked for in further calls."""
    reads_names: bool = True
    """Whether the service reads the names that it is asked for."""
    reads_descriptions: bool = False
    """Whether it reads descriptions of the classes."""
    key_settings: tuple[tuple[str, str], ...] = ()
    """Names and texts of settings that change answers beside the query; part of the
    journal's key."""


@dataclass(frozen=True, slots=True)
class Query:
    """The request that is the same for every image. ``labels`` decodes the answers and
    is not sent.
    """

    model: str
    classes: tuple[str, ...]
    score_min: float
    labels: LabelMap | None = None
    """None: the service answers in the names of the classes."""
    refused_fields: frozenset[str] = frozenset()
    """Optional fields of a request that the service has refused: they are left out."""
    settings: tuple[tuple[str, str], ...] = ()
    """``Capabilities.key_settings`` of the adapter, for the journal's key."""
    descriptions: tuple[tuple[str, str], ...] = ()
    """Classes and what they are, in a sentence, for services that read it."""


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request below the service's URL; ``path`` may hold a query. The client adds the
    secret; it is never part of this.
    """

    path: str
    body: bytes = field(default=b"", repr=False)
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    method: Literal["GET", "POST"] = "POST"


@dataclass(frozen=True, slots=True)
class Pending:
    """The service accepted the image as a task: send ``request`` in ``seconds``; None:
    repeat the request that was just answered.
    """

    request: PreparedRequest | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Frame:
    """Sizes (width, height) in pixels of the image that was sent and of the upright
    original.

    ``visible_size``: (width, height) of the part of the sent image, from the upper
    left, that is the original; None: all of it. ``mirrored``: left to right.
    """

    sent: tuple[int, int]
    original: tuple[int, int]
    visible_size: tuple[float, float] | None = None
    mirrored: bool = False


@dataclass(frozen=True, slots=True)
class BoxCounts:
    """Counts of boxes in answers that are not used as the service wrote them."""

    swapped: int = 0
    """Used, but their corners were the other way round."""
    thin: int = 0
    """Dropped: less than one pixel is left in the image."""
    outside: int = 0
    """Dropped: nothing of them lies in the image."""
    surplus: int = 0
    """Dropped: an answer may have so many boxes, the best ones are kept."""
    unmapped: int = 0
    """Dropped: their name is no class, and the label map lacks it."""
    ignored: int = 0
    """Dropped: the label map ignores their name."""
    suppressed: int = 0
    """Dropped: a negative phrase of the class fits them better."""

    def __add__(self, other: BoxCounts) -> BoxCounts:
        totals = {
            f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)
        }
        return BoxCounts(**totals)

    @property
    def changed(self) -> int:
        """Return how many boxes were dropped, unless the label map says so, or put
        right.
        """
        return self.swapped + self.thin + self.outside + self.surplus + self.unmapped

    def as_dict(self) -> dict[str, int]:
        """Return the counts that are not 0, by name."""
        return {name: count for name, count in asdict(self).items() if count}

    def describe(self) -> str:
        """Return the counts that are not 0 in words; empty if there are none."""
        return ", ".join(
            f"{count} {COUNT_WORDS[name]}" for name, count in self.as_dict().items()
        )


COUNT_WORDS: Mapping[str, str] = {
    "swapped": "with corners the other way round (put right)",
    "thin": "thinner than a pixel (dropped)",
    "outside": "outside the image (dropped)",
    "surplus": "beyond the limit for one image (dropped)",
    "unmapped": "of other names (dropped)",
    "ignored": "of names that the label map ignores (dropped)",
    "suppressed": "that fit a negative of their class better (dropped)",
}
NO_COUNTS = BoxCounts()


@dataclass(frozen=True, slots=True, eq=False)
class RawDetections:
    """The service's detections in one image, best first.

    boxes [N, 4] float32 xyxy pixels of the upright original, clipped to it;
    class_scores [N, K] float32, independent scores in 0..1. ``unmapped``: names of
    further boxes that are none of the classes. ``counts``: boxes of the answer that are
    missing here or were put right.
    """

    boxes: NDArray[np.float32]
    class_scores: NDArray[np.float32]
    score_kind: ScoreKind
    unmapped: tuple[str, ...] = ()
    counts: BoxCounts = NO_COUNTS

    def __len__(self) -> int:
        return len(self.boxes)


class Adapter(Protocol):
    """One service's wire format."""

    @property
    def capabilities(self) -> Capabilities: ...

    def encode(self, image: CanonicalImage, query: Query) -> PreparedRequest:
        """Return the request for one image. Raises ``BadRequest`` for classes that the
        service does not accept.
        """

    def decode(
        self, headers: Mapping[str, str], body: bytes, query: Query, frame: Frame
    ) -> RawDetections | Pending:
        """Decode a 2xx answer. Raises ``ProtocolError`` for anything that is not
        certainly an answer, and never returns "empty" instead; an error inside a 2xx
        answer is raised as the ``CloudError`` it stands for.
        """

    def classify_error(
        self, status: int, headers: Mapping[str, str], body: bytes
    ) -> CloudError:
        """Return the error that any other status stands for."""


class FieldRefused(BadRequest):
    """The service refuses a request for one optional field, which can be left out.
    ``field``: its name.
    """

    def __init__(self, message: str, field_name: str) -> None:
        super().__init__(message)
        self.field = field_name


ERRORS_BY_STATUS: dict[int, type[CloudError]] = {
    401: AuthError,
    402: QuotaExhausted,
    403: AuthError,
    408: Transient,
    413: ImageRejected,
    415: ImageRejected,
    423: QuotaExhausted,
    425: Transient,
    451: Refused,
}


def error_for_status(
    status: int, headers: Mapping[str, str], detail: str = "", wait: float | None = None
) -> CloudError:
    """Return the error that a status usually stands for.

    ``detail``: text of the body that is safe to show; ``wait``: seconds that the body
    asks to wait, if it does.
    """
    message = f"the service answered {status}" + (f": {detail}" if detail else "")
    if status in (402, 403, 429) and "quota" in detail.lower():
        return QuotaExhausted(message)
    header_wait = retry_after(headers)
    if header_wait is not None:
        wait = header_wait
    if status == 429 or (status == 503 and wait is not None):
        return Throttled(message, wait)
    if status in ERRORS_BY_STATUS:
        return ERRORS_BY_STATUS[status](message)
    if status >= 500:
        return Transient(message, may_have_billed=True)
    if 300 <= status < 400:
        return BadRequest(
            f"{message}, a redirect; give the address it leads to as cloud.url"
        )
    return BadRequest(message)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a Retry-After header asks to wait, at least 0, or None
    without a usable one. Dates count from the service's own clock.
    """
    header = headers.get("retry-after", "").strip()
    try:
        seconds = float(header)
    except ValueError:
        seconds = _seconds_until(header, headers.get("date", ""))
    if not math.isfinite(seconds):
        return None
    return max(seconds, 0.0)


def _seconds_until(date: str, service_date: str) -> float:
    service_time = _timestamp(service_date)
    now = time.time() if math.isnan(service_time) else service_time
    return _timestamp(date) - now


def _timestamp(date: str) -> float:
    """Return the seconds since 1970 of an HTTP date; NaN for an unusable one."""
    try:
        return parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return math.nan
