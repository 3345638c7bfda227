"""The images of a user's folders, each in its first split, with their annotations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TypedDict

import numpy as np
import pyarrow as pa

from coin_ray import tables
from coin_ray.data.formats import ImageRecord
from coin_ray.data.inspect import INTENSITY, Inspection
from coin_ray.data.intensity import IntensityStatistics
from coin_ray.data.pixels import IntensityRange
from coin_ray.data.truth import TWICE, Size, clean_labels, first_of_each_box
from coin_ray.errors import InputError
from coin_ray.tables import TableBuilder

SAME_IMAGE = "same image as one in"
"""How the reason begins for an image that is in an earlier split too."""
REJECTED = pa.schema(
    [("uri", pa.string()), ("split", pa.string()), ("reason", pa.string())]
)
BOX_DECIMALS = 2
SHOWN_CONFLICTS = 3


class RejectedImage(TypedDict):
    """One row of ``REJECTED``."""

    uri: str
    split: str
    reason: str


class AnnotationRow(TypedDict):
    """One row of ``tables.ANNOTATIONS``."""

    image_id: str
    boxes: list[list[float]]
    labels: list[int]
    difficult: list[bool]


class FolderImages:
    """The images that are read from a user's folders, each in its first split.

    For each split, ``add`` every image, then ``annotate`` them. ``same_images``: a
    training image may be a test image too; then its annotations are those of the test
    set. ``intensity_range``: that of deep grey images from the config, or "auto".
    """

    def __init__(
        self, same_images: bool, intensity_range: str | IntensityRange = "auto"
    ) -> None:
        self.same_images = same_images
        self.rows = TableBuilder(tables.IMAGES)
        self.annotations = TableBuilder(tables.ANNOTATIONS)
        self.annotated_ids: set[str] = set()
        self.test_annotations: dict[str, AnnotationRow] = {}
        """Annotations by a test set of images that have others by then."""
        self.rejected: list[RejectedImage] = []
        self.split_by_id: dict[str, str] = {}
        self.duplicates = 0
        self.intensity = IntensityStatistics(intensity_range)
        self.labelled: dict[str, tuple[ImageRecord, Size]] = {}
        """By image id, the records of this split that wait for ``annotate``."""
        self.conflicts: list[str] = []
        """Pairs of copies of one image in this split with different labels."""

    def add(self, record: ImageRecord, inspection: Inspection, split: str) -> None:
        """Add an image, or record why it is rejected."""
        if isinstance(inspection, str):
            self.reject(record.uri, split, inspection)
            return
        image_id: str = inspection["image_id"]
        earlier_split = self.split_by_id.get(image_id)
        allowed_twice = self.same_images and (earlier_split, split) == ("train", "test")
        if earlier_split is not None and not allowed_twice:
            self.duplicates += 1
            if earlier_split != split:
                self.reject(record.uri, split, f"{SAME_IMAGE} {earlier_split}")
                return
        else:
            self._append(image_id, inspection, split)
        if record.annotated:
            size = inspection["width"], inspection["height"]
            self._label(image_id, record, size)

    def _append(
        self, image_id: str, inspection: Mapping[str, object], split: str
    ) -> None:
        self.split_by_id[image_id] = split
        row = dict(inspection)
        own_range = row.pop(INTENSITY, None)
        if isinstance(own_range, tuple):
            self.intensity.add(split, own_range)
        self.rows.append(row | {"split": split})

    def reject(self, uri: str, split: str, reason: str) -> None:
        """Record why an image, or its labels, are left out."""
        self.rejected.append({"uri": uri, "split": split, "reason": reason})

    def _label(self, image_id: str, record: ImageRecord, size: Size) -> None:
        """Keep the labels of an image. Of copies of one image, any may have them."""
        if image_id not in self.labelled:
            self.labelled[image_id] = record, size
            return
        first, _ = self.labelled[image_id]
        if _label_rows(first) != _label_rows(record):
            self.conflicts.append(f"{first.uri} and {record.uri}")

    def annotate(self, split: str, class_indexes: Mapping[str, int]) -> Counter[str]:
        """Make the annotations of the split's images and return counts of what was put
        right in them.

        An image none of whose boxes is usable is not annotated: it would count as one
        without objects. Raises InputError for labels that do not fit their images, and
        for copies of an image with different labels.
        """
        if self.conflicts:
            raise InputError(
                f"{len(self.conflicts)} images are there twice with different labels:"
                f" {'; '.join(self.conflicts[:SHOWN_CONFLICTS])}; keep one of each"
            )
        labelled, self.labelled = self.labelled, {}
        records = [record for record, _ in labelled.values()]
        sizes = [size for _, size in labelled.values()]
        repairs: Counter[str] = Counter()
        cleaned_records = clean_labels(records, sizes)
        for image_id, record, cleaned in zip(
            labelled, records, cleaned_records, strict=True
        ):
            repairs += cleaned.repairs
            if len(cleaned.record.boxes) == 0 and not record.difficult.all():
                reason = (
                    f"none of its {len(record.boxes)} boxes lies in the image and has"
                    " an area: its labels are not used"
                )
                self.reject(record.uri, split, reason)
                continue
            row = _annotation_row(image_id, cleaned.record, class_indexes, repairs)
            self._annotate(row)
        return repairs

    def _annotate(self, row: AnnotationRow) -> None:
        image_id = row["image_id"]
        if image_id in self.annotated_ids:
            self.test_annotations[image_id] = row
        else:
            self.annotations.append(row)
            self.annotated_ids.add(image_id)

    def annotation_table(self) -> pa.Table:
        """Return the annotations, one row for each annotated image."""
        annotations = self.annotations.table()
        if not self.test_annotations:
            return annotations
        rows = [
            self.test_annotations.get(row["image_id"], row)
            for row in annotations.to_pylist()
        ]
        return pa.Table.from_pylist(rows, schema=tables.ANNOTATIONS)


def _label_rows(record: ImageRecord) -> list[tuple[object, ...]]:
    """Return what the labels of an image say, in an order of their own."""
    boxes = np.round(record.boxes, BOX_DECIMALS).tolist()
    rows = zip(record.labels, map(tuple, boxes), record.difficult.tolist(), strict=True)
    return [(record.width, record.height), *sorted(rows)]


def _annotation_row(
    image_id: str,
    record: ImageRecord,
    class_indexes: Mapping[str, int],
    repairs: Counter[str],
) -> AnnotationRow:
    """Return the record's boxes of the run's classes, each once. Boxes that are there
    twice are counted in ``repairs``.
    """
    numbers = [
        number for number, name in enumerate(record.labels) if name in class_indexes
    ]
    boxes, difficult = record.boxes[numbers], record.difficult[numbers]
    labels = [class_indexes[record.labels[number]] for number in numbers]
    is_first = first_of_each_box(boxes, labels, difficult)
    if not is_first.all():
        repairs[TWICE] += int((~is_first).sum())
    return {
        "image_id": image_id,
        "boxes": boxes[is_first].tolist(),
        "labels": [
            label for label, first in zip(labels, is_first, strict=True) if first
        ],
        "difficult": difficult[is_first].tolist(),
    }
