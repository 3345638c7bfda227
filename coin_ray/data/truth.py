"""Bring annotations into the frame of their image's pixels and clean their boxes, in one
way for what is learned and what is measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coin_ray import storage
from coin_ray.data import pixels
from coin_ray.data.formats import Dataset, ImageRecord
from coin_ray.data.threads import map_in_threads
from coin_ray.errors import InputError

Size = tuple[int, int]
"""Width and height in pixels."""

RESIZED, TURNED, REVERSED = "resized", "turned", "reversed"
WITHOUT_AREA, OUTSIDE, CUT, TWICE = "without_area", "outside", "cut", "twice"
REPAIRS = {
    RESIZED: "images labelled in another size: boxes scaled",
    TURNED: "images labelled as stored, not upright: boxes turned",
    REVERSED: "boxes with exchanged corners: put right",
    WITHOUT_AREA: "boxes without area: left out",
    OUTSIDE: "boxes outside their image: left out",
    CUT: "boxes that reach out of their image: cut",
    TWICE: "boxes given twice: used once",
}
"""What is put right in labels, by the name under which it is counted."""

ROUNDING = 1.0
"""Pixels by which the sides of a resized copy may differ from the exact ratio."""
CUT_TOLERANCE = 0.01
"""Pixels: COCO rounds to them, so a smaller cut is not counted."""
SAME_EDGE = 0.5
"""Pixels by which the edges of a box that is given twice may differ."""
SAME_OVERLAP = 0.9
"""Intersection over union from which such boxes are the same."""
MIN_SIDE_IN_PIXELS = 16
"""Images with shorter sides may have boxes of less than a pixel."""
SHOWN_PROBLEMS = 3
SIDEWAYS = 5
"""The EXIF orientations from here on exchange width and height."""


def check_complete(dataset: Dataset, address: str) -> None:
    """Raise InputError if labels name images that are not there: a labelled image may
    not become one that nobody labelled.
    """
    missing = dataset.missing
    if not missing:
        return
    dots = ", ..." if len(missing) > SHOWN_PROBLEMS else ""
    raise InputError(
        f"{address}: {len(missing)} labelled or listed images are not there:"
        f" {', '.join(missing[:SHOWN_PROBLEMS])}{dots}. Add the images or remove their"
        " labels; images alone can be read from their own folder"
    )


@dataclass(frozen=True, eq=False)
class CleanedRecord:
    """A record in the frame of its image, with usable boxes only; ``repairs`` counts what
    was put right in it, by the names of ``REPAIRS``.
    """

    record: ImageRecord
    repairs: Counter[str]


def clean_labels(
    records: Sequence[ImageRecord], sizes: Sequence[Size]
) -> list[CleanedRecord]:
    """Return the annotated records of one folder with their boxes in the frame of the
    upright images, whose ``sizes`` these are, and cleaned.

    Raises InputError if labels do not fit their image, or if they are shares of the
    image's sides instead of pixels.
    """
    if _are_shares(records, sizes):
        raise InputError(
            f"{records[0].uri}: expected boxes in pixels, but no box of its folder"
            " reaches beyond 1: multiply them by the width and height of their image"
        )
    orientations, as_stored = _find_stored_frames(records, sizes)
    cleaned_records = []
    for record, size, orientation, is_stored in zip(
        records, sizes, orientations, as_stored, strict=True
    ):
        fitted, frame_repairs = fit_record(
            record, size, orientation, as_stored=is_stored
        )
        cleaned, box_repairs = clean_record(fitted, size)
        cleaned_records.append(CleanedRecord(cleaned, frame_repairs + box_repairs))
    return cleaned_records


def _find_stored_frames(
    records: Sequence[ImageRecord], sizes: Sequence[Size]
) -> tuple[list[int], list[bool]]:
    """Return each image's EXIF orientation and whether its labels are in the frame of
    the stored pixels.

    Width and height tell it for images that lie on their side. If they say so of one
    image and the contrary of none, it holds for the folder's other turned images too.
    Orientations are only read where sizes differ, and then of all.
    """
    differs = [
        record.width > 0 and (record.width, record.height) != size
        for record, size in zip(records, sizes, strict=True)
    ]
    orientations = [1] * len(records)
    as_stored = [False] * len(records)
    if not any(differs):
        return orientations, as_stored
    orientations = map_in_threads(read_orientation, [record.uri for record in records])
    problems = []
    has_contrary = False
    is_known = [False] * len(records)
    rows = zip(records, sizes, orientations, strict=True)
    for row, (record, size, orientation) in enumerate(rows):
        try:
            as_stored[row] = is_labelled_as_stored(record, size, orientation)
        except InputError as error:
            problems.append(str(error))
        is_known[row] = (
            record.width > 0 and orientation >= SIDEWAYS and size[0] != size[1]
        )
        has_contrary |= is_known[row] and not as_stored[row]
    _raise_problems(problems)
    if any(as_stored) and not has_contrary:
        as_stored = [orientation > 1 for orientation in orientations]
    return orientations, as_stored


def _raise_problems(problems: Sequence[str]) -> None:
    if problems:
        listed = "; ".join(problems[:SHOWN_PROBLEMS])
        hidden = len(problems) - SHOWN_PROBLEMS
        raise InputError(f"{listed}; and {hidden} more" if hidden > 0 else listed)


def read_orientation(uri: str) -> int:
    """Read the EXIF orientation 1..8 of an image file from its header."""
    with (
        storage.open_reader(uri) as stream,
        Image.open(stream, formats=pixels.FORMATS) as image,
    ):
        return pixels.orientation(image)


@dataclass(frozen=True, eq=False)
class CleanedBoxes:
    """``boxes`` [N, 4] xyxy within their image; ``usable`` [N] is False for boxes that
    are neither required nor wrong; ``repairs`` counts what was put right.
    """

    boxes: NDArray[np.float64]
    usable: NDArray[np.bool_]
    repairs: Counter[str]


def clean_boxes(boxes: NDArray[np.float64], size: Size) -> CleanedBoxes:
    """Put reversed corners right, cut the boxes [N, 4] xyxy to an image of ``size``, and
    mark those without area or outside the image as not usable.
    """
    starts = np.minimum(boxes[:, :2], boxes[:, 2:])
    ends = np.maximum(boxes[:, :2], boxes[:, 2:])
    ordered = np.concatenate([starts, ends], axis=1)
    limits = np.tile(np.asarray(size, np.float64), 2)
    inside = np.clip(ordered, 0, limits)
    has_area = (ends > starts).all(1)
    is_inside = (inside[:, 2:] > inside[:, :2]).all(1)
    usable = has_area & is_inside
    is_cut = (np.abs(inside - ordered) > CUT_TOLERANCE).any(1)
    repairs = Counter(
        {
            REVERSED: int((usable & (boxes != ordered).any(1)).sum()),
            WITHOUT_AREA: int((~has_area).sum()),
            OUTSIDE: int((has_area & ~is_inside).sum()),
            CUT: int((usable & is_cut).sum()),
        }
    )
    return CleanedBoxes(inside, usable, +repairs)


def clean_record(record: ImageRecord, size: Size) -> tuple[ImageRecord, Counter[str]]:
    """Return the record with the usable ones of its boxes, cleaned for an image of
    ``size``, and counts of what was put right.
    """
    if not len(record.boxes):
        return record, Counter()
    cleaned = clean_boxes(record.boxes, size)
    return _select(record, cleaned.boxes, cleaned.usable), cleaned.repairs


def first_of_each_box(
    boxes: NDArray[np.float64], labels: Sequence[object], difficult: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Return a mask [N] that leaves out each box that was given before, within a hair,
    with the same label and flag.
    """
    first = np.ones(len(boxes), np.bool_)
    # only neighbours in this order can be the same box
    order = np.argsort(boxes[:, 0], kind="stable")
    for position, row in enumerate(order):
        for other in order[position + 1 :]:
            if boxes[other, 0] - boxes[row, 0] > SAME_EDGE:
                break
            same_kind = labels[row] == labels[other]
            same_kind = same_kind and difficult[row] == difficult[other]
            if same_kind and _is_same_box(boxes[row], boxes[other]):
                first[max(row, other)] = False
    return first


