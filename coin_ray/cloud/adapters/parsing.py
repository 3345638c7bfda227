"""Strict reading of JSON answers, and box formats, for the adapters. Whatever is not
surely right is a ``ProtocolError``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from coin_ray.cloud.label_map import LabelMap
from coin_ray.cloud.protocol import Frame, Query, RawDetections, ScoreKind
from coin_ray.errors import ProtocolError

BOX_SIDE_MIN = 1.0
SCORE_TOLERANCE = 1e-4
DETAIL_LENGTH = 200
QUOTED_DATA = re.compile(r"[A-Za-z0-9+/=_-]{100,}")

BoxFormat = Literal[
    "xyxy", "xywh", "cxcywh", "ltwh_ratio", "xyxy_ratio", "yxyx_1000", "xyxy_1000"
]
"""Pixels of the image sent, ratios of its sides, or thousandths of them."""


def malformed(reason: str) -> NoReturn:
    raise ProtocolError(
        f"the answer is not in the service's format: {reason}", may_have_billed=True
    )


def load_json(
    headers: Mapping[str, str], body: bytes | str, *, any_type: bool = False
) -> Any:
    """The JSON value of a body, or of a text inside one; duplicate keys, NaN and other
    media types (unless ``any_type``) are refused.
    """
    media_type = (
        headers.get("content-type", "application/json")
        .partition(";")[0]
        .strip()
        .lower()
    )
    if not any_type and media_type != "application/json":
        malformed(f"content type {media_type[:60]!r} instead of application/json")
    try:
        return json.loads(
            body, object_pairs_hook=_no_doubles, parse_constant=_not_a_number
        )
    except RecursionError:
        malformed("nested too deeply")
    except ValueError as error:
        malformed(
            f"broken or truncated JSON of length {len(body)} ({type(error).__name__})"
        )


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        malformed("a key appears twice in one object")
    return result


def _not_a_number(constant: str) -> NoReturn:
    malformed(f"{constant} is not a number")


def as_object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        malformed(f"{place} is {_kind(value)}, not an object")
    return value


def as_list(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list):
        malformed(f"{place} is {_kind(value)}, not a list")
    return value


def as_text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        malformed(f"{place} is {_kind(value)}, not a string")
    return value


def as_number(value: Any, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        malformed(f"{place} is {_kind(value)}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        malformed(f"{place} is not finite")
    return number


def as_score(value: Any, place: str, scale: float = 1.0) -> float:
    """A score in 0..``scale``, as 0..1."""
    score = as_number(value, place) / scale
    if not -SCORE_TOLERANCE <= score <= 1 + SCORE_TOLERANCE:
        malformed(f"{place} is {score * scale:g}, outside 0..{scale:g}")
    return min(max(score, 0.0), 1.0)


def as_numbers(value: Any, count: int, place: str) -> list[float]:
    values = as_list(value, place)
    if len(values) != count:
        malformed(f"{place} has {len(values)} numbers, not {count}")
    return [as_number(v, place) for v in values]


def _kind(value: Any) -> str:
    return "missing" if value is None else type(value).__name__


def check_sent_size(width: Any, height: Any, frame: Frame) -> None:
    """The service must have looked at an image of the size that was sent, or its boxes
    are in another frame.
    """
    size = (as_number(width, "image width"), as_number(height, "image height"))
    if size != frame.sent:
        malformed(
            f"image is {size[0]:g} x {size[1]:g}, but {frame.sent[0]} x {frame.sent[1]}"
            " was sent"
        )


@dataclass(frozen=True, slots=True)
class Found:
    """One box as the service gave it: four numbers, the names it has (best first), its
    score in 0..1.
    """

    box: Sequence[float]
    names: Sequence[str]
    score: float


def detections(
    found: Sequence[Found],
    box_format: BoxFormat,
    query: Query,
    frame: Frame,
    kind: ScoreKind,
) -> RawDetections:
    """Boxes with one label each -> the common form. Boxes of unmapped names are
    counted, those thinner than one pixel dropped.
    """
    labels = query.labels or LabelMap.of_classes(query.classes)
    mapped = [(f, m) for f in found if (m := labels.find(f.names)) is not None]
    unknown = tuple(
        f.names[0]
        for f in found
        if f.names and labels.find(f.names) is None and not labels.ignores(f.names)
    )
    scores = np.zeros((len(mapped), len(query.classes)), np.float32)
    for row, (one, (column, weight)) in enumerate(mapped):
        scores[row, column] = one.score * weight
    return finished(
        to_original([f.box for f, _ in mapped], box_format, frame),
        scores,
        kind,
        unknown,
    )


def finished(
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    kind: ScoreKind,
    unmapped: tuple[str, ...] = (),
) -> RawDetections:
    """Best first, without boxes thinner than one pixel."""
    kept = np.nonzero((boxes[:, 2:] - boxes[:, :2] >= BOX_SIDE_MIN).all(1))[0]
    order = kept[np.argsort(-scores[kept].max(1, initial=0.0), kind="stable")]
    return RawDetections(boxes[order], scores[order], kind, unmapped)


def to_original(
    boxes: Sequence[Sequence[float]], box_format: BoxFormat, frame: Frame
) -> NDArray[np.float32]:
    """Boxes [N, 4] -> xyxy pixels of the original, clipped to it; each axis by its
    actual factor.
    """
    values = np.asarray(boxes, np.float64).reshape(-1, 4)
    width, height = frame.sent
    if box_format.startswith("yxyx"):
        values = values[:, [1, 0, 3, 2]]
    if box_format.endswith("wh") or box_format.startswith("ltwh"):
        values = np.concatenate([values[:, :2], values[:, :2] + values[:, 2:]], 1)
    if box_format.startswith("cxcy"):
        half = (values[:, 2:] - values[:, :2]) / 2
        values = values - np.concatenate([half, half], 1)
    if box_format.endswith("ratio"):
        values = values * [width, height, width, height]
    if box_format.endswith("1000"):
        values = values / 1000 * [width, height, width, height]
    shown = frame.shown or frame.sent
    if frame.mirrored:
        values = np.stack(
            [
                shown[0] - values[:, 2],
                values[:, 1],
                shown[0] - values[:, 0],
                values[:, 3],
            ],
            1,
        )
    part, original = (
        np.array(shown * 2, np.float64),
        np.array(frame.original * 2, np.float64),
    )
    return (np.clip(values, 0, part) * (original / part)).astype(np.float32)


def short_text(*parts: Any) -> str:
    """Texts of an error body, joined, printable, short and without the image that some
    services quote: safe to show.
    """
    text = QUOTED_DATA.sub(
        "...", ", ".join(p for p in parts if isinstance(p, str) and p)
    )
    return "".join(c for c in text if c.isprintable())[:DETAIL_LENGTH]


def error_object(body: bytes) -> dict[str, Any]:
    """The JSON object of an error body; empty for any other body."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
