"""What every service's adapter is: capabilities and three pure functions. No I/O, no secrets, no torch."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from coin_ray.data.canonical import CanonicalImage
from coin_ray.errors import CloudError

RETRY_AFTER_MAX = 120.0
ScoreKind = Literal["per_class", "label"]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a service can do. ``name`` is part of the journal's key."""

    name: str
    open_vocabulary: bool
    per_class_scores: bool
    idempotent: bool
    """Whether the service recognises a repeated Idempotency-Key."""
    health_path: str


@dataclass(frozen=True, slots=True)
class Query:
    """What is asked of the service for every image."""

    model: str
    classes: tuple[str, ...]
    score_min: float


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A POST below the service's URL. The client adds the secret; it is never part of this."""

    path: str
    body: Mapping[str, Any] = field(repr=False)
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Frame:
    """Sizes (width, height) in pixels of the image that was sent and of the upright original."""

    sent: tuple[int, int]
    original: tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class RawDetections:
    """What the service said about one image.

    boxes [N, 4] float32 xyxy pixels of the upright original, clipped to it; class_scores [N, K] float32, independent
    scores in 0..1. ``score_kind``: ``per_class`` if the service scored each class, ``label`` if some boxes came with
    one label only (their other scores are zero).
    """

    boxes: NDArray[np.float32]
    class_scores: NDArray[np.float32]
    score_kind: ScoreKind

    def __len__(self) -> int:
        return len(self.boxes)


class Adapter(Protocol):
    """One service's wire format."""

    @property
    def capabilities(self) -> Capabilities: ...

    def encode(self, image: CanonicalImage, query: Query) -> PreparedRequest:
        """The request for one image."""

    def decode(self, headers: Mapping[str, str], body: bytes, query: Query, frame: Frame) -> RawDetections:
        """A 2xx answer. Raises ``ProtocolError`` for anything that is not surely an answer, and never returns "empty" instead."""

    def classify_error(self, status: int, headers: Mapping[str, str], body: bytes) -> CloudError:
        """The error that any other status stands for."""


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds a Retry-After header asks to wait, 0..120, or None without a usable one. Dates count from the service's own clock."""
    value = headers.get("retry-after", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        seconds = _seconds_until(value, headers.get("date", ""))
    return min(max(seconds, 0.0), RETRY_AFTER_MAX) if math.isfinite(seconds) else None


def _seconds_until(date: str, service_date: str) -> float:
    until = _timestamp(date)
    now = _timestamp(service_date)
    return until - (time.time() if math.isnan(now) else now)


def _timestamp(date: str) -> float:
    try:
        return parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return math.nan
