"""Strict parsing of JSON responses and conversion of box formats, shared by the adapters.

Whatever is not certainly valid raises ``ProtocolError``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from coin_ray.cloud.label_map import LabelMap
from coin_ray.cloud.protocol import (
    NO_COUNTS,
    BoxCounts,
    Frame,
    Query,
    RawDetections,
    ScoreKind,
)
from coin_ray.errors import ProtocolError, UnusableBoxes
from coin_ray.storage import JsonObject

BOX_SIDE_MIN = 1.0
BOXES_MAX = 1000
"""Boxes of one answer that are used, the best ones: time and memory of what follows grow
with their square."""
OVERSHOOT_MAX = 0.2
"""Boxes may reach a little beyond the image. A coordinate further out, as a share of the
side, is in another unit."""
RATIO_OVERSHOOT_MAX = 1.0
"""The same for ratios, which services do not clip; percent and pixels lie far beyond."""
PERCENT = 100.0
NAMES_SHOWN = 5
SCORE_TOLERANCE = 1e-4
DETAIL_LENGTH = 200
QUOTED_DATA = re.compile(r"[A-Za-z0-9+/=_-]{100,}")

BoxFormat = Literal[
    "xyxy",
    "xywh",
    "cxcywh",
    "ltwh_ratio",
    "xyxy_ratio",
    "xyxy_percent",
    "yxyx_1000",
    "xyxy_1000",
]
"""Pixels of the image sent, ratios of its sides (``_ratio``), percent or thousandths of
them (``_percent``, ``_1000``)."""
PIXELS, SHARES = "pixels of the image", "shares of the image's sides, 0 to 1"
THOUSANDTHS = "thousandths of the image's sides, 0 to 1000"
UNIT_MAXIMA: Mapping[BoxFormat, int] = {
    "ltwh_ratio": 1,
    "xyxy_ratio": 1,
    "xyxy_percent": 100,
    "yxyx_1000": 1000,
    "xyxy_1000": 1000,
}
"""The coordinate of the far side; formats in pixels are missing."""
UNIT_NAMES: Mapping[BoxFormat, str] = {
    "xyxy": PIXELS,
    "xywh": PIXELS,
    "cxcywh": PIXELS,
    "ltwh_ratio": SHARES,
    "xyxy_ratio": SHARES,
    "xyxy_percent": "percent of the image's sides, 0 to 100",
    "yxyx_1000": THOUSANDTHS,
    "xyxy_1000": THOUSANDTHS,
}


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
            object_pairs_hook=reject_duplicate_keys,
            parse_constant=reject_constant,
        )
    except RecursionError:
        raise_malformed("nested too deeply")
    except ValueError as error:
        raise_malformed(
            f"broken or truncated JSON of length {len(body)} ({type(error).__name__})"
        )


def reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> JsonObject:
    """Return the JSON object of these members. Raises ``ProtocolError`` if a key is there
    twice.
    """
    json_object = dict(pairs)
    if len(json_object) != len(pairs):
        raise_malformed("a key appears twice in one object")
    return json_object


def reject_constant(constant: str) -> NoReturn:
    """Raise ``ProtocolError`` for NaN and Infinity, which are no JSON."""
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
    score in 0..1. ``other_scores``: of further names that it may be.
    """

    box: Sequence[float]
    names: Sequence[str]
    score: float
    other_scores: Mapping[str, float] = field(default_factory=dict)


def map_detections(
    parsed_boxes: Sequence[ParsedBox],
    box_format: BoxFormat,
    query: Query,
    frame: Frame,
    kind: ScoreKind,
    *,
    expects_names: bool = False,
    limit: int | None = BOXES_MAX,
    whole_numbers: bool = False,
) -> RawDetections:
    """Map boxes with one label each to the classes of the query.

    Names that the label map lacks are reported in ``unmapped``. ``expects_names``: the
    service was asked for the classes by name, so that an answer of only other names is
    an error. ``limit``: as in ``sort_detections``; ``whole_numbers``: as in
    ``check_box_units``. Raises ``UnusableBoxes`` if the boxes
    are in another unit, or if none of them can be used.
    """
    labels = query.labels or LabelMap.of_classes(query.classes)
    boxes: list[Sequence[float]] = []
    columns: list[int] = []
    scores: list[float] = []
    unmapped: list[str] = []
    other_scores: list[dict[int, float]] = []
    ignored = 0
    for parsed in parsed_boxes:
        match = labels.find(parsed.names)
        if match is not None:
            column, weight = match
            boxes.append(parsed.box)
            other_scores.append(_scores_by_column(parsed.other_scores, labels))
            columns.append(column)
            scores.append(parsed.score * weight)
        elif parsed.names and not labels.ignores(parsed.names):
            unmapped.append(parsed.names[0])
        else:
            ignored += 1
    check_box_units(
        [parsed.box for parsed in parsed_boxes],
        box_format,
        frame,
        whole_numbers=whole_numbers,
    )
    if expects_names and unmapped and not boxes:
        raise_unmapped(unmapped, query.classes)
    placed = PlacedBoxes.convert(boxes, box_format, frame)
    rows, counts = placed.select_best(np.array(scores, np.float32), limit)
    class_scores = np.zeros((len(rows), len(query.classes)), np.float32)
    class_scores[np.arange(len(rows)), np.array(columns, np.int64)[rows]] = np.array(
        scores, np.float32
    )[rows]
    for number, row in enumerate(rows.tolist()):
        for column, score in other_scores[row].items():
            class_scores[number, column] = max(class_scores[number, column], score)
    counts += BoxCounts(unmapped=len(unmapped), ignored=ignored)
    return RawDetections(
        placed.boxes[rows], class_scores, kind, tuple(unmapped), counts
    )


