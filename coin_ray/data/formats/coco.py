"""COCO detection: ``annotations.json`` beside ``images/``, ``_annotations.coco.json``
among the images, or ``annotations/instances_SPLIT.json``.

Boxes are (left, top, width, height) from 0. Crowds count as difficult.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from coin_ray import storage
from coin_ray.data.formats.folder import IMAGE_SUFFIXES, DatasetFolder
from coin_ray.data.formats.parsing import image_size, read_validated_json
from coin_ray.data.formats.record import (
    Annotation,
    Dataset,
    ImageRecord,
    collect_class_names,
)
from coin_ray.data.threads import map_in_threads
from coin_ray.errors import InputError

Key = int | str
SINGLE_FILES = ("annotations.json", "_annotations.coco.json")


@dataclass(frozen=True, slots=True)
class _Image:
    id: Key
    file_name: str
    width: int | None = None
    height: int | None = None


@dataclass(frozen=True, slots=True)
class _Box:
    image_id: Key
    category_id: Key
    bbox: tuple[float, float, float, float]
    iscrowd: int | None = None


@dataclass(frozen=True, slots=True)
class _Category:
    id: Key
    name: str


@dataclass(frozen=True, slots=True)
class _File:
    images: list[_Image]
    annotations: list[_Box]
    categories: list[_Category]


FILE = TypeAdapter(_File)


def is_coco(folder: DatasetFolder) -> bool:
    """Tell whether the folder is in the COCO format."""
    has_single_file = any(name in folder.uris for name in SINGLE_FILES)
    return has_single_file or bool(_labels_by_split(folder))


def _labels_by_split(folder: DatasetFolder) -> dict[str, str]:
    stems = folder.paths_by_stem("annotations", ".json")
    paths_by_split = {stem: path for stem, path in stems.items() if "/" not in stem}
    instances = {
        stem.removeprefix("instances_"): path
        for stem, path in paths_by_split.items()
        if stem.startswith("instances_")
    }
    return instances or paths_by_split


def read_coco(folder: DatasetFolder) -> Dataset:
    """Read a COCO folder. Images that a single file does not list count as without
    objects. Raises InputError naming file and entry.
    """
    single_file = next((name for name in SINGLE_FILES if name in folder.uris), None)
    if single_file is not None and not folder.split:
        return _read_labels(folder, single_file, "images", include_unlisted=True)
    paths_by_split = _labels_by_split(folder)
    paths = folder.select_split(paths_by_split, "annotations/instances_*.json")
    if len(paths) != 1:
        splits = " or ".join(f"{folder.root}#{name}" for name in sorted(paths_by_split))
        raise InputError(
            f"{folder.root} has several annotation files; say which: {splits}"
        )
    [path] = paths
    split = next(name for name, other in paths_by_split.items() if other == path)
    return _read_labels(folder, path, split, include_unlisted=False)


def _read_labels(
    folder: DatasetFolder, path: str, image_folder: str, include_unlisted: bool
) -> Dataset:
    uri = folder.uris[path]
    labels = read_validated_json(FILE, uri, "COCO json")
    annotations = _annotations_by_image(labels, uri)
    folders = (image_folder, f"images/{image_folder}", "images", "")
    paths = {
        image.id: folder.find_image(image.file_name, *folders)
        for image in labels.images
    }

    def read_record(image: _Image) -> ImageRecord | None:
        image_path = paths[image.id]
        if image_path is None:
            return None
        image_uri = folder.uris[image_path]
        if image.width and image.height:
            size = image.width, image.height
        else:
            size = image_size(image_uri)
        return ImageRecord.from_annotations(
            image.file_name, image_uri, size, annotations[image.id]
        )

    optional_records = map_in_threads(read_record, labels.images)
    records = [record for record in optional_records if record is not None]
    if include_unlisted:
        image_paths = set(folder.list_paths("", *IMAGE_SUFFIXES))
        unlisted = sorted(image_paths - set(paths.values()))
        records += map_in_threads(lambda path: _read_unlisted(folder, path), unlisted)
    names = [category.name.strip() for category in labels.categories]
    missing = tuple(
        image.file_name for image in labels.images if paths[image.id] is None
    )
    return Dataset("coco", tuple(records), collect_class_names(records, names), missing)


def _read_unlisted(folder: DatasetFolder, path: str) -> ImageRecord:
    uri, file = folder.uris[path], path.removeprefix("images/")
    return ImageRecord.from_annotations(file, uri, image_size(uri), [])


def _annotations_by_image(labels: _File, uri: str) -> dict[Key, list[Annotation]]:
    names = {category.id: category.name.strip() for category in labels.categories}
    annotations: dict[Key, list[Annotation]] = {image.id: [] for image in labels.images}
    for position, box in enumerate(labels.annotations):
        if box.category_id not in names:
            raise _unknown_id(uri, position, "category_id", box.category_id)
        if box.image_id not in annotations:
            raise _unknown_id(uri, position, "image_id", box.image_id)
        x1, y1, width, height = box.bbox
        edges = (x1, y1, x1 + width, y1 + height)
        annotation = Annotation(edges, names[box.category_id], bool(box.iscrowd))
        annotations[box.image_id].append(annotation)
    return annotations


def _unknown_id(uri: str, position: int, field: str, key: Key) -> InputError:
    return InputError(
        f"{uri} is not COCO json: annotations.{position}.{field} {key!r} is not in the"
        " file"
    )


def write_coco(records: Sequence[ImageRecord], root: str, names: Sequence[str]) -> None:
    """Write one ``annotations.json``, without images that are not annotated."""
    category_ids = {name: number for number, name in enumerate(names, start=1)}
    annotated = [record for record in records if record.annotated]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, record in enumerate(annotated, start=1):
        image = {"id": image_id, "file_name": record.file}
        images.append(image | {"width": record.width, "height": record.height})
        rows = zip(record.boxes.tolist(), record.labels, record.difficult, strict=True)
        for (x1, y1, x2, y2), label, difficult in rows:
            width, height = x2 - x1, y2 - y1
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_ids[label],
                    "bbox": [x1, y1, width, height],
                    "area": width * height,
                    "iscrowd": int(difficult),
                }
            )
    categories = [{"id": number, "name": name} for name, number in category_ids.items()]
    labels = {"images": images, "annotations": annotations, "categories": categories}
    uri = storage.join(root, "annotations.json")
    storage.write_bytes(uri, json.dumps(labels).encode())