def _is_same_box(box: NDArray[np.float64], other: NDArray[np.float64]) -> bool:
    if np.abs(box - other).max() > SAME_EDGE:
        return False
    sides = np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])
    if (sides <= 0).any():
        return bool((box == other).all())
    intersection = float(np.prod(sides))
    areas = float(np.prod(box[2:] - box[:2]) + np.prod(other[2:] - other[:2]))
    return intersection >= SAME_OVERLAP * (areas - intersection)


def is_labelled_as_stored(record: ImageRecord, size: Size, orientation: int) -> bool:
    """Tell whether the labels are in the frame of the file's stored pixels, which its
    EXIF ``orientation`` turns sideways to the upright ``size``.

    Raises InputError if the labels fit neither the upright nor the stored image.
    """
    labelled = record.width, record.height
    if not all(labelled) or labelled == size:
        return False
    stored_size = (size[1], size[0]) if orientation >= SIDEWAYS else size
    if labelled == stored_size:
        return True
    if _is_copy(labelled, size):
        return False
    if _is_copy(labelled, stored_size):
        return True
    raise InputError(
        f"{record.uri}: the image is {size[0]} x {size[1]}, its labels are for"
        f" {record.width} x {record.height}; give the image they were made for"
    )


def _is_copy(size: Size, other: Size) -> bool:
    """Tell whether images of the two sizes can be resized copies of each other: the
    larger one, reduced, differs from the smaller one by rounding only.
    """
    width, height = min(size, other)
    larger_width, larger_height = max(size, other)
    by_width = abs(larger_height * width / larger_width - height)
    by_height = abs(larger_width * height / larger_height - width)
    return min(by_width, by_height) <= ROUNDING


