"""What people are given to review, and what comes back: an image with its boxes, their
kinds and what the teachers said.
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

from coin_ray.data.formats.record import Annotation, ImageRecord
from coin_ray.storage import stream_table
from coin_ray.tables import stream_rows

KINDS = ("consistent", "inconsistent", "private")
PEOPLE = ("reviewed",)
DIGITS = 4


@dataclass(frozen=True, slots=True)
class ReviewedBox:
    """``edges``: left, top, right, bottom in pixels. ``kind``: one of KINDS, or empty
    if a person drew the box; ``said``: by the teachers.
    """

    edges: tuple[float, float, float, float]
    label: str
    kind: str = ""
    said: str = ""


@dataclass(frozen=True, slots=True)
class Review:
    """One image. ``name``: the path of its file among the reviewed ones; ``reviewed``:
    a person says that the boxes are right and complete.
    """

    image_id: str
    uri: str
    name: str
    width: int
    height: int
    boxes: tuple[ReviewedBox, ...] = ()
    reviewed: bool = False

    @property
    def counts(self) -> dict[str, int]:
        """Boxes of each kind."""
        found = Counter(box.kind for box in self.boxes)
        return {kind: found[kind] for kind in KINDS}

    @property
    def disagreement(self) -> float:
        """Share of the teachers' boxes that are not consistent; 0 without any."""
        total = sum(self.counts.values())
        return round(1 - self.counts["consistent"] / total, DIGITS) if total else 0.0

    def record(self) -> ImageRecord:
        """As one image of a data set."""
        found = [Annotation(box.edges, box.label) for box in self.boxes]
        return ImageRecord.of(self.name, self.uri, (self.width, self.height), found)


def reviews_by_disagreement(
    images: pa.Table, separation: str, classes: Sequence[str], most: int | None = None
) -> tuple[list[Review], int]:
    """Of ``tables.IMAGES`` the ``most`` in most dispute, those first, and how many
    there are; ``separation``: URI of a table ``SEPARATION``.

    Images that people have reviewed are left out.
    """
    ids, disputed = _disputed(separation)
    place = pc.index_in(images["image_id"], value_set=ids)
    images = images.filter(place.is_valid())
    order = np.argsort(-disputed[place.drop_null().to_numpy()], kind="stable")[:most]
    shared = _shared(images["uri"])
    rows = {
        row["image_id"]: row
        for row in stream_rows(separation, images["image_id"].take(pa.array(order)))
    }
    made = [
        _review(image, shared, rows[image["image_id"]], classes)
        for image in images.take(pa.array(order)).to_pylist()
    ]
    return made, len(images)


def _disputed(separation: str) -> tuple[pa.Array, NDArray[np.float64]]:
    """Ids of the images that nobody has reviewed, and their disagreement."""
    ids, shares = [pa.array([], pa.string())], [np.zeros(0)]
    for rows in stream_table(separation, ("image_id", "kind")):
        kinds, owner = (
            pc.list_flatten(rows["kind"]),
            pc.list_parent_indices(rows["kind"]).to_numpy(),
        )
        total, consistent, theirs = (
            np.bincount(
                owner, pc.is_in(kinds, value_set=pa.array(some)).to_numpy(), len(rows)
            )
            for some in (KINDS, KINDS[:1], PEOPLE)
        )
        ids += rows["image_id"].filter(pa.array(theirs == 0)).chunks
        shares.append(
            np.round(
                1
                - np.divide(consistent, total, out=np.ones(len(rows)), where=total > 0),
                DIGITS,
            )[theirs == 0]
        )
    return pa.concat_arrays(ids), np.concatenate(shares)


def _review(
    image: Mapping[str, Any],
    shared: int,
    row: Mapping[str, Any],
    classes: Sequence[str],
) -> Review:
    cloud, clip = (
        zip(row[f"{who}_labels"], row[f"{who}_probs"], strict=True)
        for who in ("cloud", "clip")
    )
    boxes = [
        _box(box, kind, _said(*ours, classes), _said(*theirs, classes))
        for box, kind, ours, theirs in zip(
            row["boxes"], row["kind"], cloud, clip, strict=True
        )
    ]
    name = "/".join(image["uri"].split("/")[shared:])
    return Review(
        image["image_id"],
        image["uri"],
        name,
        image["width"],
        image["height"],
        tuple(boxes),
    )


def _box(
    box: Sequence[float], kind: str, cloud: tuple[str, float], clip: tuple[str, float]
) -> ReviewedBox:
    """``cloud`` and ``clip``: name and its probability; of a private box only ``cloud``
    counts, and may be either teacher's.
    """
    left, top, right, bottom = (float(edge) for edge in box)
    said = (
        f"{cloud[0]} {cloud[1]:.2f}"
        if kind == "private"
        else f"cloud {cloud[0]} {cloud[1]:.2f}, CLIP {clip[0]} {clip[1]:.2f}"
    )
    return ReviewedBox((left, top, right, bottom), cloud[0], kind, said)


def _said(
    label: int, probs: Sequence[float], classes: Sequence[str]
) -> tuple[str, float]:
    """The name and its part of ``probs`` [K+1], background last."""
    return (*classes, "background")[label], float(probs[label])


def _shared(uris: pa.ChunkedArray) -> int:
    """Parts of the path of the folder that holds all of the files: what comes after
    them tells the files apart.
    """
    if not len(uris):
        return 0
    first, last = (
        pc.min_max(uris)[name].as_py().rsplit("/", 1)[0].split("/")
        for name in ("min", "max")
    )
    return next(
        (
            n
            for n, (one, other) in enumerate(zip(first, last, strict=False))
            if one != other
        ),
        min(len(first), len(last)),
    )
