"""Strict parsing of JSON responses and conversion of box formats, shared by the adapters.

Whatever is not certainly valid raises ``ProtocolError``.
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
"""Pixels of the image sent, ratios of its sides (``_ratio``), or thousandths of them
(``_1000``)."""

JsonObject = dict[str, Any]
"""A parsed JSON object, whose members have not been checked."""


def raise_malformed(reason: str) -> NoReturn:
    """Raise ``ProtocolError`` for a response that is not in the service's format."""
    raise ProtocolError(
        f"the response is not in the service's format: {reason}", may_have_billed=True
    )


def load_json(
    headers: Mapping[str, str], body: bytes | str, *, any_type: bool = False
) -> Any:
    """Parse the JSON value of a body, or of a text inside one.

    Raises ``ProtocolError`` for duplicate keys, NaN, and media types other than JSON
    (unless ``any_type``).
    """
    content_type = headers.get("content-type", "application/json")
    media_type = content_type.partition(";")[0].strip().lower()
    if not any_type and media_type != "application/json":
        raise_malformed(
            f"content type is {media_type[:60]!r}, expected application/json"
        )
    try:
        return json.loads(
            body,
            object_pairs_hook=_reject_duplicate_keys,
            parse_constant=_reject_constant,
        )
    except RecursionError:
        raise_malformed("nested too deeply")
    except ValueError as error:
        raise_malformed(
            f"broken or truncated JSON of length {len(body)} ({type(error).__name__})"
        )


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> JsonObject:
    json_object = dict(pairs)
    if len(json_object) != len(pairs):
        raise_malformed("a key appears twice in one object")
    return json_object


def _reject_constant(constant: str) -> NoReturn:
    raise_malformed(f"{constant} is not a number")


def expect_object(node: Any, field: str) -> JsonObject:
    """Return ``node`` if it is a JSON object. Raises ``ProtocolError`` naming ``field``,
    as all ``expect_...`` functions do.
    """
    if not isinstance(node, dict):
        raise_malformed(f"{field} is {_json_type(node)}, expected an object")
    return node


def expect_list(node: Any, field: str) -> list[Any]:
    """Return ``node`` if it is a JSON list."""
    if not isinstance(node, list):
        raise_malformed(f"{field} is {_json_type(node)}, expected a list")
    return node


def expect_text(node: Any, field: str) -> str:
    """Return ``node`` if it is a string."""
    if not isinstance(node, str):
        raise_malformed(f"{field} is {_json_type(node)}, expected a string")
    return node


def expect_number(node: Any, field: str) -> float:
    """Return ``node`` if it is a finite number."""
    if isinstance(node, bool) or not isinstance(node, (int, float)):
        raise_malformed(f"{field} is {_json_type(node)}, expected a number")
    try:
        number = float(node)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise_malformed(f"{field} is not finite")
    return number


def expect_score(node: Any, field: str, scale: float = 1.0) -> float:
    """Return a score in 0..``scale`` as one in 0..1."""
    score = expect_number(node, field) / scale
    if not -SCORE_TOLERANCE <= score <= 1 + SCORE_TOLERANCE:
        raise_malformed(f"{field} is {score * scale:g}, expected 0..{scale:g}")
    return min(max(score, 0.0), 1.0)


def expect_numbers(node: Any, count: int, field: str) -> list[float]:
    """Return ``node`` if it is a list of ``count`` finite numbers."""
    numbers = expect_list(node, field)
    if len(numbers) != count:
        raise_malformed(f"{field} has {len(numbers)} numbers, expected {count}")
    return [expect_number(number, field) for number in numbers]


def _json_type(node: Any) -> str:
    return "missing" if node is None else type(node).__name__


def check_sent_size(width: Any, height: Any, frame: Frame) -> None:
    """Raise ``ProtocolError`` unless the service read an image of the size that was
    sent: its boxes would be in another frame.
    """
    size = (expect_number(width, "image width"), expect_number(height, "image height"))
    if size != frame.sent:
        sent_width, sent_height = frame.sent
        raise_malformed(
            f"image is {size[0]:g} x {size[1]:g}, but {sent_width} x {sent_height}"
            " was sent"
        )


