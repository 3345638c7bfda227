"""Corrections: images whose labels a person has reviewed, as exports of review tools or
as a labelled folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from coin_ray import storage
from coin_ray.data.formats import IMAGE_SUFFIXES, ImageRecord, read_dataset
from coin_ray.data.formats.folder import DatasetFolder
from coin_ray.data.review.cvat import read_cvat
from coin_ray.data.review.fiftyone import is_fiftyone, read_fiftyone
from coin_ray.data.review.label_studio import read_label_studio
from coin_ray.data.review.reviews import Review, ReviewedBox
from coin_ray.data.threads import map_in_threads
from coin_ray.errors import InputError

FILE_READERS = {".json": read_label_studio, ".xml": read_cvat, ".zip": read_cvat}
TOLERANCE = 1.0
"""Pixels a box may lie outside its image: tools round."""
SHOWN_PROBLEMS = 5
DIGEST_LENGTH = 16


def read_reviews(address: str) -> list[Review]:
    """Read a JSON export of Label Studio, an export of CVAT (.xml or .zip), a folder
    exported by FiftyOne, or any labelled folder.

    Annotated images of a folder count as reviewed; their ids are those of their bytes.
    Raises InputError for an export that can't be read.
    """
    address = storage.absolute_uri(address)
    reader = FILE_READERS.get(address[address.rfind(".") :].lower())
    if reader is not None and storage.exists(address):
        return reader(address)
    if is_fiftyone(address):
        return read_fiftyone(address)
    records = [record for record in read_dataset(address).records if record.annotated]
    return map_in_threads(_review_of_record, records)


def _review_of_record(record: ImageRecord) -> Review:
    boxes = []
    rows = zip(record.boxes.tolist(), record.labels, record.difficult, strict=True)
    for (x1, y1, x2, y2), label, difficult in rows:
        if not difficult:
            boxes.append(ReviewedBox((x1, y1, x2, y2), label))
    return Review(
        hashlib.sha256(storage.read_bytes(record.uri)).hexdigest(),
        record.uri,
        record.file,
        record.width,
        record.height,
        tuple(boxes),
        reviewed=True,
    )


def reviews_digest(address: str) -> str:
    """Return sixteen hex digits that change with what ``read_reviews`` would return; of
    images in a folder names and sizes count. Empty if ``address`` does not exist.
    """
    address = storage.absolute_uri(address)
    try:
        if address.lower().endswith(tuple(FILE_READERS)):
            return storage.sha256(address)[:DIGEST_LENGTH]
        folder = DatasetFolder.open(address)
    except (OSError, InputError):
        return ""
    digest = hashlib.sha256(folder.split.encode())
    sizes = storage.file_sizes(folder.root)
    size_by_path = {name.strip("/"): size for name, size in sizes.items()}
    for path, uri in sorted(folder.uris.items()):
        is_image = path.lower().endswith(IMAGE_SUFFIXES)
        bare_uri = uri.rpartition("://")[2].strip("/")
        version = str(size_by_path[bare_uri]) if is_image else storage.sha256(uri)
        digest.update(f"{path}\0{version}\0".encode())
    return digest.hexdigest()[:DIGEST_LENGTH]


def correction_rows(
    reviews: Iterable[Review],
    images: Mapping[str, Mapping[str, Any]],
    indexes: Mapping[str, int],
    source: str,
) -> list[dict[str, Any]]:
    """Return rows ``image_id``, ``boxes`` (within the image), ``labels`` of the
    reviewed images.

    ``images``: rows of ``tables.IMAGES`` by id. ``indexes``: number of the class by
    name. ``source``: name of the corrections in messages. Raises InputError naming the
    reviews that do not fit the run.
    """
    rows: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    for review in reviews:
        if not review.reviewed:
            continue
        review_problems = _problems(review, images.get(review.image_id), indexes)
        if review.image_id in rows:
            review_problems.append(f"{review.name} is in it twice")
        problems += review_problems
        if not review_problems:
            rows[review.image_id] = _row(review, indexes)
    if problems:
        listed = "; ".join(problems[:SHOWN_PROBLEMS])
        hidden_count = len(problems) - SHOWN_PROBLEMS
        suffix = f"; and {hidden_count} more" if hidden_count > 0 else ""
        raise InputError(f"corrections {source}: {listed}{suffix}")
    if not rows:
        raise InputError(
            f"corrections {source}: no image in it is marked as reviewed"
            " (docs/own-data.md says how)"
        )
    return list(rows.values())


def _problems(
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
    problems = [
        f"{review.name} has a {name!r}, which is no class of this run"
        for name in sorted({box.label for box in review.boxes} - indexes.keys())
    ]
    for box in review.boxes:
        if problem := _box_problem(box, size):
            edges = [round(edge, 1) for edge in box.edges]
            problems.append(f"{review.name}: the box {box.label} {edges} {problem}")
    return problems


def _box_problem(box: ReviewedBox, size: tuple[int, int]) -> str:
    x1, y1, x2, y2 = box.edges
    width, height = size
    if x2 <= x1 or y2 <= y1:
        return "has no area"
    starts_inside = min(x1, y1) >= -TOLERANCE
    ends_inside = x2 <= width + TOLERANCE and y2 <= height + TOLERANCE
    if not (starts_inside and ends_inside):
        return f"is not inside the image of {width} x {height}"
    return ""


def _row(review: Review, indexes: Mapping[str, int]) -> dict[str, Any]:
    size = review.width, review.height
    return {
        "image_id": review.image_id,
        "boxes": [_clip_edges(box.edges, size) for box in review.boxes],
        "labels": [indexes[box.label] for box in review.boxes],
    }


def _clip_edges(edges: Sequence[float], size: tuple[int, int]) -> list[float]:
    limits = (*size, *size)
    return [
        min(max(edge, 0.0), float(limit))
        for edge, limit in zip(edges, limits, strict=True)
    ]
