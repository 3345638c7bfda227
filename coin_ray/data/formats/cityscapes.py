"""Cityscapes and Foggy Cityscapes: ``gtFine/SPLIT/CITY/*_gtFine_polygons.json`` with
``leftImg8bit`` or ``leftImg8bit_foggy``.

Boxes are computed as from the official instance images: objects are drawn in the file's order, so
later ones hide earlier ones, and a box holds the pixels that stay visible. Groups
("cargroup") count as difficult. Split ``val_foggy_0.02`` takes the foggy images with
beta 0.02.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw
from pydantic import TypeAdapter

from coin_ray.data.formats.folder import DatasetFolder, strip_suffix
from coin_ray.data.formats.parsing import image_size, read_validated_json
from coin_ray.data.formats.record import (
    Annotation,
    Dataset,
    ImageRecord,
    UnreadableLabels,
    check_readable,
    collect_class_names,
)
from coin_ray.data.threads import map_in_threads
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
LABEL_SUFFIX = "_gtFine_polygons.json"


@dataclass(frozen=True, slots=True)
class _Polygon:
    label: str
    polygon: list[tuple[float, float]]
    deleted: int = 0


@dataclass(frozen=True, slots=True)
class _File:
    imgWidth: int  # noqa: N815
    imgHeight: int  # noqa: N815
    objects: list[_Polygon]


FILE = TypeAdapter(_File)


def is_cityscapes(folder: DatasetFolder) -> bool:
    """Tell whether the folder is in the Cityscapes format."""
    return bool(folder.first_folder("gtFine"))


def read_cityscapes(folder: DatasetFolder) -> Dataset:
    """Read a Cityscapes folder. Raises InputError naming file and entry."""
    split, _, beta = folder.split.partition("_foggy_")
    splits: dict[str, list[str]] = {}
    for path in folder.list_paths("gtFine", LABEL_SUFFIX.lower()):
        splits.setdefault(path.split("/")[1], []).append(path)
    folder.read_paths.update(folder.list_paths("gtFine"))
    if not splits:
        raise InputError(
            f"{folder.root}/gtFine has no *{LABEL_SUFFIX}: boxes are read from polygons,"
            " not from instance images"
        )
    label_paths: list[str] = []
    for paths in replace(folder, split=split).select_split(splits, "gtFine folder"):
        label_paths += paths
    images = _images_by_scene(folder, beta)
    pairs = [
        (label_path, image_path)
        for label_path in label_paths
        for image_path in images.get(_scene(label_path), ())
    ]
    if not pairs:
        kind = (
            f"leftImg8bit_foggy images with beta {beta}"
            if beta
            else "leftImg8bit images"
        )
        raise InputError(
            f"{folder.root}: no {kind} for the {len(label_paths)} label files of"
            f" {split or 'all splits'}"
        )
    unreadable: list[UnreadableLabels] = []

    def read_record(pair: tuple[str, str]) -> ImageRecord:
        label_path, image_path = pair
        try:
            return _read_record(folder, label_path, image_path)
        except InputError as error:
            uri = folder.uris[label_path]
            unreadable.append(UnreadableLabels(uri, str(error)))
        uri = folder.uris[image_path]
        file = image_path.partition("/")[2]
        return ImageRecord.from_annotations(
            file, uri, image_size(uri), [], annotated=False
        )

    records = tuple(map_in_threads(read_record, pairs))
    annotated_count = sum(record.annotated for record in records)
    errors = check_readable(unreadable, annotated_count)
    missing = tuple(path for path in label_paths if _scene(path) not in images)
    names = collect_class_names(records)
    return Dataset("cityscapes", records, names, missing, unreadable=errors)


def _images_by_scene(folder: DatasetFolder, beta: str) -> dict[str, list[str]]:
    """Return image paths by scene ("val/aachen/aachen_000000_000019")."""
    image_folder = "leftImg8bit_foggy" if beta else "leftImg8bit"
    suffix = f"_leftImg8bit_foggy_beta_{beta}" if beta else "_leftImg8bit"
    images: dict[str, list[str]] = {}
    for path in folder.list_images(image_folder):
        name = strip_suffix(path.removeprefix(f"{image_folder}/"))
        if name.endswith(suffix):
            images.setdefault(name.removesuffix(suffix), []).append(path)
    return images


def _scene(label_path: str) -> str:
    return label_path.partition("/")[2].removesuffix(LABEL_SUFFIX)


def _read_record(
    folder: DatasetFolder, label_path: str, image_path: str
) -> ImageRecord:
    label_uri = folder.uris[label_path]
    labels = read_validated_json(FILE, label_uri, "Cityscapes polygon json")
    size = labels.imgWidth, labels.imgHeight
    polygons = [polygon for polygon in labels.objects if not polygon.deleted]
    try:
        annotations = list(visible_boxes(size, polygons))
    except (ValueError, MemoryError) as error:
        message = f"{label_uri}: the polygons can't be drawn: {error}"
        raise InputError(message) from None
    file = image_path.partition("/")[2]
    return ImageRecord.from_annotations(
        file, folder.uris[image_path], size, annotations
    )


def visible_boxes(
    size: tuple[int, int], polygons: Sequence[_Polygon]
) -> Iterator[Annotation]:
    """Yield the box around the visible pixels of each instance in an image of ``size``
    (width, height); a wholly hidden instance has none.
    """
    drawn = [polygon for polygon in polygons if polygon.label not in UNDRAWN]
    canvas = Image.new("I", size, 0)
    drawer = ImageDraw.Draw(canvas)
    for number, polygon in enumerate(drawn, start=1):
        corner_count = len(polygon.polygon)
        if corner_count < 2:
            raise ValueError(f"an object {polygon.label!r} has {corner_count} corners")
        drawer.polygon(polygon.polygon, fill=number)
    instance_of_pixel = np.asarray(canvas)
    for number, polygon in enumerate(drawn, start=1):
        label, is_group = _instance_class(polygon.label)
        if label not in INSTANCES:
            continue
        corners = np.asarray(polygon.polygon)
        # only pixels near the polygon are searched
        left, top = np.clip(np.floor(corners.min(0)) - 1, 0, None).astype(int)
        right, bottom = int(corners[:, 0].max()) + 2, int(corners[:, 1].max()) + 2
        visible = instance_of_pixel[top:bottom, left:right] == number
        columns = left + np.flatnonzero(visible.any(0))
        rows = top + np.flatnonzero(visible.any(1))
        if len(columns):
            box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            yield Annotation([float(edge) for edge in box], label, is_group)


def _instance_class(label: str) -> tuple[str, bool]:
    """Return the class, and whether the label is a group of objects not told apart."""
    single = label.removesuffix("group")
    is_group = single != label and single in INSTANCES
    return (single, True) if is_group else (label, False)
