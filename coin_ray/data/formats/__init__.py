"""Annotated images in the formats people have, as one record type. Foreign formats end
here.

    FOLDER or FOLDER#SPLIT  -- read -->  Dataset of Record  -- write -->  FOLDER

docs/formats.md says where each format is looked for, and how its boxes and flags are
understood.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from coin_ray import storage
from coin_ray.data.formats import bdd100k, cityscapes, coco, kitti, voc, yolo
from coin_ray.data.formats.record import (
    IMAGE_SUFFIXES,
    Annotation,
    Dataset,
    DatasetFolder,
    ImageRecord,
    check_class_name,
    collect_class_names,
    map_in_threads,
    strip_suffix,
)
from coin_ray.errors import InputError

__all__ = [
    "IMAGE_SUFFIXES",
    "READABLE",
    "Annotation",
    "Dataset",
    "ImageRecord",
    "read_dataset",
    "write_dataset",
]

READABLE = "COCO, VOC, YOLO, KITTI, BDD100K or Cityscapes"
IMAGE_FOLDERS = {
    "coco": "images",
    "voc": "JPEGImages",
    "yolo": "images/{split}",
    "kitti": "training/image_2",
    "bdd100k": "images/100k/{split}",
}
"""Where each format that can be written has its images."""


def read_dataset(place: str) -> Dataset:
    """Images and annotations of ``FOLDER`` or ``FOLDER#SPLIT``, local or any URI; the
    format is known by its files.

    A folder in no known format is a plain one: its images, none of them annotated.
    Raises InputError naming file and line.
    """
    opened = DatasetFolder.open(place)
    for module in (coco, voc, yolo, kitti, cityscapes, bdd100k):
        if module.recognises(opened):
            dataset: Dataset = module.read(opened)
            return dataset
    if opened.split:
        raise InputError(
            f"{opened.root} has no split {opened.split!r}: it is not in the format"
            f" {READABLE}"
        )
    paths = opened.below("", *IMAGE_SUFFIXES)
    return Dataset(
        "folder",
        tuple(
            ImageRecord.of(path, opened.uris[path], (0, 0), [], annotated=False)
            for path in paths
        ),
    )


def write_dataset(
    records: Sequence[ImageRecord],
    place: str,
    format: str,  # noqa: A002
    split: str = "train",
    names: Sequence[str] = (),
    drop_difficult: bool = False,
) -> None:
    """Labels in a format of ``IMAGE_FOLDERS`` and copies of the images, below
    ``place``.

    ``names``: class names in the order that numbers them; those not given follow. YOLO
    and KITTI can't mark a box as difficult: such boxes are an InputError, or are left
    out.
    """
    if format not in IMAGE_FOLDERS:
        raise InputError(
            f"can't write {format!r}; known are {', '.join(IMAGE_FOLDERS)}"
        )
    place = storage.absolute_uri(place)
    if drop_difficult:
        records = [_without_difficult(r) for r in records]
    names = collect_class_names(records, names)
    for name in names:
        check_class_name(name, "names")
    _check_files(records, with_suffix=format in ("coco", "bdd100k"))
    _check_flags(records, format)
    folder = storage.join(place, IMAGE_FOLDERS[format].format(split=split))
    map_in_threads(lambda r: _copy(r, storage.join(folder, r.file)), records)
    if format == "coco":
        coco.write_coco(records, place, names)
    elif format == "voc":
        voc.write_voc(records, place, split)
    elif format == "yolo":
        yolo.write_yolo(records, place, split, names)
    elif format == "kitti":
        kitti.write_kitti(records, place, split, names)
    else:
        bdd100k.write_bdd100k(records, place, split)


def _without_difficult(record: ImageRecord) -> ImageRecord:
    kept = ~record.difficult
    labels = tuple(
        label for label, keep in zip(record.labels, kept, strict=True) if keep
    )
    return replace(
        record,
        boxes=record.boxes[kept],
        labels=labels,
        difficult=np.zeros(len(labels), np.bool_),
    )


def _check_files(records: Sequence[ImageRecord], with_suffix: bool) -> None:
    """Every image has its own label file, or entry, and a size."""
    taken: dict[str, str] = {}
    for record in records:
        if {"", ".", ".."} & set(record.file.split("/")):
            raise InputError(f"{record.file!r} is no path of a file inside a folder")
        key = record.file if with_suffix else strip_suffix(record.file)
        if key in taken:
            raise InputError(
                f"{record.file} and {taken[key]} would share one label file; rename one"
                " of them"
            )
        taken[key] = record.file
        if record.annotated and not (record.width > 0 and record.height > 0):
            raise InputError(f"{record.uri} has no known size; is it an image?")


def _check_flags(records: Sequence[ImageRecord], format: str) -> None:  # noqa: A002
    for record in records:
        flags = zip(record.labels, record.difficult, strict=True)
        if format == "kitti" and any(
            difficult != (label == kitti.IGNORED) for label, difficult in flags
        ):
            raise InputError(
                f"{record.file}: in KITTI {kitti.IGNORED} and only {kitti.IGNORED} is"
                " difficult; drop_difficult=True leaves those out"
            )
        if format == "yolo" and record.difficult.any():
            raise InputError(
                f"{record.file}: YOLO can't mark boxes as difficult;"
                " drop_difficult=True leaves them out"
            )


def _copy(record: ImageRecord, target: str) -> None:
    if record.uri != target:
        storage.write_bytes(target, storage.read_bytes(record.uri))
