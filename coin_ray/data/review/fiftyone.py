"""FiftyOne: a folder with ``samples.json`` and the images, as its LegacyFiftyOneDataset
reads it; FiftyOneDataset exports are read too.

Each box has the fields ``kind`` and ``teachers``, each image counts of the kinds and
the disagreement, to sort and filter by. Boxes are left, top, width, height in shares of
the image. Whoever has looked at an image gives it the tag ``reviewed``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from coin_ray import storage
from coin_ray.data.formats.record import map_in_threads, read_validated_json
from coin_ray.data.review.record import KINDS, Review, ReviewedBox
from coin_ray.errors import InputError

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
    detections: list[_Detection] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Sample:
    image_id: str
    pixels_wide: int
    pixels_high: int
    uri: str = ""
    name: str = ""
    tags: list[str] = field(default_factory=list)
    ground_truth: _Detections | None = None


@dataclass(frozen=True, slots=True)
class _File:
    samples: list[_Sample]


FOLDER = TypeAdapter(_File)


def write_fiftyone(reviews: Sequence[Review], folder: str) -> None:
    """``samples.json`` and copies of the images in ``data/``."""
    map_in_threads(
        lambda r: storage.write_bytes(
            storage.join(folder, "data", r.name), storage.read_bytes(r.uri)
        ),
        reviews,
    )
    content = {"samples": [fiftyone_sample(review) for review in reviews]}
    storage.write_bytes(
        storage.join(folder, FILE), json.dumps(content, indent=1).encode()
    )


def fiftyone_sample(review: Review) -> dict[str, Any]:
    """What FiftyOne calls a sample, with the field ``ground_truth``."""
    known = {
        "image_id": review.image_id,
        "uri": review.uri,
        "name": review.name,
        "pixels_wide": review.width,
        "pixels_high": review.height,
    }
    boxes = [_detection(review, box) for box in review.boxes]
    return {
        "filepath": f"data/{review.name}",
        "tags": [TAG] if review.reviewed else [],
        **known,
        "disagreement": float(review.disagreement),
        **review.counts,
        "ground_truth": {"_cls": "Detections", "detections": boxes},
    }


def _detection(review: Review, box: ReviewedBox) -> dict[str, Any]:
    left, top, right, bottom = box.edges
    width, height = review.width, review.height
    told = {"kind": box.kind, "teachers": box.said} if box.kind else {}
    place = [
        left / width,
        top / height,
        (right - left) / width,
        (bottom - top) / height,
    ]
    return {"_cls": "Detection", "label": box.label, "bounding_box": place, **told}


def is_fiftyone(place: str) -> bool:
    return storage.exists(storage.join(place, FILE))


def read_fiftyone(place: str) -> list[Review]:
    """A folder that was exported from what ``write_fiftyone`` made. Raises InputError naming the
    entry that is not as it should be.
    """
    uri = storage.join(place, FILE)
    content: _File = read_validated_json(
        FOLDER, uri, "a FiftyOne dataset that coin_ray wrote"
    )
    return [
        _review(found, f"{uri}: samples.{number}")
        for number, found in enumerate(content.samples)
    ]


def _review(found: _Sample, where: str) -> Review:
    width, height = found.pixels_wide, found.pixels_high
    if min(width, height) < 1:
        raise InputError(
            f"{where}: an image needs pixels_wide and pixels_high; got {width} x"
            f" {height}"
        )
    boxes = found.ground_truth.detections if found.ground_truth is not None else []
    return Review(
        found.image_id,
        found.uri,
        found.name,
        width,
        height,
        tuple(_box(b, width, height) for b in boxes),
        TAG in found.tags,
    )


def _box(found: _Detection, width: int, height: int) -> ReviewedBox:
    left, top, wide, high = found.bounding_box
    edges = (left * width, top * height, (left + wide) * width, (top + high) * height)
    return ReviewedBox(
        edges,
        found.label,
        *((found.kind, found.teachers or "") if found.kind in KINDS else ("", "")),
    )