@dataclass(frozen=True, slots=True)
class ParsedBox:
    """One box as the service returned it: four numbers, its names (best first), and its
    score in 0..1.
    """

    box: Sequence[float]
    names: Sequence[str]
    score: float


def map_detections(
    parsed_boxes: Sequence[ParsedBox],
    box_format: BoxFormat,
    query: Query,
    frame: Frame,
    kind: ScoreKind,
) -> RawDetections:
    """Map boxes with one label each to the classes of the query.

    Names that the label map lacks are reported in ``unmapped``; boxes thinner than one
    pixel are dropped.
    """
    labels = query.labels or LabelMap.of_classes(query.classes)
    boxes: list[Sequence[float]] = []
    rows: list[NDArray[np.float32]] = []
    unmapped: list[str] = []
    for parsed in parsed_boxes:
        match = labels.find(parsed.names)
        if match is not None:
            column, weight = match
            row = np.zeros(len(query.classes), np.float32)
            row[column] = parsed.score * weight
            boxes.append(parsed.box)
            rows.append(row)
        elif parsed.names and not labels.ignores(parsed.names):
            unmapped.append(parsed.names[0])
    scores = np.array(rows, np.float32).reshape(len(rows), len(query.classes))
    return sort_detections(
        to_original_frame(boxes, box_format, frame), scores, kind, tuple(unmapped)
    )


def sort_detections(
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    kind: ScoreKind,
    unmapped: tuple[str, ...] = (),
) -> RawDetections:
    """Drop boxes thinner than one pixel and sort the others by score, best first."""
    wide_enough = (boxes[:, 2:] - boxes[:, :2] >= BOX_SIDE_MIN).all(1)
    rows = np.nonzero(wide_enough)[0]
    best_scores = scores[rows].max(1, initial=0.0)
    order = rows[np.argsort(-best_scores, kind="stable")]
    return RawDetections(boxes[order], scores[order], kind, unmapped)


def to_original_frame(
    boxes: Sequence[Sequence[float]], box_format: BoxFormat, frame: Frame
) -> NDArray[np.float32]:
    """Convert boxes [N, 4] to xyxy pixels of the original, clipped to it; each axis is
    scaled by its own factor.
    """
    xyxy = np.asarray(boxes, np.float64).reshape(-1, 4)
    width, height = frame.sent
    if box_format.startswith("yxyx"):
        xyxy = xyxy[:, [1, 0, 3, 2]]
    if box_format.endswith("wh") or box_format.startswith("ltwh"):
        xyxy = np.concatenate([xyxy[:, :2], xyxy[:, :2] + xyxy[:, 2:]], 1)
    if box_format.startswith("cxcy"):
        half = (xyxy[:, 2:] - xyxy[:, :2]) / 2
        xyxy = xyxy - np.concatenate([half, half], 1)
    if box_format.endswith("ratio"):
        xyxy = xyxy * [width, height, width, height]
    if box_format.endswith("1000"):
        xyxy = xyxy / 1000 * [width, height, width, height]
    visible_size = frame.visible_size or frame.sent
    if frame.mirrored:
        x0, y0, x1, y1 = xyxy.T
        xyxy = np.stack([visible_size[0] - x1, y0, visible_size[0] - x0, y1], 1)
    visible = np.array(visible_size * 2, np.float64)
    original = np.array(frame.original * 2, np.float64)
    return (np.clip(xyxy, 0, visible) * (original / visible)).astype(np.float32)


def sanitize_text(*parts: Any) -> str:
    """Join texts of an error body into one that is safe to show: printable, short, and
    without the image that some services quote. Parts that are no text are left out.
    """
    joined = ", ".join(part for part in parts if isinstance(part, str) and part)
    text = QUOTED_DATA.sub("...", joined)
    printable = "".join(character for character in text if character.isprintable())
    return printable[:DETAIL_LENGTH]


def error_object(body: bytes, *keys: str) -> JsonObject:
    """Return the JSON object of an error body, or the object nested in it under
    ``keys``; empty if there is none.
    """
    try:
        node = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    for key in keys:
        node = node.get(key) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else {}
