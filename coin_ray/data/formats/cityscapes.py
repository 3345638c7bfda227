"""Cityscapes and Foggy Cityscapes: ``gtFine/SPLIT/CITY/*_gtFine_polygons.json`` with
``leftImg8bit`` or ``leftImg8bit_foggy``.

Boxes as from the official instance images: objects are drawn in the file's order, so
later ones hide earlier ones, and a box holds the pixels that stay visible. Groups
("cargroup") count as difficult. Split ``val_foggy_0.02`` takes the foggy images with
beta 0.02.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw
from pydantic import TypeAdapter

from coin_ray.data.formats.record import (
    IMAGE_SUFFIXES,
    Annotation,
    Dataset,
    DatasetFolder,
    ImageRecord,
    collect_class_names,
    map_in_threads,
    read_validated_json,
)
from coin_ray.errors import InputError

INSTANCES = (
    "person",
    "rider",
    "car",
    "truck",
    "bus",
    "caravan",
    "trailer",
    "train",
    "motorcycle",
    "bicycle",
)
"""Classes whose objects are told apart; the others only hide them."""
UNDRAWN = ("license plate",)
"""Classes with a negative id are not drawn."""
ENDING = "_gtFine_polygons.json"


@dataclass(frozen=True, slots=True)
class _Object:
    label: str
    polygon: list[tuple[float, float]]
    deleted: int = 0


@dataclass(frozen=True, slots=True)
class _File:
    imgWidth: int  # noqa: N815
    imgHeight: int  # noqa: N815
    objects: list[_Object]


FILE = TypeAdapter(_File)


def is_cityscapes(place: DatasetFolder) -> bool:
    return bool(place.folder("gtFine"))


def read_cityscapes(place: DatasetFolder) -> Dataset:
    """Raises InputError naming file and entry."""
    split, _, beta = place.split.partition("_foggy_")
    splits: dict[str, list[str]] = {}
    for path in place.below("gtFine", ENDING.lower()):
        splits.setdefault(path.split("/")[1], []).append(path)
    chosen = [
        path
        for paths in replace(place, split=split).choose(splits, "gtFine folder")
        for path in paths
    ]
    images = _images(place, beta)
    pairs = [
        (path, image)
        for path in chosen
        for image in images.get(_scene(path, ENDING), ())
    ]
    missing = tuple(path for path in chosen if _scene(path, ENDING) not in images)
    if not pairs:
        kind = (
            f"leftImg8bit_foggy images with beta {beta}"
            if beta
            else "leftImg8bit images"
        )
        raise InputError(
            f"{place.root}: no {kind} for the {len(chosen)} label files of"
            f" {split or 'all splits'}"
        )
    records = tuple(map_in_threads(lambda pair: _record(place, *pair), pairs))
    return Dataset("cityscapes", records, collect_class_names(records), missing)


def _images(place: DatasetFolder, beta: str) -> dict[str, list[str]]:
    """Image paths by scene ("val/aachen/aachen_000000_000019")."""
    folder = "leftImg8bit_foggy" if beta else "leftImg8bit"
    ending = f"_leftImg8bit_foggy_beta_{beta}" if beta else "_leftImg8bit"
    found: dict[str, list[str]] = {}
    for name, path in place.stems(folder, *IMAGE_SUFFIXES).items():
        if name.endswith(ending):
            found.setdefault(name.removesuffix(ending), []).append(path)
    return found


def _scene(path: str, ending: str) -> str:
    return path.partition("/")[2].removesuffix(ending)


def _record(place: DatasetFolder, label: str, image: str) -> ImageRecord:
    content = read_validated_json(FILE, place.uris[label], "Cityscapes polygon json")
    try:
        found = list(
            boxes(
                content.imgWidth,
                content.imgHeight,
                [o for o in content.objects if not o.deleted],
            )
        )
    except (ValueError, MemoryError) as error:
        raise InputError(
            f"{place.uris[label]}: the polygons can't be drawn: {error}"
        ) from None
    return ImageRecord.of(
        image.partition("/")[2],
        place.uris[image],
        (content.imgWidth, content.imgHeight),
        found,
    )


def boxes(width: int, height: int, objects: list[_Object]) -> Iterator[Annotation]:
    """Boxes around the visible pixels of each instance; one that is wholly hidden has
    none.
    """
    canvas = Image.new("I", (width, height), 0)
    drawer = ImageDraw.Draw(canvas)
    drawn = [o for o in objects if o.label not in UNDRAWN]
    for place, item in enumerate(drawn, start=1):
        if len(item.polygon) < 2:
            raise ValueError(
                f"an object {item.label!r} has {len(item.polygon)} corners"
            )
        drawer.polygon(item.polygon, fill=place)
    owners = np.asarray(canvas)
    for place, item in enumerate(drawn, start=1):
        label, group = _instance(item.label)
        if label not in INSTANCES:
            continue
        corners = np.asarray(item.polygon)
        left, top = np.clip(np.floor(corners.min(0)) - 1, 0, None).astype(int)
        window = (
            owners[
                top : int(corners[:, 1].max()) + 2, left : int(corners[:, 0].max()) + 2
            ]
            == place
        )
        columns, rows = np.flatnonzero(window.any(0)), np.flatnonzero(window.any(1))
        if len(columns):
            box = (
                left + columns[0],
                top + rows[0],
                left + columns[-1] + 1,
                top + rows[-1] + 1,
            )
            yield Annotation([float(v) for v in box], label, group)


def _instance(label: str) -> tuple[str, bool]:
    """The class, and whether it is a group of objects not told apart."""
    single = label.removesuffix("group")
    return (single, True) if single != label and single in INSTANCES else (label, False)
