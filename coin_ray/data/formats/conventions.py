"""Tell from the boxes of a whole data set that they are written in another convention
than the format's: centres or corners instead of left, top, width and height, rows before
columns, shares, percent or thousandths instead of pixels.

One box rarely shows it. Several boxes far out of their images do, if in another
convention every box of the set is inside.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from coin_ray.data.formats.record import ImageRecord
from coin_ray.errors import InputError

Array = NDArray[np.float64]

CORNERS = "corners (left, top, right, bottom)"
ROWS_FIRST = "corners with rows first (top, left, bottom, right)"
LEFT_TOP_SIZE = "left, top, width, height"
CENTRE_SIZE = "centre x, centre y, width, height"
CONVENTIONS = (CORNERS, LEFT_TOP_SIZE, CENTRE_SIZE, ROWS_FIRST)
"""What the four numbers of a box mean, in files that people have."""

ROUNDING = 1.0
"""Pixels that a box may lie outside its image in the right convention."""
FAR_OUTSIDE = 0.05
"""Share of the image's side from which a box is far outside."""
MIN_OUTSIDE, MIN_REVERSED = 3, 5
"""Boxes far outside, or with exchanged corners, that are more than odd labels."""
UNITS = {1.0: "shares", 100.0: "percent", 1000.0: "thousandths"}
"""Units that a side of the image may have been divided into."""
MIN_BOXES_IN_UNITS = {1.0: 3, 100.0: 10, 1000.0: 10}
"""Boxes that a set needs to tell, since all may lie near the first corner."""
MIN_SIDE_IN_UNITS = {1.0: 16.0, 100.0: 2.0, 1000.0: 2.0}
"""How many times the unit's range every side of the images must be, in pixels."""
FITTING_SHARE = 0.5
"""Share of the polygons that boxes in another convention fit."""
MOST_OUTSIDE, MANY_BOXES = 0.5, 20
"""Share of the boxes that may lie far outside, in a set of this many or more."""
NEAR_FULL = 0.9
"""Share of the range that percent and thousandths reach in a set."""


def edges_of(numbers: Array, convention: str) -> Array:
    """Return the edges [N, 4] xyxy of boxes [N, 4] in one of ``CONVENTIONS``."""
    if convention == CORNERS:
        return numbers
    if convention == ROWS_FIRST:
        return numbers[:, [1, 0, 3, 2]]
    starts, sides = numbers[:, :2], numbers[:, 2:]
    if convention == CENTRE_SIZE:
        starts = starts - sides / 2
    return np.concatenate([starts, starts + sides], axis=1)


def check_records(records: Sequence[ImageRecord], convention: str, where: str) -> None:
    """Check the boxes of a folder's records, whose files hold them in ``convention``, as
    ``check_boxes`` does.
    """
    records = [record for record in records if len(record.boxes)]
    if not records:
        return
    edges = np.concatenate([record.boxes for record in records])
    counts = [len(record.boxes) for record in records]
    image_sizes = np.array([(r.width, r.height) for r in records], np.float64)
    numbers = edges
    if convention == CENTRE_SIZE:
        middles = (edges[:, :2] + edges[:, 2:]) / 2
        numbers = np.concatenate([middles, edges[:, 2:] - edges[:, :2]], axis=1)
    check_boxes(numbers, np.repeat(image_sizes, counts, axis=0), convention, where)


def check_boxes(numbers: Array, sizes: Array, convention: str, where: str) -> None:
    """Raise InputError that begins with ``where`` if the ``numbers`` [N, 4] of a data
    set are in another unit than pixels, or in another convention than ``convention``,
    for images of ``sizes`` [N, 2]. Sizes that are not known tell nothing.
    """
    if not len(numbers) or not sizes.all():
        return
    edges = edges_of(numbers, convention)
    _check_units(edges, sizes, where)
    overhang = np.maximum(edges[:, 2:] - sizes, -edges[:, :2])
    is_outside = (overhang > np.maximum(ROUNDING, FAR_OUTSIDE * sizes)).any(1)
    is_reversed = (edges[:, 2:] < edges[:, :2]).any(1)
    outside, reversed_ = int(is_outside.sum()), int(is_reversed.sum())
    if outside < MIN_OUTSIDE and reversed_ < MIN_REVERSED:
        return
    for other in CONVENTIONS:
        if other != convention and _all_fit(edges_of(numbers, other), sizes):
            raise InputError(
                f"{where}: expected boxes as {convention}, got {other}: read as"
                f" expected, {outside} of {len(numbers)} boxes lie far out of their"
                f" images and {reversed_} have exchanged corners, read as {other} none;"
                " convert the labels"
            )
    if len(numbers) >= MANY_BOXES and outside > MOST_OUTSIDE * len(numbers):
        raise InputError(
            f"{where}: expected boxes as {convention}, got numbers by which {outside} of"
            f" {len(numbers)} boxes lie far out of their images: are these the images"
            " that were labelled, in their size then?"
        )


def check_against_polygons(
    boxes: Sequence[tuple[Sequence[float], Sequence[float]]],
    convention: str,
    where: str,
) -> None:
    """Raise InputError if the numbers of boxes fit their polygons in another convention.
    ``boxes``: the numbers of each, and those that its polygon has in ``convention``.
    """
    if not boxes:
        return
    try:
        pairs = np.array(boxes, np.float64)
    except (TypeError, ValueError):  # odd numbers are told where boxes are read
        return
    extents = edges_of(pairs[:, 1], convention)
    fits = {
        other: np.abs(edges_of(pairs[:, 0], other) - extents).max(1) <= 2 * ROUNDING
        for other in CONVENTIONS
    }
    for other in CONVENTIONS:
        is_other = fits[other] & ~fits[convention]
        if fits[convention].sum() < is_other.sum() > FITTING_SHARE * len(pairs):
            raise InputError(
                f"{where}: expected boxes as {convention}, got {other}: so"
                f" {int(is_other.sum())} of {len(pairs)} are the boxes around their"
                " polygons; convert the labels"
            )


def _all_fit(edges: Array, sizes: Array) -> bool:
    """Tell whether all boxes have an area and lie in their images."""
    has_area = (edges[:, 2:] > edges[:, :2]).all()
    starts_inside = (edges[:, :2] >= -ROUNDING).all()
    return bool(has_area and starts_inside and (edges[:, 2:] <= sizes + ROUNDING).all())


def _check_units(edges: Array, sizes: Array, where: str) -> None:
    """Raise InputError if all edges lie within the range of a unit, far from the sides
    of images that are much larger.
    """
    highest = float(edges.max())
    unit = next((unit for unit in UNITS if highest <= unit), None)
    if unit is None or float(edges.min()) < 0:
        return
    is_large = float(sizes.min()) >= MIN_SIDE_IN_UNITS[unit] * unit
    if not is_large or len(edges) < MIN_BOXES_IN_UNITS[unit]:
        return
    reaches_far = (edges.max(0)[2:] > NEAR_FULL * unit).all() or unit == 1
    if reaches_far and highest > 0:
        raise InputError(
            f"{where}: expected boxes in pixels, got {UNITS[unit]} of the image's"
            f" sides: no edge of {len(edges)} boxes is beyond {unit:g} in images of at"
            f" least {int(sizes.min())} pixels; multiply x by the image's width and y"
            f" by its height" + (f", and divide by {unit:g}" if unit > 1 else "")
        )
