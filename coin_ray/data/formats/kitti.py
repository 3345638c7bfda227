"""KITTI object detection: ``training/image_2/*.png`` and ``training/label_2/*.txt``;
lists, if any, in ``ImageSets/*.txt``.

A line has 15 fields: type, truncated, occluded, alpha, left, top, right, bottom, then
seven of the 3D box. Boxes are pixels from 0 and are taken as they stand. ``DontCare``
regions count as difficult.
"""

from __future__ import annotations

from collections.abc import Sequence

from coin_ray import storage
from coin_ray.data.formats.folder import IMAGE_SUFFIXES, DatasetFolder, strip_suffix
from coin_ray.data.formats.parsing import format_number, image_size, parse_number
from coin_ray.data.formats.record import (
    Annotation,
    Dataset,
    ImageRecord,
    collect_class_names,
)
from coin_ray.data.threads import map_in_threads
from coin_ray.errors import InputError

IGNORED = "DontCare"
LABEL_FOLDERS = ("training/label_2", "label_2")
LINE = "{type} -1 -1 -10 {box} -1 -1 -1 -1000 -1000 -1000 -10\n"
"""A written line, with KITTI's own values for what a 2D box does not say."""


def is_kitti(folder: DatasetFolder) -> bool:
    """Tell whether the folder is in the KITTI format."""
    return bool(folder.first_folder(*LABEL_FOLDERS))


def read_kitti(folder: DatasetFolder) -> Dataset:
    """Read a KITTI folder. Images without a text file are not annotated. Raises
    InputError naming file and line.
    """
    label_folder = folder.first_folder(*LABEL_FOLDERS)
    image_folder = label_folder.removesuffix("label_2") + "image_2"
    images = folder.paths_by_stem(image_folder, *IMAGE_SUFFIXES)
    labels = folder.paths_by_stem(label_folder, ".txt")
    names = sorted(images.keys() | labels.keys())
    if folder.split:
        lists = folder.paths_by_stem("ImageSets", ".txt")
        paths = folder.select_split(lists, "list ImageSets/*.txt")
        names = [
            name for path in paths for name in folder.read_image_list(path, images)
        ]
        names = list(dict.fromkeys(names))

    def read_record(name: str) -> ImageRecord:
        file = images[name].removeprefix(f"{image_folder}/")
        uri = folder.uris[images[name]]
        annotated = name in labels
        annotations = _read_annotations(folder, labels[name]) if annotated else []
        return ImageRecord.from_annotations(
            file, uri, image_size(uri), annotations, annotated
        )

    present = [name for name in names if name in images]
    missing = tuple(f"{image_folder}/{name}" for name in names if name not in images)
    records = tuple(map_in_threads(read_record, present))
    return Dataset("kitti", records, collect_class_names(records), missing)


def _read_annotations(folder: DatasetFolder, path: str) -> list[Annotation]:
    annotations = []
    for number, line in enumerate(folder.read_lines(path), start=1):
        if line.strip():
            where = f"{folder.uris[path]}:{number}"
            annotations.append(_parse_annotation(line.split(), where))
    return annotations


def _parse_annotation(fields: list[str], where: str) -> Annotation:
    if len(fields) not in (15, 16):
        raise InputError(
            f"{where}: expected the 15 fields of KITTI, or 16 with a score; got"
            f" {len(fields)}"
        )
    box = [parse_number(field, where) for field in fields[4:8]]
    label = fields[0]
    return Annotation(box, label, label == IGNORED)


def write_kitti(
    records: Sequence[ImageRecord], root: str, split: str, names: Sequence[str]
) -> None:
    """Write one text file per annotated image and the image list of the split. Blanks
    in names become underscores.

    Raises InputError if that makes two names one.
    """
    if len({_type_name(name) for name in names}) < len(names):
        raise InputError(
            "KITTI has no blanks in class names, and without them two of these are"
            f" one: {', '.join(names)}"
        )
    for record in records:
        if record.annotated:
            path = f"{strip_suffix(record.file)}.txt"
            uri = storage.join(root, "training/label_2", path)
            storage.write_bytes(uri, _label_text(record).encode())
    image_list = "".join(f"{strip_suffix(record.file)}\n" for record in records)
    uri = storage.join(root, "ImageSets", f"{split}.txt")
    storage.write_bytes(uri, image_list.encode())


def _label_text(record: ImageRecord) -> str:
    lines = []
    for edges, label in zip(record.boxes.tolist(), record.labels, strict=True):
        box = " ".join(format_number(edge) for edge in edges)
        lines.append(LINE.format(type=_type_name(label), box=box))
    return "".join(lines)


def _type_name(name: str) -> str:
    return "_".join(name.split())
