"""Annotated images in the formats people have, read into one record type.

    FOLDER or FOLDER#SPLIT  -- read -->  Dataset of ImageRecord  -- write -->  FOLDER

docs/formats.md says where each format is looked for, and how its boxes and flags are
understood.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from coin_ray import storage
from coin_ray.data.file_kinds import IMAGE_SUFFIXES, OTHER_IMAGE_SUFFIXES
from coin_ray.data.formats.bdd100k import bdd100k_files, is_bdd100k, read_bdd100k
from coin_ray.data.formats.cityscapes import is_cityscapes, read_cityscapes
from coin_ray.data.formats.coco import coco_files, is_coco, read_coco
from coin_ray.data.formats.folder import DatasetFolder, strip_suffix
from coin_ray.data.formats.kitti import IGNORED, is_kitti, kitti_files, read_kitti
from coin_ray.data.formats.record import (
    Annotation,
    Dataset,
    ImageRecord,
    LeftOut,
    UnreadableLabels,
    UnreadFile,
    check_class_name,
    collect_class_names,
    describe_dataset,
)
from coin_ray.data.formats.unread import find_unread_files
from coin_ray.data.formats.voc import is_voc, read_voc, voc_files
from coin_ray.data.formats.yolo import is_yolo, read_yolo, yolo_files
from coin_ray.data.threads import map_in_threads
from coin_ray.errors import InputError

__all__ = [
    "IMAGE_SUFFIXES",
    "READABLE",
    "UNDECODABLE",
    "Annotation",
    "Dataset",
    "ImageRecord",
    "LeftOut",
    "UnreadFile",
    "UnreadableLabels",
    "describe_dataset",
    "list_image_files",
    "read_dataset",
    "write_dataset",
]

UNDECODABLE = "an image of this kind can't be decoded"
"""Why files of ``OTHER_IMAGE_SUFFIXES`` are left out."""
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
    "coco": "images/{split}",
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
    dataset = _read_folder(folder)
    taken = {record.uri for record in dataset.records}
    undecodable = tuple(
        LeftOut(folder.uris[path], UNDECODABLE)
        for path in folder.list_paths("", *OTHER_IMAGE_SUFFIXES)
        if folder.uris[path] not in taken
    )
    return replace(
        dataset,
        left_out=dataset.left_out + undecodable,
        unread_files=find_unread_files(folder),
    )


def _read_folder(folder: DatasetFolder) -> Dataset:
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
        for path in folder.list_images()
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
    or are left out with ``drop_difficult``. A second split is added to a folder; raises
    InputError rather than replace a label file or another image.
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
    files = _label_files(records, folder, format, split, names)
    image_folder = storage.join(folder, IMAGE_FOLDERS[format].format(split=split))
    _check_nothing_replaced(records, folder, image_folder, files)
    map_in_threads(lambda record: _copy_image(record, image_folder), records)
    for path, content in files.items():
        storage.write_bytes(storage.join(folder, path), content)


def _label_files(
    records: Sequence[ImageRecord],
    folder: str,
    format: str,  # noqa: A002
    split: str,
    names: Sequence[str],
) -> dict[str, bytes]:
    """Return the content of each label file by its path."""
    if format == "coco":
        return coco_files(records, split, names)
    if format == "voc":
        return voc_files(records, split)
    if format == "yolo":
        return yolo_files(records, folder, split, names)
    if format == "kitti":
        return kitti_files(records, split, names)
    return bdd100k_files(records, split)


def _check_nothing_replaced(
    records: Sequence[ImageRecord],
    folder: str,
    image_folder: str,
    files: Iterable[str],
) -> None:
    existing = set(storage.list_files(folder))
    label_uris = [storage.join(folder, path) for path in files if path != "data.yaml"]
    image_uris = [
        storage.join(image_folder, record.file)
        for record in records
        if record.uri != storage.join(image_folder, record.file)
    ]
    replaced = [uri for uri in (*label_uris, *image_uris) if uri in existing]
    if replaced:
        raise InputError(
            f"{replaced[0]} is there already ({len(replaced)} files in all): write to"
            " another folder, or as another split"
        )


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
