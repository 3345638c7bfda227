"""Adapter of the reference wire format: ``POST /v1/detect`` with JSON in and out (docs/cloud.md).

request  ``{"image": {"b64": ...}, "classes": [...], "threshold": 0.05, "model": "default", "return": "probs"}``
answer   ``{"image": {"w": 640, "h": 480}, "detections": [{"box": [x0, y0, x1, y1], "label": "car", "score": 0.71,
"scores": {"car": 0.71, "bus": 0.08}}]}``; boxes in pixels of the image sent, ``scores`` may be left out.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from coin_ray.cloud.protocol import Capabilities, Frame, PreparedRequest, Query, RawDetections, retry_after
from coin_ray.data.canonical import CanonicalImage
from coin_ray.errors import (
    AuthError,
    BadRequest,
    CloudError,
    ImageRejected,
    ProtocolError,
    QuotaExhausted,
    Refused,
    Throttled,
    Transient,
)

BOX_SIDE_MIN = 1.0
SCORE_TOLERANCE = 1e-4
DETAIL_LENGTH = 200
BY_STATUS: dict[int, type[CloudError]] = {
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


@dataclass(frozen=True)
class ReferenceAdapter:
    """The reference wire format as an ``Adapter``."""

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities("reference", open_vocabulary=True, per_class_scores=True, idempotent=True, health_path="/health")

    def encode(self, image: CanonicalImage, query: Query) -> PreparedRequest:
        body = {
            "image": {"b64": base64.b64encode(image.data).decode(), "media_type": image.media_type},
            "classes": list(query.classes),
            "threshold": query.score_min,
            "model": query.model,
            "return": "probs",
        }
        return PreparedRequest("/v1/detect", body)

    def decode(self, headers: Mapping[str, str], body: bytes, query: Query, frame: Frame) -> RawDetections:
        """Raises ``ProtocolError`` with the place and the reason; boxes thinner than one pixel are dropped."""
        answer = _object(_load(headers, body), "the answer")
        _check_size(answer, frame)
        elements = [_object(e, f"detections[{i}]") for i, e in enumerate(_list(answer, "detections"))]
        columns = {name: k for k, name in enumerate(query.classes)}
        sent_boxes = np.array([_box(e, i) for i, e in enumerate(elements)], np.float64).reshape(-1, 4)
        scores = np.array([_class_scores(e, i, columns) for i, e in enumerate(elements)], np.float32).reshape(-1, len(columns))
        boxes = _in_original(sent_boxes, frame)
        kept = (boxes[:, 2:] - boxes[:, :2] >= BOX_SIDE_MIN).all(1)
        per_class = all("scores" in e for e in elements)
        return RawDetections(boxes[kept], scores[kept], "per_class" if per_class else "label")

    def classify_error(self, status: int, headers: Mapping[str, str], body: bytes) -> CloudError:
        detail = _problem(body)
        message = f"the service answered {status}" + (f": {detail}" if detail else "")
        if status in (402, 403, 429) and "quota" in detail.lower():
            return QuotaExhausted(message)
        wait = retry_after(headers)
        if status == 429 or (status == 503 and wait is not None):
            return Throttled(message, wait)
        if status in BY_STATUS:
            return BY_STATUS[status](message)
        if status >= 500:
            return Transient(message, may_have_billed=True)
        if 300 <= status < 400:
            return BadRequest(f"{message}, a redirect; give the address it leads to as cloud.url")
        return BadRequest(message)


def _fail(reason: str) -> NoReturn:
    raise ProtocolError(f"the answer is not in the reference format: {reason}", may_have_billed=True)


def _load(headers: Mapping[str, str], body: bytes) -> Any:
    media_type = headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json":
        _fail(f"content type {media_type[:60]!r} instead of application/json")
    try:
        return json.loads(body, object_pairs_hook=_no_doubles, parse_constant=_not_a_number)
    except RecursionError:
        _fail("nested too deeply")
    except ValueError as error:
        _fail(f"broken or truncated JSON of {len(body)} bytes ({type(error).__name__})")


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        _fail("a key appears twice in one object")
    return result


def _not_a_number(constant: str) -> NoReturn:
    _fail(f"{constant} is not a number")


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        _fail(f"{place} is {_kind(value)}, not an object")
    return value


def _list(parent: dict[str, Any], key: str, place: str = "") -> list[Any]:
    value = parent.get(key)
    if not isinstance(value, list):
        _fail(f"{place}{key} is {_kind(value)}, not a list")
    return value


def _number(value: Any, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _fail(f"{place} is {_kind(value)}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        _fail(f"{place} is not finite")
    return number


def _kind(value: Any) -> str:
    return "missing" if value is None else type(value).__name__


def _check_size(answer: dict[str, Any], frame: Frame) -> None:
    image = _object(answer.get("image"), "image")
    size = (_number(image.get("w"), "image.w"), _number(image.get("h"), "image.h"))
    if size != frame.sent:
        _fail(f"image is {size[0]:g} x {size[1]:g}, but {frame.sent[0]} x {frame.sent[1]} was sent")


def _box(element: dict[str, Any], index: int) -> list[float]:
    place = f"detections[{index}]."
    values = _list(element, "box", place)
    if len(values) != 4:
        _fail(f"{place}box has {len(values)} numbers, not 4")
    return [_number(v, f"{place}box") for v in values]


def _class_scores(element: dict[str, Any], index: int, columns: dict[str, int]) -> NDArray[np.float32]:
    """Scores [K] of one box: its ``scores`` map, and its ``score`` in the label's column if the map leaves that out."""
    place = f"detections[{index}]."
    label, score = element.get("label"), _score(element.get("score"), f"{place}score")
    named = {str(label): score} if isinstance(label, str) else _fail(f"{place}label is {_kind(label)}, not a string")
    named |= _object(element["scores"], f"{place}scores") if "scores" in element else {}
    row = np.zeros(len(columns), np.float32)
    for name, value in named.items():
        if name not in columns:
            _fail(f"{place}label {name[:60]!r} was not asked for")
        row[columns[name]] = _score(value, f"{place}scores")
    return row


def _score(value: Any, place: str) -> float:
    score = _number(value, place)
    if not -SCORE_TOLERANCE <= score <= 1 + SCORE_TOLERANCE:
        _fail(f"{place} is {score:g}, outside 0..1")
    return min(max(score, 0.0), 1.0)


def _in_original(boxes: NDArray[np.float64], frame: Frame) -> NDArray[np.float32]:
    """Boxes [N, 4] of the image sent, clipped to it -> of the original, by the actual factor of each axis."""
    sent, original = np.array(frame.sent * 2, np.float64), np.array(frame.original * 2, np.float64)
    return (np.clip(boxes, 0, sent) * (original / sent)).astype(np.float32)


def _problem(body: bytes) -> str:
    """Title and detail of an ``application/problem+json`` body, shortened; empty for other bodies."""
    try:
        problem = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(problem, dict):
        return ""
    text = ", ".join(problem[k] for k in ("title", "detail") if isinstance(problem.get(k), str))
    return "".join(c for c in text if c.isprintable())[:DETAIL_LENGTH]