def _scores_by_column(
    scores: Mapping[str, float], labels: LabelMap
) -> dict[int, float]:
    """Return the best weighted score of each class that one of the names means."""
    by_column: dict[int, float] = {}
    for name, score in scores.items():
        match = labels.find([name])
        if match is not None:
            column, weight = match
            by_column[column] = max(by_column.get(column, 0.0), weight * score)
    return by_column


def raise_unmapped(names: Sequence[str], classes: Sequence[str]) -> NoReturn:
    """Raise ``UnusableBoxes`` for an answer whose boxes all have other names than the
    classes.
    """
    first_names = ", ".join(repr(name) for name in sorted(set(names))[:NAMES_SHOWN])
    raise UnusableBoxes(
        f"the answer has {len(names)} boxes and none of a class: expected names like"
        f" {sanitize_text(', '.join(classes))[:60]}, got"
        f" {sanitize_text(first_names)[:80]}; map or ignore these names by a"
        " cloud.label_map",
        may_have_billed=True,
    )


def check_box_units(
    boxes: Sequence[Sequence[float]],
    box_format: BoxFormat,
    frame: Frame,
    *,
    whole_numbers: bool = False,
) -> None:
    """Raise ``UnusableBoxes`` if boxes [N, 4] are certainly not in the unit of their
    format: all within 0..1, percent, or far outside the image.

    ``whole_numbers``: whether the service was asked for such coordinates, so that
    decimals up to 100 are percent.
    """
    if not len(boxes):
        return
    corners = _corners(boxes, box_format)
    unit, sides = UNIT_NAMES[box_format], _sides(box_format, frame)
    largest = float(np.abs(corners).max())
    if sides.min() > 2 and largest <= 1 + OVERSHOOT_MAX:
        _raise_other_unit(f"all coordinates lie within 0..{largest:g}", unit)
    has_decimals = bool((corners != np.round(corners)).any())
    could_be_percent = largest <= PERCENT < sides.min() / 2
    if whole_numbers and has_decimals and could_be_percent:
        _raise_other_unit(
            f"all coordinates lie within 0..{largest:g} and have decimals, like percent",
            unit,
        )
    overshoot = RATIO_OVERSHOOT_MAX if box_format.endswith("ratio") else OVERSHOOT_MAX
    outside = (corners < -overshoot * sides) | (corners > (1 + overshoot) * sides)
    if outside.any():
        row, column = np.argwhere(outside)[0]
        _raise_other_unit(
            f"box {row} has {corners[row, column]:g}, far outside 0..{sides[column]:g}",
            unit,
        )


def _raise_other_unit(reason: str, unit: str) -> NoReturn:
    raise UnusableBoxes(
        f"the boxes are in another unit: {reason}: are these coordinates {unit}? If the"
        " service is a language model, set cloud.coordinates to what it writes",
        may_have_billed=True,
    )


def _sides(box_format: BoxFormat, frame: Frame) -> NDArray[np.float64]:
    """Return the coordinates [4] of the image's lower right corner, twice, in the unit
    of the format.
    """
    if box_format in UNIT_MAXIMA:
        return np.full(4, float(UNIT_MAXIMA[box_format]))
    return np.array(frame.sent * 2, np.float64)


def _corners(
    boxes: Sequence[Sequence[float]], box_format: BoxFormat
) -> NDArray[np.float64]:
    """Return boxes [N, 4] as x0, y0, x1, y1 in the unit of their format."""
    corners = np.asarray(boxes, np.float64).reshape(-1, 4)
    if box_format.startswith("yxyx"):
        corners = corners[:, [1, 0, 3, 2]]
    if box_format.endswith("wh") or box_format.startswith("ltwh"):
        corners = np.concatenate([corners[:, :2], corners[:, :2] + corners[:, 2:]], 1)
    if box_format.startswith("cxcy"):
        half = (corners[:, 2:] - corners[:, :2]) / 2
        corners = corners - np.concatenate([half, half], 1)
    return corners


