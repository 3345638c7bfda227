"""Corrections: images whose labels a person vouches for, as exports of review tools or
as a labelled folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from coin_ray import storage
from coin_ray.data import formats
from coin_ray.data.formats import IMAGE_SUFFIXES, ImageRecord
from coin_ray.data.formats.record import DatasetFolder, map_in_threads
from coin_ray.data.review import cvat, fiftyone, label_studio
from coin_ray.data.review.record import Review, ReviewedBox
from coin_ray.errors import InputError

FILES = {
    ".json": label_studio.read_label_studio,
    ".xml": cvat.read_cvat,
    ".zip": cvat.read_cvat,
}
OUTSIDE = 1.0
"""Pixels a box may stand out of its image: tools round."""
SHOWN = 5


def read_reviews(place: str) -> list[Review]:
    """Of a JSON export of Label Studio, an export of CVAT (.xml or .zip), a folder
    exported by FiftyOne, or any labelled folder.

    Annotated images of a folder count as reviewed; they are known by their bytes.
    Raises InputError for what can't be read.
    """
    place = storage.absolute_uri(place)
    reader = FILES.get(place[place.rfind(".") :].lower())
    if reader is not None and storage.exists(place):
        return reader(place)
    if fiftyone.is_fiftyone(place):
        return fiftyone.read_fiftyone(place)
    records = [
        record for record in formats.read_dataset(place).records if record.annotated
    ]
    return map_in_threads(_review, records)


def _review(record: ImageRecord) -> Review:
    image_id = hashlib.sha256(storage.read_bytes(record.uri)).hexdigest()
    kept = [n for n, difficult in enumerate(record.difficult) if not difficult]
    left = record.boxes[kept].tolist()
    boxes = tuple(
        ReviewedBox((a, b, c, d), record.labels[n])
        for n, (a, b, c, d) in zip(kept, left, strict=True)
    )
    return Review(
        image_id,
        record.uri,
        record.file,
        record.width,
        record.height,
        boxes,
        reviewed=True,
    )


def reviews_digest(place: str) -> str:
    """Sixteen hex digits that change with what ``read_dataset`` would find; of images in a
    folder names and sizes count. Empty if it is not there.
    """
    place = storage.absolute_uri(place)
    try:
        if place.lower().endswith(tuple(FILES)):
            return storage.sha256(place)[:16]
        opened = DatasetFolder.open(place)
    except (OSError, InputError):
        return ""
    found = hashlib.sha256(opened.split.encode())
    sizes = storage.file_sizes(opened.root)
    for (path, uri), size in zip(
        sorted(opened.uris.items()),
        (sizes[name] for name in sorted(sizes)),
        strict=True,
    ):
        said = (
            str(size) if path.lower().endswith(IMAGE_SUFFIXES) else storage.sha256(uri)
        )
        found.update(f"{path}\0{said}\0".encode())
    return found.hexdigest()[:16]


def correction_rows(
    reviews: Iterable[Review],
    images: Mapping[str, Mapping[str, Any]],
    indexes: Mapping[str, int],
    place: str,
) -> list[dict[str, Any]]:
    """Rows ``image_id``, ``boxes`` (within the image), ``cvat_labels`` of the reviewed
    images.

    ``images``: rows of ``tables.IMAGES`` by id. ``indexes``: number of the class by
    name. Raises InputError naming what does not fit the run.
    """
    rows: dict[str, dict[str, Any]] = {}
    faults: list[str] = []
    for review in (r for r in reviews if r.reviewed):
        wrong = _faults(review, images.get(review.image_id), indexes)
        wrong += [f"{review.name} is in it twice"] if review.image_id in rows else []
        faults += wrong
        if not wrong:
            rows[review.image_id] = _row(review, indexes)
    if faults:
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise InputError(f"corrections {place}: {'; '.join(faults[:SHOWN])}{more}")
    if not rows:
        raise InputError(
            f"corrections {place}: no image in it is marked as reviewed"
            " (docs/own-data.md says how)"
        )
    return list(rows.values())


def _faults(
    review: Review, image: Mapping[str, Any] | None, indexes: Mapping[str, int]
) -> list[str]:
    if image is None:
        return [
            f"{review.name} is no image of this run: expected one of its training"
            " images, as the run read them"
        ]
    if image["split"] != "train":
        return [
            f"{review.name} is a {image['split']} image of this run; only training"
            " images can be corrected"
        ]
    size = image["width"], image["height"]
    if (review.width, review.height) != size:
        return [
            f"{review.name} is {size[0]} x {size[1]}, its corrections are for"
            f" {review.width} x {review.height}"
        ]
    unknown = sorted({box.label for box in review.boxes} - indexes.keys())
    faults = [
        f"{review.name} has a {name!r}, which is no class of this run"
        for name in unknown
    ]
    return faults + [
        f"{review.name}: the box {box.label} {_shown(box.edges)} {wrong}"
        for box in review.boxes
        if (wrong := _off(box, size))
    ]


def _off(box: ReviewedBox, size: tuple[int, int]) -> str:
    left, top, right, bottom = box.edges
    if right <= left or bottom <= top:
        return "has no area"
    if (
        min(left, top) < -OUTSIDE
        or right > size[0] + OUTSIDE
        or bottom > size[1] + OUTSIDE
    ):
        return f"is not inside the image of {size[0]} x {size[1]}"
    return ""


def _row(review: Review, indexes: Mapping[str, int]) -> dict[str, Any]:
    limits = (review.width, review.height) * 2
    boxes = [
        [
            min(max(edge, 0.0), float(limit))
            for edge, limit in zip(box.edges, limits, strict=True)
        ]
        for box in review.boxes
    ]
    return {
        "image_id": review.image_id,
        "boxes": boxes,
        "labels": [indexes[box.label] for box in review.boxes],
    }


def _shown(edges: Sequence[float]) -> list[float]:
    return [round(edge, 1) for edge in edges]
