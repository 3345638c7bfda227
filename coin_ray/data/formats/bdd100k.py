"""BDD100K (Scalabel): ``labels/det_20/det_SPLIT.json`` or
``labels/bdd100k_labels_images_SPLIT.json``, images below ``images/``.

Split ``SPLIT_daytime`` keeps the images whose ``timeofday`` is that word. ``box2d`` is
taken as edges, as its decimals are: Scalabel's own conversion to COCO makes boxes a
pixel wider and higher. Crowds count as difficult. Names of the two releases are read as
one: bike, motor and pedestrian are bicycle, motorcycle and person.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import TypeAdapter

from coin_ray import storage
from coin_ray.data.formats.record import (
    Annotation,
    Dataset,
    DatasetFolder,
    ImageRecord,
    collect_class_names,
    image_size,
    map_in_threads,
    read_validated_json,
)

STARTS = ("det_", "bdd100k_labels_images_")
OTHER_NAMES = {"bike": "bicycle", "motor": "motorcycle", "pedestrian": "person"}
TIMES = ("daytime", "night", "dawn/dusk")


@dataclass(frozen=True, slots=True)
class _Box2d:
    x1: float
    y1: float
    x2: float
    y2: float


@dataclass(frozen=True, slots=True)
class _Label:
    category: str
    box2d: _Box2d | None = None
    attributes: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class _Frame:
    name: str
    labels: list[_Label] | None = None
    attributes: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class _Frames:
    frames: list[_Frame] = field(default_factory=list)


LIST, FRAMES = TypeAdapter(list[_Frame]), TypeAdapter(_Frames)


def is_bdd100k(place: DatasetFolder) -> bool:
    return bool(_by_split(place))


def _by_split(place: DatasetFolder) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in (
        p for p in place.below("", ".json") if p.startswith("labels/") or "/" not in p
    ):
        name = path.rpartition("/")[2].removesuffix(".json")
        found.update(
            {
                name.removeprefix(start): path
                for start in STARTS
                if name.startswith(start)
            }
        )
    return found


def read_bdd100k(place: DatasetFolder) -> Dataset:
    """Images that no file lists are left out; of two files for one split the later
    release counts. Raises InputError naming file and entry.
    """
    split, _, time = place.split.partition("_")
    if time not in TIMES:
        split, time = place.split, ""
    paths = replace(place, split=split).choose(
        _by_split(place), "det_*.json or bdd100k_labels_images_*.json"
    )
    frames = [frame for path in paths for frame in _frames(place.uris[path])]
    frames = [
        f for f in frames if not time or (f.attributes or {}).get("timeofday") == time
    ]
    files = {
        frame.name: place.image(
            frame.name,
            *(f"images/100k/{s}" for s in ([split] if split else _by_split(place))),
        )
        for frame in frames
    }

    def record(frame: _Frame) -> ImageRecord | None:
        at = files[frame.name]
        return (
            None
            if at is None
            else ImageRecord.of(
                frame.name,
                place.uris[at],
                image_size(place.uris[at]),
                _annotations(frame),
            )
        )

    records = tuple(r for r in map_in_threads(record, frames) if r is not None)
    return Dataset(
        "bdd100k",
        records,
        collect_class_names(records),
        tuple(name for name, at in files.items() if at is None),
    )


def _frames(uri: str) -> list[_Frame]:
    if storage.read_bytes(uri).lstrip()[:1] == b"{":
        return read_validated_json(FRAMES, uri, "BDD100K json").frames
    return read_validated_json(LIST, uri, "BDD100K json")


def _annotations(frame: _Frame) -> list[Annotation]:
    """Lanes and areas have no box2d and are left out."""
    return [
        Annotation(
            (label.box2d.x1, label.box2d.y1, label.box2d.x2, label.box2d.y2),
            OTHER_NAMES.get(label.category.strip(), label.category.strip()),
            bool((label.attributes or {}).get("crowd", False)),
        )
        for label in frame.labels or ()
        if label.box2d is not None
    ]


def write_bdd100k(records: Sequence[ImageRecord], root: str, split: str) -> None:
    """Images that are not annotated are left out."""
    content = [{"name": r.file, "labels": _labels(r)} for r in records if r.annotated]
    storage.write_bytes(
        storage.join(root, "labels/det_20", f"det_{split}.json"),
        json.dumps(content).encode(),
    )


def _labels(record: ImageRecord) -> list[dict[str, Any]]:
    rows = zip(record.boxes.tolist(), record.labels, record.difficult, strict=True)
    return [
        {
            "id": str(place),
            "category": label,
            "attributes": {"crowd": bool(difficult)},
            "box2d": dict(zip(("x1", "y1", "x2", "y2"), box, strict=True)),
        }
        for place, (box, label, difficult) in enumerate(rows)
    ]
