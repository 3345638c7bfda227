"""BDD100K (Scalabel): ``labels/det_20/det_SPLIT.json`` or
``labels/bdd100k_labels_images_SPLIT.json``, images below ``images/``.

Split ``SPLIT_daytime`` keeps the images whose ``timeofday`` is that word. ``box2d`` is
taken as edges, as its decimals are: Scalabel's own conversion to COCO makes boxes a
pixel wider and higher. Crowds count as difficult. Names of the two releases are read as
one: bike, motor and pedestrian are bicycle, motorcycle and person. As the detection
benchmark does, van and caravan are read as car; other person, other vehicle and trailer
as person, car and truck, all of them difficult. A file for each image is read too:
``labels/SPLIT/NAME.json``.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from pydantic import TypeAdapter

from coin_ray.data.formats.conventions import CORNERS, check_records
from coin_ray.data.formats.folder import DatasetFolder
from coin_ray.data.formats.parsing import (
    image_size,
    parse_flag,
    read_head,
    read_validated_json,
)
from coin_ray.data.formats.record import (
    Annotation,
    Dataset,
    ImageRecord,
    LeftOut,
    UnreadableLabels,
    check_readable,
    collect_class_names,
)
from coin_ray.data.threads import map_in_threads
from coin_ray.errors import InputError
from coin_ray.storage import JsonObject

LABEL_PREFIXES = ("det_", "bdd100k_labels_images_")
NAME_OF_ALIAS = {
    "bike": "bicycle",
    "motor": "motorcycle",
    "pedestrian": "person",
    "van": "car",
    "caravan": "car",
}
NAME_OF_IGNORED = {
    "other person": "person",
    "other vehicle": "car",
    "trailer": "truck",
}
"""Classes that the benchmark neither requires nor punishes (bdd100k's det.toml)."""
TIMES = ("daytime", "night", "dawn/dusk")


@dataclass(frozen=True, slots=True)
class _Box2d:
    x1: float
    y1: float
    x2: float
    y2: float


@dataclass(frozen=True, slots=True)
class _Label:
    """A label; lanes and areas have ``poly2d`` alone."""

    category: str
    box2d: _Box2d | None = None
    poly2d: Any = None
    box3d: Any = None
    rle: Any = None
    graph: Any = None
    attributes: JsonObject | None = None


@dataclass(frozen=True, slots=True)
class _Frame:
    name: str
    labels: list[_Label] | None = None
    attributes: JsonObject | None = None


@dataclass(frozen=True, slots=True)
class _Frames:
    frames: list[_Frame] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Objects:
    objects: list[_Label]


@dataclass(frozen=True, slots=True)
class _ImageFile:
    name: str
    frames: list[_Objects]
    attributes: JsonObject | None = None


IMAGE_FILE = TypeAdapter(_ImageFile)
FRAME_LIST = TypeAdapter(list[_Frame])
FRAMES = TypeAdapter(_Frames)
FORMAT = "BDD100K json"


def is_bdd100k(folder: DatasetFolder) -> bool:
    """Tell whether the folder is in the BDD100K format."""
    return bool(_labels_by_split(folder))


def _labels_by_split(folder: DatasetFolder) -> dict[str, list[str]]:
    """Return the label files by split: one file, or a file for each image."""
    paths_by_split: dict[str, list[str]] = {}
    for path in folder.list_paths("", ".json"):
        if "/" in path and not path.startswith("labels/"):
            continue
        name = path.rpartition("/")[2].removesuffix(".json")
        for prefix in LABEL_PREFIXES:
            if name.startswith(prefix):
                paths_by_split[name.removeprefix(prefix)] = [path]
    return paths_by_split or _image_files_by_split(folder)


def _image_files_by_split(folder: DatasetFolder) -> dict[str, list[str]]:
    paths_by_folder: dict[str, list[str]] = {}
    for path in folder.list_paths("labels", ".json"):
        paths_by_folder.setdefault(path.rpartition("/")[0], []).append(path)
    paths_by_split: dict[str, list[str]] = {}
    for label_folder, paths in paths_by_folder.items():
        head = read_head(folder.uris[paths[0]])
        if b'"frames"' in head and b'"objects"' in head:
            split = label_folder.rpartition("/")[2]
            paths_by_split.setdefault(split, []).extend(paths)
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
    select = replace(folder, split=split).select_split
    select(paths_by_split, "det_*.json or bdd100k_labels_images_*.json")
    selected = {split: paths_by_split[split]} if split else paths_by_split
    for path in folder.list_paths("", ".json"):
        if path.rpartition("/")[2].startswith(LABEL_PREFIXES):
            folder.read_paths.add(path)
    folder.read_paths.update(
        path for paths in paths_by_split.values() for path in paths
    )
    datasets = [
        _read_split(folder, name, paths, time) for name, paths in selected.items()
    ]
    records = tuple(record for dataset in datasets for record in dataset.records)
    check_records(records, CORNERS, folder.root)
    return Dataset(
        "bdd100k",
        records,
        collect_class_names(records),
        tuple(name for dataset in datasets for name in dataset.missing),
        tuple(image for dataset in datasets for image in dataset.left_out),
        unreadable=tuple(
            labels for dataset in datasets for labels in dataset.unreadable
        ),
    )


def _read_split(
    folder: DatasetFolder, split: str, label_paths: Sequence[str], time: str
) -> Dataset:
    uris = [folder.uris[path] for path in label_paths]
    unreadable: list[UnreadableLabels] = []

    def read_frames(uri: str) -> list[_Frame]:
        try:
            return _read_frames(uri)
        except InputError as error:
            if len(uris) == 1:
                raise
            unreadable.append(UnreadableLabels(uri, str(error)))
        return []

    frames = list(chain.from_iterable(map_in_threads(read_frames, uris)))
    image_folder = f"images/100k/{split}"
    path_of_frame: list[str | None] = []
    name_of_path: dict[str, str] = {}
    for frame in frames:
        path = folder.find_image(frame.name, image_folder, split=split)
        path_of_frame.append(path)
        if path in name_of_path:
            raise InputError(
                f"{uris[0]}: the image {path} is listed twice, as {name_of_path[path]}"
                f" and as {frame.name}"
            )
        if path is not None:
            name_of_path[path] = frame.name
    pairs = [
        (frame, path)
        for frame, path in zip(frames, path_of_frame, strict=True)
        if not time or _time_of_day(frame) == time
    ]

    def read_record(pair: tuple[_Frame, str | None]) -> ImageRecord | None:
        frame, path = pair
        if path is None:
            return None
        uri, file = folder.uris[path], path.removeprefix(f"{image_folder}/")
        size = image_size(uri)
        try:
            is_annotated = frame.labels is not None
            return ImageRecord.from_annotations(
                file, uri, size, _annotations(frame), is_annotated
            )
        except InputError as error:
            unreadable.append(UnreadableLabels(uri, str(error)))
        return ImageRecord.from_annotations(file, uri, size, [], annotated=False)

    optional_records = map_in_threads(read_record, pairs)
    records = tuple(record for record in optional_records if record is not None)
    annotated_count = sum(record.annotated for record in records)
    return Dataset(
        "bdd100k",
        records,
        missing=tuple(frame.name for frame, path in pairs if path is None),
        left_out=tuple(
            LeftOut(folder.uris[path], f"not in the labels of {split}")
            for path in folder.list_images(image_folder)
            if path not in name_of_path
        ),
        unreadable=check_readable(unreadable, annotated_count),
    )


def _read_frames(uri: str) -> list[_Frame]:
    """Read a file of either release: an object with frames, a list of them, or the file
    of one image.
    """
    head = read_head(uri).removeprefix(codecs.BOM_UTF8).lstrip()
    if head[:1] != b"{":
        return read_validated_json(FRAME_LIST, uri, FORMAT)
    if b'"objects"' not in head:
        return read_validated_json(FRAMES, uri, FORMAT).frames
    image = read_validated_json(IMAGE_FILE, uri, FORMAT)
    labels = [label for frame in image.frames for label in frame.objects]
    return [_Frame(image.name, labels, image.attributes)]


def _time_of_day(frame: _Frame) -> Any:
    return (frame.attributes or {}).get("timeofday")


def _annotations(frame: _Frame) -> list[Annotation]:
    """Convert the labels with a box; lanes and areas have none. Raises InputError for a
    label without any place.
    """
    annotations = []
    for number, label in enumerate(frame.labels or ()):
        if label.box2d is None:
            places = (label.poly2d, label.box3d, label.rle, label.graph)
            if all(place is None for place in places):
                raise InputError(
                    f"{frame.name}: expected box2d or poly2d in label {number}"
                    f" ({label.category}), got neither"
                )
            continue
        box = (label.box2d.x1, label.box2d.y1, label.box2d.x2, label.box2d.y2)
        category = label.category.strip()
        is_ignored = category.lower() in NAME_OF_IGNORED
        name = (NAME_OF_ALIAS | NAME_OF_IGNORED).get(category.lower(), category)
        crowd = _is_crowd(label, f"{frame.name}: label {number}")
        annotations.append(Annotation(box, name, crowd or is_ignored))
    return annotations


def _is_crowd(label: _Label, where: str) -> bool:
    try:
        return parse_flag((label.attributes or {}).get("crowd"))
    except ValueError as error:
        raise InputError(f"{where}: crowd: {error}") from None


def bdd100k_files(records: Sequence[ImageRecord], split: str) -> dict[str, bytes]:
    """Return the label file of the split, without images that are not annotated. Raises
    InputError for class names that are read as others.
    """
    aliases = NAME_OF_ALIAS | NAME_OF_IGNORED
    for record in records:
        for label in record.labels:
            if label.lower() in aliases:
                raise InputError(
                    f"{record.file}: BDD100K reads the class {label!r} as"
                    f" {aliases[label.lower()]!r}; rename it or write another format"
                )
    frames = [
        {"name": record.file, "labels": _labels(record)}
        for record in records
        if record.annotated
    ]
    return {f"labels/det_20/det_{split}.json": json.dumps(frames).encode()}


def _labels(record: ImageRecord) -> list[JsonObject]:
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
