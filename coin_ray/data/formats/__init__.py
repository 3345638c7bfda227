"""Annotated images in the formats people have, read into one record type.

    FOLDER or FOLDER#SPLIT  -- read -->  Dataset of ImageRecord  -- write -->  FOLDER

docs/formats.md says where each format is looked for, and how its boxes and flags are
understood.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from coin_ray import storage
from coin_ray.data.formats.bdd100k import is_bdd100k, read_bdd100k, write_bdd100k
from coin_ray.data.formats.cityscapes import is_cityscapes, read_cityscapes
from coin_ray.data.formats.coco import is_coco, read_coco, write_coco
from coin_ray.data.formats.folder import IMAGE_SUFFIXES, DatasetFolder, strip_suffix
from coin_ray.data.formats.kitti import IGNORED, is_kitti, read_kitti, write_kitti
from coin_ray.data.formats.record import (
    Annotation,
    Dataset,
    ImageRecord,
    check_class_name,
    collect_class_names,
)
from coin_ray.data.formats.voc import is_voc, read_voc, write_voc
from coin_ray.data.formats.yolo import is_yolo, read_yolo, write_yolo
from coin_ray.data.threads import map_in_threads
from coin_ray.errors import InputError

__all__ = [
    "IMAGE_SUFFIXES",
    "READABLE",
    "Annotation",
    "Dataset",
    "ImageRecord",
    "list_image_files",
    "read_dataset",
    "write_dataset",
]

READABLE = "COCO, VOC, YOLO, KITTI, BDD100K or Cityscapes"
READERS: tuple[
    tuple[Callable[[DatasetFolder], bool], Callable[[DatasetFolder], Dataset]], ...
] = (
    (is_coco, read_coco),
    (is_voc, read_voc),
    (is_yolo, read_yolo),
    (is_kitti, read_kitti),
    (is_cityscapes, read_cityscapes),
    (is_bdd100k, read_bdd100k),
)
"""Test and reader of each format; the first format whose test holds is read."""
IMAGE_FOLDERS = {
    "coco": "images",
    "voc": "JPEGImages",
    "yolo": "images/{split}",
    "kitti": "training/image_2",
    "bdd100k": "images/100k/{split}",
}
"""The image folder of each format that can be written."""


def read_dataset(address: str) -> Dataset:
    """Read images and annotations of ``FOLDER`` or ``FOLDER#SPLIT``, local or any URI;
    the files of the folder tell its format.

    A folder in no known format is read as images without annotations. Raises InputError
    naming file and line.
    """
    folder = DatasetFolder.open(address)
    for is_format, read_format in READERS:
        if is_format(folder):
            return read_format(folder)
    if folder.split:
        raise InputError(
            f"{folder.root} has no split {folder.split!r}: it is not in the format"
            f" {READABLE}"
        )
    records = [
        ImageRecord.from_annotations(
            path, folder.uris[path], (0, 0), [], annotated=False
        )
        for path in folder.list_paths("", *IMAGE_SUFFIXES)
    ]
    return Dataset("folder", tuple(records))


def list_image_files(address: str) -> list[str]:
    """Return the URIs of the images of ``FOLDER`` or ``FOLDER#SPLIT``."""
    return [record.uri for record in read_dataset(address).records]


def write_dataset(
    records: Sequence[ImageRecord],
    folder: str,
    format: str,  # noqa: A002
    split: str = "train",
    names: Sequence[str] = (),
    drop_difficult: bool = False,
) -> None:
    """Write labels in a format of ``IMAGE_FOLDERS`` and copies of the images below
    ``folder``.

    ``names``: class names in the order that numbers them; other labels of the records
    follow. YOLO and KITTI can't mark a box as difficult: such boxes are an InputError,
    or are left out with ``drop_difficult``.
    """
    if format not in IMAGE_FOLDERS:
        raise InputError(
            f"can't write {format!r}; known are {', '.join(IMAGE_FOLDERS)}"
        )
    folder = storage.absolute_uri(folder)
    if drop_difficult:
        records = [_without_difficult(record) for record in records]
    names = collect_class_names(records, names)
    for name in names:
        check_class_name(name, "names")
    _check_files(records, with_suffix=format in ("coco", "bdd100k"))
    _check_flags(records, format)
    image_folder = storage.join(folder, IMAGE_FOLDERS[format].format(split=split))
    map_in_threads(lambda record: _copy_image(record, image_folder), records)
    if format == "coco":
        write_coco(records, folder, names)
    elif format == "voc":
        write_voc(records, folder, split)
    elif format == "yolo":
        write_yolo(records, folder, split, names)
    elif format == "kitti":
        write_kitti(records, folder, split, names)
    else:
        write_bdd100k(records, folder, split)


def _without_difficult(record: ImageRecord) -> ImageRecord:
    required = ~record.difficult
    pairs = zip(record.labels, required, strict=True)
    labels = tuple(label for label, is_required in pairs if is_required)
    return replace(
        record,
        boxes=record.boxes[required],
        labels=labels,
        difficult=np.zeros(len(labels), np.bool_),
    )


def _check_files(records: Sequence[ImageRecord], with_suffix: bool) -> None:
    """Check that every image has a label file or entry of its own, and a size."""
    file_by_key: dict[str, str] = {}
    for record in records:
        if {"", ".", ".."} & set(record.file.split("/")):
            raise InputError(f"{record.file!r} is no path of a file inside a folder")
        key = record.file if with_suffix else strip_suffix(record.file)
        if key in file_by_key:
            raise InputError(
                f"{record.file} and {file_by_key[key]} would share one label file;"
                " rename one of them"
            )
        file_by_key[key] = record.file
        if record.annotated and not (record.width > 0 and record.height > 0):
            raise InputError(f"{record.uri} has no known size; is it an image?")


def _check_flags(records: Sequence[ImageRecord], format: str) -> None:  # noqa: A002
    for record in records:
        if format == "kitti":
            ignored = np.array([label == IGNORED for label in record.labels], np.bool_)
            if (record.difficult != ignored).any():
                raise InputError(
                    f"{record.file}: in KITTI {IGNORED} and only {IGNORED} is"
                    " difficult; drop_difficult=True leaves those out"
                )
        if format == "yolo" and record.difficult.any():
            raise InputError(
                f"{record.file}: YOLO can't mark boxes as difficult;"
                " drop_difficult=True leaves them out"
            )


def _copy_image(record: ImageRecord, folder: str) -> None:
    target = storage.join(folder, record.file)
    if record.uri != target:
        storage.write_bytes(target, storage.read_bytes(record.uri))
