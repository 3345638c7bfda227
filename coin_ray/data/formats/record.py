"""The record that every format is read into: one image with its annotations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coin_ray.errors import InputError

MESSAGE_LENGTH = 300
MOST_UNREADABLE = 0.5
"""Share of a folder's label files that may be unreadable."""


class Annotation(NamedTuple):
    """A box (left, top, right, bottom), its class name, and whether evaluation neither
    requires nor punishes it.
    """

    box: Sequence[float]
    label: str
    difficult: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class ImageRecord:
    """An image and its annotations: ``boxes`` [N, 4] xyxy, ``labels`` N class names,
    ``difficult`` [N].

    Boxes are edges in pixels from the upper left corner: the whole image is 0, 0,
    width, height. ``file`` is the path below the format's image folder. ``width`` and
    ``height`` are 0 if neither the labels nor the image tell. ``annotated`` is False
    where nobody labelled the image, which is not the same as an image without objects.
    Raises InputError for an invalid box or class name.
    """

    file: str
    uri: str
    width: int
    height: int
    boxes: NDArray[np.float64]
    labels: tuple[str, ...]
    difficult: NDArray[np.bool_]
    annotated: bool = True

    def __post_init__(self) -> None:
        count = len(self.labels)
        if self.boxes.shape != (count, 4) or self.difficult.shape != (count,):
            shapes = f"boxes {self.boxes.shape} and difficult {self.difficult.shape}"
            raise InputError(
                f"{self.file}: {count} labels need boxes ({count}, 4) and difficult"
                f" ({count},); got {shapes}"
            )
        # the sum is quicker, and may overflow
        if count and not (isfinite(self.boxes.sum()) or np.isfinite(self.boxes).all()):
            message = (
                f"{self.file}: a box has a coordinate that is not a finite number:"
                f" {self.boxes.tolist()}"
            )
            raise InputError(message[:MESSAGE_LENGTH])
        for label in set(self.labels):
            check_class_name(label, self.file)

    @classmethod
    def from_annotations(
        cls,
        file: str,
        uri: str,
        size: tuple[int, int],
        annotations: Sequence[Annotation],
        annotated: bool = True,
    ) -> ImageRecord:
        """Build the record of an image of ``size`` (width, height)."""
        width, height = size
        boxes = [annotation.box for annotation in annotations]
        return cls(
            file,
            uri,
            width,
            height,
            np.asarray(boxes, np.float64).reshape(-1, 4),
            tuple(annotation.label for annotation in annotations),
            np.asarray([annotation.difficult for annotation in annotations], np.bool_),
            annotated,
        )


class LeftOut(NamedTuple):
    """An image file that is not among the records, by its URI, and why."""

    uri: str
    reason: str


class UnreadFile(NamedTuple):
    """A file that looks like labels and that no reader took, by its URI, and the layout
    it looks like.
    """

    uri: str
    layout: str


class FolderError(InputError):
    """Labels contradict the settings of their whole folder: nothing in it is sure."""


class UnreadableLabels(NamedTuple):
    """Labels of an image that can't be read, so that it is not annotated: the image or
    the label file, and why.
    """

    uri: str
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """The images of a folder. ``names``: class names in the format's order.
    ``missing``: images that are listed, or label files, whose image does not exist.
    ``left_out``: image files that are not among the records. ``unread_files``: files
    that look like labels and were not read. ``notes``: how the labels were understood.
    ``unreadable``: labels in the format that have an error.
    """

    format: str
    records: tuple[ImageRecord, ...]
    names: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    unread_files: tuple[UnreadFile, ...] = ()
    notes: tuple[str, ...] = ()
    unreadable: tuple[UnreadableLabels, ...] = ()


def check_readable(
    unreadable: Sequence[UnreadableLabels], annotated_count: int
) -> tuple[UnreadableLabels, ...]:
    """Return the unreadable labels in order. Raises InputError if they are more than
    ``MOST_UNREADABLE`` of all labelled images, ``annotated_count`` of which are read.
    """
    count, total = len(unreadable), len(unreadable) + annotated_count
    if count > MOST_UNREADABLE * total:
        reason = min(unreadable).reason
        more = f" ({count} of {total} labelled images can't be read)"
        raise InputError(reason if total == 1 else reason + more)
    return tuple(sorted(unreadable))


def describe_dataset(dataset: Dataset) -> str:
    """Return one line of counts: format, images, annotated, without objects, boxes,
    classes, and what was left out, missing or not read.
    """
    annotated = [record for record in dataset.records if record.annotated]
    box_counts = [len(record.labels) for record in annotated]
    classes = {label for record in annotated for label in record.labels}
    parts = [
        f"format {dataset.format}: {len(dataset.records)} images",
        f"{len(annotated)} annotated",
        f"{box_counts.count(0)} of them without objects",
        f"{sum(box_counts)} boxes of {len(classes)} classes",
    ]
    reasons = Counter(image.reason for image in dataset.left_out)
    parts += [f"{count} left out ({reason})" for reason, count in reasons.items()]
    if dataset.missing:
        parts.append(f"{len(dataset.missing)} labelled or listed images not found")
    if dataset.unreadable:
        count, reason = len(dataset.unreadable), dataset.unreadable[0].reason
        parts.append(f"{count} not annotated since their labels have errors ({reason})")
    layouts = Counter(file.layout for file in dataset.unread_files)
    parts += [f"{count} files not read ({kind})" for kind, count in layouts.items()]
    return "; ".join([", ".join(parts), *dataset.notes])


def check_class_name(name: str, where: str) -> None:
    """Raise InputError for a class name that is empty, has blanks at its ends or is not
    one printable line.
    """
    if not _is_class_name(name):
        raise InputError(
            f"{where}: a class name must be one line of printable characters without"
            f" blanks at its ends; got {name!r}"
        )


@lru_cache(maxsize=1 << 14)
def _is_class_name(name: str) -> bool:
    return bool(name) and name == name.strip() and name.isprintable()


def collect_class_names(
    records: Iterable[ImageRecord], names: Sequence[Any] = ()
) -> tuple[str, ...]:
    """Return ``names``, then the other labels of the records in alphabetical order."""
    listed_names = tuple(str(name) for name in names)
    labels = {label for record in records for label in record.labels}
    return listed_names + tuple(sorted(labels - set(listed_names)))