def fit_record(
    record: ImageRecord, size: Size, orientation: int, *, as_stored: bool
) -> tuple[ImageRecord, Counter[str]]:
    """Return the record in the frame of an upright image of ``size``, and counts of what
    was put right: boxes of a resized copy are scaled, boxes in the frame of the stored
    pixels are turned by the EXIF ``orientation``.
    """
    repairs: Counter[str] = Counter()
    frame = size
    if as_stored and orientation >= SIDEWAYS:
        frame = size[1], size[0]
    boxes = record.boxes
    labelled = record.width, record.height
    if all(labelled) and labelled != frame:
        repairs[RESIZED] += 1
        boxes = boxes * np.tile(np.divide(frame, labelled), 2)
    if as_stored and orientation > 1:
        repairs[TURNED] += 1
        boxes = turn_upright(boxes, frame, orientation)
    if not repairs:
        return record, repairs
    width, height = size
    return replace(record, boxes=boxes, width=width, height=height), repairs


def turn_upright(
    boxes: NDArray[np.float64], stored_size: Size, orientation: int
) -> NDArray[np.float64]:
    """Turn boxes [N, 4] xyxy in the frame of an image's stored pixels into the frame of
    the image that its EXIF ``orientation`` makes of them.
    """
    width, height = stored_size
    x1, y1, x2, y2 = boxes.T
    flipped_x = width - x2, width - x1
    flipped_y = height - y2, height - y1
    horizontal, vertical = {
        1: ((x1, x2), (y1, y2)),
        2: (flipped_x, (y1, y2)),
        3: (flipped_x, flipped_y),
        4: ((x1, x2), flipped_y),
        5: ((y1, y2), (x1, x2)),
        6: (flipped_y, (x1, x2)),
        7: (flipped_y, flipped_x),
        8: ((y1, y2), flipped_x),
    }[orientation]
    edges = horizontal[0], vertical[0], horizontal[1], vertical[1]
    return np.stack(edges, axis=1).reshape(-1, 4)


def _are_shares(records: Sequence[ImageRecord], sizes: Sequence[Size]) -> bool:
    """Tell whether all boxes are shares of the image's sides: none reaches beyond 1."""
    boxes = [record.boxes for record in records if len(record.boxes)]
    if not boxes or min(map(min, sizes)) < MIN_SIDE_IN_PIXELS:
        return False
    edges = np.concatenate(boxes)
    return bool(((edges >= 0) & (edges <= 1)).all() and edges.any())


def _select(
    record: ImageRecord, boxes: NDArray[np.float64], mask: NDArray[np.bool_]
) -> ImageRecord:
    labels = tuple(
        label for label, selected in zip(record.labels, mask, strict=True) if selected
    )
    return replace(
        record, boxes=boxes[mask], labels=labels, difficult=record.difficult[mask]
    )
