"""Read the regions of one reviewed image: boxes that are turned, and regions that can't
be used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from pydantic import TypeAdapter, ValidationError

from coin_ray.data.review.reviews import ReviewedBox
from coin_ray.errors import InputError

Edges = tuple[float, float, float, float]
SLIGHT_TURN = 5.0
"""Degrees from upright up to which a box is replaced by the upright box around it."""
QUARTER = 90.0
ROUNDING = 1e-6

T = TypeVar("T")


class Regions(NamedTuple):
    """What was read of an image: its boxes, why others can't be read, and which of the
    boxes were changed.
    """

    boxes: tuple[ReviewedBox, ...]
    problems: tuple[str, ...]
    changes: tuple[str, ...]


def read_regions(
    regions: Iterable[T], read_region: Callable[[T], tuple[ReviewedBox, str]]
) -> Regions:
    """Read every region by ``read_region``, which returns the box and what was changed
    (empty: nothing). An InputError of one region becomes a problem of the image.
    """
    boxes, problems, changes = [], [], []
    for region in regions:
        try:
            box, change = read_region(region)
        except InputError as error:
            problems.append(str(error))
            continue
        boxes.append(box)
        if change:
            changes.append(change)
    return Regions(tuple(boxes), tuple(problems), tuple(changes))


def make_upright(
    edges: Edges, degrees: float, pivot: tuple[float, float]
) -> tuple[Edges, str]:
    """Return the upright box around a box turned clockwise about ``pivot`` (x, y), and
    what was changed: empty if it is upright already.

    Raises InputError for a box that is turned more than slightly.
    """
    turn = degrees % 360
    if min(turn, 360 - turn) <= ROUNDING:
        return edges, ""
    tilt = min(turn % QUARTER, QUARTER - turn % QUARTER)
    if tilt > SLIGHT_TURN:
        raise InputError(
            f"expected an upright box, got one turned by {degrees:g} degrees; up to"
            f" {SLIGHT_TURN:g} are put upright"
        )
    x1, y1, x2, y2 = edges
    cosine, sine = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    corners = [(x, y) for x in (x1, x2) for y in (y1, y2)]
    offsets = [(x - pivot[0], y - pivot[1]) for x, y in corners]
    xs = [pivot[0] + dx * cosine - dy * sine for dx, dy in offsets]
    ys = [pivot[1] + dx * sine + dy * cosine for dx, dy in offsets]
    upright = (min(xs), min(ys), max(xs), max(ys))
    return (
        upright,
        f"a box turned by {degrees:g} degrees became the upright one around it",
    )


def validate_entry(kind: TypeAdapter[T], entry: Any, where: str) -> T:
    """Return an entry of a JSON file as ``kind``. Raises InputError that begins with
    ``where`` and names the first part that does not match.
    """
    try:
        return kind.validate_python(entry)
    except ValidationError as error:
        problem = error.errors()[0]
        location = ".".join([where, *(str(part) for part in problem["loc"])])
        raise InputError(f"{location}: {problem['msg']}") from None
