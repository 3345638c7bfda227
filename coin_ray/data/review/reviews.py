"""What people get to review, and what comes back: an image with its boxes, the kind of
each box and the labels that the teachers gave it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from coin_ray.data.formats import Annotation, ImageRecord
from coin_ray.storage import stream_table
from coin_ray.tables import stream_rows

KINDS = ("consistent", "inconsistent", "private")
REVIEWED_KIND = "reviewed"
"""The kind of a box from a person, in a separation table."""
DIGITS = 4


@dataclass(frozen=True, slots=True)
class ReviewedBox:
    """``edges``: left, top, right, bottom in pixels. ``kind``: one of KINDS, or empty
    if a person drew the box. ``teacher_labels``: the teachers' labels as text.
    """

    edges: tuple[float, float, float, float]
    label: str
    kind: str = ""
    teacher_labels: str = ""


@dataclass(frozen=True, slots=True)
class Review:
    """One image. ``name``: the path of its file among the reviewed ones; ``reviewed``:
    a person says that the boxes are right and complete.

    ``problems``: why its labels can't be used, as a polygon among the boxes.
    ``changes``: what the reader put right, as a box that was slightly turned.
    """

    image_id: str
    uri: str
    name: str
    width: int
    height: int
    boxes: tuple[ReviewedBox, ...] = ()
    reviewed: bool = False
    problems: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """Boxes of each kind."""
        box_counts = Counter(box.kind for box in self.boxes)
        return {kind: box_counts[kind] for kind in KINDS}

    @property
    def disagreement(self) -> float:
        """Share of the teachers' boxes that are not consistent; 0 without any."""
        total = sum(self.counts.values())
        return round(1 - self.counts["consistent"] / total, DIGITS) if total else 0.0

    def image_record(self) -> ImageRecord:
        """Convert the review to an image of a data set; ``problems`` don't matter."""
        annotations = [Annotation(box.edges, box.label) for box in self.boxes]
        size = self.width, self.height
        return ImageRecord.from_annotations(self.name, self.uri, size, annotations)


def reviews_by_disagreement(
    images: pa.Table, separation: str, classes: Sequence[str], limit: int | None = None
) -> tuple[list[Review], int]:
    """Return the ``limit`` images with the highest teacher disagreement, highest first,
    and how many images could be reviewed.

    ``images``: a table ``tables.IMAGES``; ``separation``: URI of a table
    ``SEPARATION``. Images that people have reviewed are left out.
    """
    ids, disagreement = _disagreement_by_image(separation)
    positions = pc.index_in(images["image_id"], value_set=ids)
    images = images.filter(positions.is_valid())
    shares = disagreement[positions.drop_null().to_numpy()]
    order = pa.array(np.argsort(-shares, kind="stable")[:limit])
    folder_depth = _common_folder_depth(images["uri"])
    rows = {
        row["image_id"]: row
        for row in stream_rows(separation, images["image_id"].take(order))
    }
    reviews = [
        _review(image, folder_depth, rows[image["image_id"]], classes)
        for image in images.take(order).to_pylist()
    ]
    return reviews, len(images)


def _disagreement_by_image(separation: str) -> tuple[pa.Array, NDArray[np.float64]]:
    """Return the ids of the images that nobody has reviewed, and their disagreement."""
    ids, shares = [pa.array([], pa.string())], [np.zeros(0)]
    for rows in stream_table(separation, ("image_id", "kind")):
        consistent = _count_boxes(rows, KINDS[:1])
        total = _count_boxes(rows, KINDS)
        unreviewed = _count_boxes(rows, (REVIEWED_KIND,)) == 0
        ids += rows["image_id"].filter(pa.array(unreviewed)).chunks
        agreement = np.divide(
            consistent, total, out=np.ones(len(rows)), where=total > 0
        )
        shares.append(np.round(1 - agreement, DIGITS)[unreviewed])
    return pa.concat_arrays(ids), np.concatenate(shares)


def _count_boxes(rows: pa.Table, kinds: Sequence[str]) -> NDArray[np.float64]:
    """Count the boxes of these kinds in each row of a separation table."""
    row_of_box = pc.list_parent_indices(rows["kind"]).to_numpy()
    has_kind = pc.is_in(pc.list_flatten(rows["kind"]), value_set=pa.array(kinds))
    counts = np.bincount(row_of_box, has_kind.to_numpy(), len(rows))
    return counts.astype(np.float64)


def _review(
    image: Mapping[str, Any],
    folder_depth: int,
    row: Mapping[str, Any],
    classes: Sequence[str],
) -> Review:
    boxes = [_box(row, position, classes) for position in range(len(row["boxes"]))]
    return Review(
        image["image_id"],
        image["uri"],
        "/".join(image["uri"].split("/")[folder_depth:]),
        image["width"],
        image["height"],
        tuple(boxes),
    )


def _box(row: Mapping[str, Any], position: int, classes: Sequence[str]) -> ReviewedBox:
    """Convert a box of a separation row. A private box has one teacher's label, under
    ``cloud_labels`` whichever teacher it is.
    """
    left, top, right, bottom = (float(edge) for edge in row["boxes"][position])
    kind = row["kind"][position]
    cloud_name, cloud_score = _teacher_label(row, "cloud", position, classes)
    teacher_labels = f"{cloud_name} {cloud_score:.2f}"
    if kind != "private":
        clip_name, clip_score = _teacher_label(row, "clip", position, classes)
        teacher_labels = f"cloud {teacher_labels}, CLIP {clip_name} {clip_score:.2f}"
    return ReviewedBox((left, top, right, bottom), cloud_name, kind, teacher_labels)


def _teacher_label(
    row: Mapping[str, Any], teacher: str, position: int, classes: Sequence[str]
) -> tuple[str, float]:
    """Return the class name (background last) and its probability."""
    label = row[f"{teacher}_labels"][position]
    probability = row[f"{teacher}_probs"][position][label]
    return (*classes, "background")[label], float(probability)


def _common_folder_depth(uris: pa.ChunkedArray) -> int:
    """Count the path parts of the deepest folder that holds all of the files: the parts
    after it tell the files apart.
    """
    if not len(uris):
        return 0
    # all paths are between the smallest and the largest one, in alphabetical order
    extremes = pc.min_max(uris)
    first = extremes["min"].as_py().rsplit("/", 1)[0].split("/")
    last = extremes["max"].as_py().rsplit("/", 1)[0].split("/")
    depth = 0
    for part, other in zip(first, last, strict=False):
        if part != other:
            break
        depth += 1
    return depth
