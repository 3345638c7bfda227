"""FiftyOne: a folder with ``samples.json`` and the images, as its LegacyFiftyOneDataset
reads it; FiftyOneDataset exports are read too.

Each box has the fields ``kind`` and ``teachers``, each image counts of the kinds and
the disagreement, to sort and filter by. Boxes are left, top, width, height in shares of
the image. Whoever has reviewed an image gives it the tag ``reviewed``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter

from coin_ray import storage
from coin_ray.data.formats.parsing import read_validated_json
from coin_ray.data.review.regions import (
    check_shown_images,
    read_regions,
    validate_entry,
)
from coin_ray.data.review.reviews import KINDS, Review, ReviewedBox
from coin_ray.data.threads import map_in_threads
from coin_ray.errors import InputError
from coin_ray.storage import JsonObject

FILE = "samples.json"
TAG = "reviewed"


@dataclass(frozen=True, slots=True)
class _Detection:
    label: str
    bounding_box: tuple[float, float, float, float]
    kind: str | None = None
    teachers: str | None = None


@dataclass(frozen=True, slots=True)
class _Detections:
    detections: list[JsonObject]


@dataclass(frozen=True, slots=True)
class _Sample:
    image_id: str
    pixels_wide: int
    pixels_high: int
    uri: str = ""
    name: str = ""
    ground_truth: _Detections | None = None


@dataclass(frozen=True, slots=True)
class _File:
    samples: list[JsonObject]


FOLDER = TypeAdapter(_File)
SAMPLE = TypeAdapter(_Sample)
DETECTION = TypeAdapter(_Detection)


def write_fiftyone(reviews: Sequence[Review], folder: str) -> None:
    """Write ``samples.json`` and copies of the images in ``data/``."""

    def copy_image(review: Review) -> None:
        target = storage.join(folder, "data", review.name)
        storage.write_bytes(target, storage.read_bytes(review.uri))

    map_in_threads(copy_image, reviews)
    samples = {"samples": [fiftyone_sample(review) for review in reviews]}
    uri = storage.join(folder, FILE)
    storage.write_bytes(uri, json.dumps(samples, indent=1).encode())


def fiftyone_sample(review: Review) -> JsonObject:
    """Convert a review to a sample of FiftyOne with the field ``ground_truth``."""
    boxes = [_detection(review, box) for box in review.boxes]
    return {
        "filepath": f"data/{review.name}",
        "tags": [TAG] if review.reviewed else [],
        "image_id": review.image_id,
        "uri": review.uri,
        "name": review.name,
        "pixels_wide": review.width,
        "pixels_high": review.height,
        "disagreement": float(review.disagreement),
        **review.counts,
        "ground_truth": {"_cls": "Detections", "detections": boxes},
    }


def _detection(review: Review, box: ReviewedBox) -> JsonObject:
    x1, y1, x2, y2 = box.edges
    shares = [
        x1 / review.width,
        y1 / review.height,
        (x2 - x1) / review.width,
        (y2 - y1) / review.height,
    ]
    detection = {"_cls": "Detection", "label": box.label, "bounding_box": shares}
    if box.kind:
        detection |= {"kind": box.kind, "teachers": box.teacher_labels}
    return detection


def is_fiftyone(folder: str) -> bool:
    """Tell whether the folder is an export of FiftyOne."""
    return storage.exists(storage.join(folder, FILE))


def read_fiftyone(folder: str) -> list[Review]:
    """Read a folder that FiftyOne exported from samples of ``write_fiftyone``.

    A detection of a reviewed sample that can't be read is a problem of that image.
    So is a field ``ground_truth`` that holds no list of detections. Samples that nobody
    reviewed and that can't be read are left out. Raises InputError if there is no
    sample that ``write_fiftyone`` wrote, and if samples show each other's images.
    """
    uri = storage.join(folder, FILE)
    description = "a FiftyOne dataset that coin_ray wrote"
    export: _File = read_validated_json(FOLDER, uri, description)
    reviews: list[Review] = []
    problems = []
    paths = []
    for number, sample in enumerate(export.samples):
        where = f"{uri}: samples.{number}"
        tags = sample.get("tags")
        reviewed = isinstance(tags, list) and TAG in tags
        try:
            reviews.append(_review(sample, reviewed, where))
            paths.append(str(sample.get("filepath") or ""))
        except InputError as error:
            problems.append(str(error))
            if reviewed:
                paths.append("")
                name = str(sample.get("name") or f"samples.{number}")
                reviews.append(
                    Review("", "", name, 0, 0, reviewed=True, problems=(str(error),))
                )
    if problems and not any(review.image_id for review in reviews):
        raise InputError(problems[0])
    check_shown_images(reviews, paths, uri)
    return reviews


def _review(entry: JsonObject, reviewed: bool, where: str) -> Review:
    sample = validate_entry(SAMPLE, entry, where)
    width, height = sample.pixels_wide, sample.pixels_high
    if min(width, height) < 1:
        raise InputError(
            f"{where}: an image needs pixels_wide and pixels_high; got {width} x"
            f" {height}"
        )
    detections: list[JsonObject] = []
    if sample.ground_truth is not None:
        detections = sample.ground_truth.detections
    elif reviewed:
        raise InputError(
            f"{where}: expected a reviewed sample with detections in its field"
            " 'ground_truth', got none: export that field (an image without objects"
            " has an empty list of detections)"
        )

    def read_detection(numbered: tuple[int, JsonObject]) -> tuple[ReviewedBox, str]:
        number, entry = numbered
        detection = validate_entry(DETECTION, entry, f"{where}.detections.{number}")
        return _box(detection, width, height), ""

    regions = read_regions(enumerate(detections), read_detection)
    return Review(
        sample.image_id,
        sample.uri,
        sample.name,
        width,
        height,
        regions.boxes,
        reviewed,
        regions.problems,
    )


def _box(detection: _Detection, width: int, height: int) -> ReviewedBox:
    x1, y1, box_width, box_height = detection.bounding_box
    edges = (
        x1 * width,
        y1 * height,
        (x1 + box_width) * width,
        (y1 + box_height) * height,
    )
    if detection.kind not in KINDS:
        return ReviewedBox(edges, detection.label)
    teacher_labels = detection.teachers or ""
    return ReviewedBox(edges, detection.label, detection.kind, teacher_labels)
