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
from coin_ray.data.formats.folder import DatasetFolder
from coin_ray.data.formats.parsing import image_size, read_validated_json
from coin_ray.data.formats.record import (
    Annotation,
    Dataset,
    ImageRecord,
    collect_class_names,
)
from coin_ray.data.threads import map_in_threads

LABEL_PREFIXES = ("det_", "bdd100k_labels_images_")
NAME_OF_ALIAS = {"bike": "bicycle", "motor": "motorcycle", "pedestrian": "person"}
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


FRAME_LIST = TypeAdapter(list[_Frame])
FRAMES = TypeAdapter(_Frames)
FORMAT = "BDD100K json"


def is_bdd100k(folder: DatasetFolder) -> bool:
    """Tell whether the folder is in the BDD100K format."""
    return bool(_labels_by_split(folder))


def _labels_by_split(folder: DatasetFolder) -> dict[str, str]:
    paths_by_split: dict[str, str] = {}
    for path in folder.list_paths("", ".json"):
        if "/" in path and not path.startswith("labels/"):
            continue
        name = path.rpartition("/")[2].removesuffix(".json")
        for prefix in LABEL_PREFIXES:
            if name.startswith(prefix):
                paths_by_split[name.removeprefix(prefix)] = path
    return paths_by_split


def read_bdd100k(folder: DatasetFolder) -> Dataset:
    """Read a BDD100K folder. Images that no file lists are left out; of two files for
    one split the later release counts.

    Raises InputError naming file and entry.
    """
    split, _, time = folder.split.partition("_")
    if time not in TIMES:
        split, time = folder.split, ""
    paths_by_split = _labels_by_split(folder)
    label_paths = replace(folder, split=split).select_split(
        paths_by_split, "det_*.json or bdd100k_labels_images_*.json"
    )
    frames: list[_Frame] = []
    for path in label_paths:
        frames += _read_frames(folder.uris[path])
    if time:
        frames = [frame for frame in frames if _time_of_day(frame) == time]
    splits = [split] if split else list(paths_by_split)
    image_folders = [f"images/100k/{name}" for name in splits]
    path_by_name = {
        frame.name: folder.find_image(frame.name, *image_folders) for frame in frames
    }

    def read_record(frame: _Frame) -> ImageRecord | None:
        path = path_by_name[frame.name]
        if path is None:
            return None
        uri = folder.uris[path]
        return ImageRecord.from_annotations(
            frame.name, uri, image_size(uri), _annotations(frame)
        )

    optional_records = map_in_threads(read_record, frames)
    records = tuple(record for record in optional_records if record is not None)
    missing = tuple(name for name, path in path_by_name.items() if path is None)
    return Dataset("bdd100k", records, collect_class_names(records), missing)


def _read_frames(uri: str) -> list[_Frame]:
    """Read a file of either release: an object with frames, or a list of them."""
    if storage.read_bytes(uri).lstrip()[:1] == b"{":
        return read_validated_json(FRAMES, uri, FORMAT).frames
    return read_validated_json(FRAME_LIST, uri, FORMAT)


def _time_of_day(frame: _Frame) -> Any:
    return (frame.attributes or {}).get("timeofday")


def _annotations(frame: _Frame) -> list[Annotation]:
    """Convert the labels with a box; lanes and areas have none."""
    annotations = []
    for label in frame.labels or ():
        if label.box2d is None:
            continue
        box = (label.box2d.x1, label.box2d.y1, label.box2d.x2, label.box2d.y2)
        category = label.category.strip()
        name = NAME_OF_ALIAS.get(category, category)
        crowd = bool((label.attributes or {}).get("crowd", False))
        annotations.append(Annotation(box, name, crowd))
    return annotations


def write_bdd100k(records: Sequence[ImageRecord], root: str, split: str) -> None:
    """Write the label file of the split, without images that are not annotated."""
    frames = [
        {"name": record.file, "labels": _labels(record)}
        for record in records
        if record.annotated
    ]
    uri = storage.join(root, "labels/det_20", f"det_{split}.json")
    storage.write_bytes(uri, json.dumps(frames).encode())


def _labels(record: ImageRecord) -> list[dict[str, Any]]:
    rows = zip(record.boxes.tolist(), record.labels, record.difficult, strict=True)
    return [
        {
            "id": str(number),
            "category": label,
            "attributes": {"crowd": bool(difficult)},
            "box2d": dict(zip(("x1", "y1", "x2", "y2"), box, strict=True)),
        }
        for number, (box, label, difficult) in enumerate(rows)
    ]