@dataclass(frozen=True, slots=True, eq=False)
class PlacedBoxes:
    """A service's boxes in the frame of the original.

    ``boxes`` [N, 4] float32: xyxy pixels of the upright original, clipped to it;
    ``swapped``, ``thin``, ``outside``, ``in_margin`` [N] bool: corners were the other
    way round; less than one pixel is left; nothing lies in the image; nothing lies in
    the image but it does in the margin that a rendering added.
    """

    boxes: NDArray[np.float32]
    swapped: NDArray[np.bool_]
    thin: NDArray[np.bool_]
    outside: NDArray[np.bool_]
    in_margin: NDArray[np.bool_]

    @classmethod
    def convert(
        cls, boxes: Sequence[Sequence[float]], box_format: BoxFormat, frame: Frame
    ) -> PlacedBoxes:
        """Convert boxes [N, 4]; each axis is scaled by its own factor."""
        corners = _corners(boxes, box_format)
        sent = np.array(frame.sent * 2, np.float64)
        if box_format.endswith("ratio"):
            corners = corners * sent
        if box_format.endswith(("1000", "percent")):
            corners = corners / UNIT_MAXIMA[box_format] * sent
        swapped = (corners[:, 2:] - corners[:, :2]).min(1) < 0
        upper_left = np.minimum(corners[:, :2], corners[:, 2:])
        lower_right = np.maximum(corners[:, :2], corners[:, 2:])
        visible_size = frame.visible_size or frame.sent
        outside = _lies_outside(upper_left, lower_right, visible_size)
        outside_sent = _lies_outside(upper_left, lower_right, frame.sent)
        xyxy = np.concatenate([upper_left, lower_right], 1)
        if frame.mirrored:
            x0, y0, x1, y1 = xyxy.T
            xyxy = np.stack([visible_size[0] - x1, y0, visible_size[0] - x0, y1], 1)
        visible = np.array(visible_size * 2, np.float64)
        original = np.array(frame.original * 2, np.float64)
        placed = (np.clip(xyxy, 0, visible) * (original / visible)).astype(np.float32)
        sizes = placed[:, 2:] - placed[:, :2]
        thin = np.logical_and(sizes.min(1) < BOX_SIDE_MIN, ~outside)
        in_margin = np.logical_and(outside, ~outside_sent)
        return cls(placed, swapped, thin, outside, in_margin)

    def select_best(
        self, scores: NDArray[np.float32], limit: int | None = BOXES_MAX
    ) -> tuple[NDArray[np.int64], BoxCounts]:
        """Return the rows of the boxes to use, best score [N] first, at most ``limit``,
        and the counts of the others. Raises ``UnusableBoxes`` if there are boxes and
        none of them can be used.
        """
        usable = np.flatnonzero(~(self.thin | self.outside))
        order = usable[np.argsort(-scores[usable], kind="stable")]
        rows = order[:limit]
        counts = BoxCounts(
            swapped=int(self.swapped[rows].sum()),
            thin=int(self.thin.sum()),
            outside=int(self.outside.sum()),
            surplus=len(order) - len(rows),
        )
        if len(self.boxes) and not len(rows) and not self.in_margin.any():
            raise UnusableBoxes(
                f"none of the answer's {len(self.boxes)} boxes can be used: expected"
                f" boxes of at least {BOX_SIDE_MIN:g} pixel in the image, got"
                f" {counts.describe()}",
                may_have_billed=True,
            )
        return rows, counts


def _lies_outside(
    upper_left: NDArray[np.float64],
    lower_right: NDArray[np.float64],
    size: tuple[float, float],
) -> NDArray[np.bool_]:
    """Return for corners [N, 2] whether nothing of the box lies in 0..size."""
    beyond_edge = np.logical_or(lower_right <= 0, upper_left >= size)
    outside: NDArray[np.bool_] = beyond_edge.max(1, initial=False)
    return outside


def sort_detections(
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    kind: ScoreKind,
    unmapped: tuple[str, ...] = (),
    counts: BoxCounts = NO_COUNTS,
) -> RawDetections:
    """Sort usable boxes [N, 4] by their best score of [N, K], best first, and keep the
    first ``BOXES_MAX``.
    """
    order = np.argsort(-scores.max(1, initial=0.0), kind="stable")
    rows = order[:BOXES_MAX]
    counts += BoxCounts(surplus=len(order) - len(rows))
    return RawDetections(boxes[rows], scores[rows], kind, unmapped, counts)


def to_original_frame(
    boxes: Sequence[Sequence[float]], box_format: BoxFormat, frame: Frame
) -> NDArray[np.float32]:
    """Convert boxes [N, 4] to xyxy pixels of the original, clipped to it; each axis is
    scaled by its own factor.
    """
    return PlacedBoxes.convert(boxes, box_format, frame).boxes


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
