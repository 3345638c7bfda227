"""Read the regions of one reviewed image: boxes that are turned, and regions that can't
be used. Check the regions of all images against their units and their images.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote

from pydantic import TypeAdapter, ValidationError

from coin_ray.data.formats.turned import Edges, extent_of_turned
from coin_ray.data.review.reviews import Review, ReviewedBox
from coin_ray.errors import InputError

SLIGHT_TURN = 5.0
"""Degrees from upright up to which a box is replaced by the upright box around it."""
QUARTER = 90.0
ROUNDING = 1e-6
RENAMED = re.compile(r"^[0-9a-f]{8}-|-\d+(?=\.\w+$)")
"""What tools add to a name that is taken: Label Studio's prefix, FiftyOne's number."""

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
    return (
        extent_of_turned(edges, turn, pivot),
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


def check_shown_images(
    reviews: Sequence[Review], addresses: Sequence[str], where: str
) -> None:
    """Raise InputError if a person saw another image of the export than the review is
    of. ``addresses``: where the tool showed each image from; one that says nothing of
    the name, or is empty, passes.
    """
    names = {_last_part(review.uri or review.name) for review in reviews}
    for review, address in zip(reviews, addresses, strict=True):
        name = _last_part(review.uri or review.name)
        if not review.reviewed or name in unquote(address):
            continue
        shown = {_last_part(unquote(address)), _last_part(address.partition("?")[0])}
        shown |= {RENAMED.sub("", part) for part in shown}
        if shown & (names - {name, ""}):
            raise InputError(
                f"{where}: the review of {review.uri or review.name} was made on the"
                f" image {address}: give each review its own image and review it again"
            )


def _last_part(path: str) -> str:
    return unquote(path).replace("\\", "/").rpartition("/")[2]


def check_units(
    reviews: Iterable[Review],
    unit: Callable[[Review], tuple[float, float]],
    expected: str,
) -> None:
    """Raise InputError that begins with ``expected`` if the boxes are shares of the
    image's sides: all edges of all reviewed images lie within one ``unit`` (x, y in
    pixels) of the upper left corner.
    """
    has_box = False
    for review in reviews:
        if review.reviewed and review.boxes:
            has_box = True
            right, bottom = unit(review)
            for x1, y1, x2, y2 in (box.edges for box in review.boxes):
                if max(x1, x2) > right or max(y1, y2) > bottom:
                    return
    if has_box:
        raise InputError(
            f"{expected}, got no box that reaches beyond 1: multiply shares of the"
            " image's sides by 100 for percent, by width and height for pixels"
        )
