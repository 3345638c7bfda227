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
from coin_ray.data.formats.record import (
    IMAGE_SUFFIXES,
    Annotation,
    Dataset,
    DatasetFolder,
    ImageRecord,
    collect_class_names,
    image_size,
    map_in_threads,
    read_validated_json,
)
from coin_ray.errors import InputError

Key = int | str
SINGLE = ("annotations.json", "_annotations.coco.json")


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


def is_coco(place: DatasetFolder) -> bool:
    return any(name in place.uris for name in SINGLE) or bool(_by_split(place))


def _by_split(place: DatasetFolder) -> dict[str, str]:
    every = {
        name: path
        for name, path in place.stems("annotations", ".json").items()
        if "/" not in name
    }
    instances = {
        name.removeprefix("instances_"): path
        for name, path in every.items()
        if name.startswith("instances_")
    }
    return instances or every


def read_coco(place: DatasetFolder) -> Dataset:
    """Of a single file, images that it does not list count as without objects. Raises
    InputError naming file and entry.
    """
    single = next((name for name in SINGLE if name in place.uris), None)
    if single is not None and not place.split:
        return _read(place, single, "images", unlisted=True)
    splits = _by_split(place)
    chosen = place.choose(splits, "annotations/instances_*.json")
    if len(chosen) != 1:
        raise InputError(
            f"{place.root} has several annotation files; say which:"
            f" {' or '.join(f'{place.root}#{name}' for name in sorted(splits))}"
        )
    name = next(n for n, path in splits.items() if path == chosen[0])
    return _read(place, chosen[0], name, unlisted=False)


def _read(place: DatasetFolder, path: str, folder: str, unlisted: bool) -> Dataset:
    uri = place.uris[path]
    content = read_validated_json(FILE, uri, "COCO json")
    found = _annotations(content, uri)
    paths = {
        image.id: place.image(image.file_name, folder, f"images/{folder}", "images", "")
        for image in content.images
    }

    def record(image: _Image) -> ImageRecord | None:
        at = paths[image.id]
        if at is None:
            return None
        size = (
            (image.width, image.height)
            if image.width and image.height
            else image_size(place.uris[at])
        )
        return ImageRecord.of(image.file_name, place.uris[at], size, found[image.id])

    records = [r for r in map_in_threads(record, content.images) if r is not None]
    if unlisted:
        others = sorted(set(place.below("", *IMAGE_SUFFIXES)) - set(paths.values()))
        records += map_in_threads(
            lambda p: ImageRecord.of(
                p.removeprefix("images/"), place.uris[p], image_size(place.uris[p]), []
            ),
            others,
        )
    missing = tuple(
        image.file_name for image in content.images if paths[image.id] is None
    )
    return Dataset(
        "coco",
        tuple(records),
        collect_class_names(records, [c.name.strip() for c in content.categories]),
        missing,
    )


def _annotations(content: _File, uri: str) -> dict[Key, list[Annotation]]:
    names = {c.id: c.name.strip() for c in content.categories}
    found: dict[Key, list[Annotation]] = {image.id: [] for image in content.images}
    for place, box in enumerate(content.annotations):
        if box.category_id not in names or box.image_id not in found:
            which = "category_id" if box.category_id not in names else "image_id"
            raise InputError(
                f"{uri} is not COCO json: annotations.{place}.{which}"
                f" {getattr(box, which)!r} is not in the file"
            )
        left, top, width, height = box.bbox
        found[box.image_id].append(
            Annotation(
                (left, top, left + width, top + height),
                names[box.category_id],
                bool(box.iscrowd),
            )
        )
    return found


def write_coco(records: Sequence[ImageRecord], root: str, names: Sequence[str]) -> None:
    """One file per folder, without the images that are not annotated."""
    column = {name: number for number, name in enumerate(names, start=1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for place, record in enumerate((r for r in records if r.annotated), start=1):
        images.append(
            {
                "id": place,
                "file_name": record.file,
                "width": record.width,
                "height": record.height,
            }
        )
        for (left, top, right, bottom), label, difficult in zip(
            record.boxes.tolist(), record.labels, record.difficult, strict=True
        ):
            width, height = right - left, bottom - top
            row = {
                "id": len(annotations) + 1,
                "image_id": place,
                "category_id": column[label],
                "bbox": [left, top, width, height],
            }
            annotations.append(
                row | {"area": width * height, "iscrowd": int(difficult)}
            )
    categories = [{"id": number, "name": name} for name, number in column.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    storage.write_bytes(
        storage.join(root, "annotations.json"), json.dumps(content).encode()
    )
