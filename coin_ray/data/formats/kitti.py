"""KITTI object detection: ``image_2/*.png`` and ``label_2/*.txt`` side by side in any
folder; lists, if any, in ``ImageSets/*.txt``.

A line has 15 fields: type, truncated, occluded, alpha, left, top, right, bottom, then
seven of the 3D box. Boxes are pixels from 0 and are taken as they stand. ``DontCare``
regions count as difficult.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from coin_ray.data.formats.conventions import CORNERS, check_records
from coin_ray.data.formats.folder import DatasetFolder, strip_suffix
from coin_ray.data.formats.parsing import (
    format_number,
    image_size,
    parse_number,
    read_head,
)
from coin_ray.data.formats.record import (
    Annotation,
    Dataset,
    ImageRecord,
    UnreadableLabels,
    check_readable,
    collect_class_names,
)
from coin_ray.data.formats.unread import layout_of
from coin_ray.data.threads import map_in_threads
from coin_ray.errors import InputError

IGNORED = "DontCare"
LABEL_FOLDER = "label_2"
OTHER_LABEL_FOLDER, OTHER_IMAGE_FOLDER = "labels", "data"
"""As FiftyOne names them; its files tell whether they are KITTI's."""
NUMBER_COUNT = 14
LINE = "{type} -1 -1 -10 {box} -1 -1 -1 -1000 -1000 -1000 -10\n"
"""A written line, with KITTI's own values for what a 2D box does not say."""


def is_kitti(folder: DatasetFolder) -> bool:
    """Tell whether the folder is in the KITTI format."""
    return bool(_label_folders(folder))


def _label_folders(folder: DatasetFolder) -> list[str]:
    """List the folders of labels: ``label_2``, or else those of FiftyOne."""
    return _folders_named(folder, LABEL_FOLDER) or [
        path
        for path in _folders_named(folder, OTHER_LABEL_FOLDER)
        if _is_of_fiftyone(folder, path)
    ]


def _folders_named(folder: DatasetFolder, name: str) -> list[str]:
    """List the folders of this name that hold texts."""
    folders = []
    for path in folder.list_paths("", ".txt"):
        before, separator, _ = f"/{path}".rpartition(f"/{name}/")
        if separator:
            folders.append(f"{before}/{name}".lstrip("/"))
    return list(dict.fromkeys(folders))


def _is_of_fiftyone(folder: DatasetFolder, label_folder: str) -> bool:
    """Tell whether there are images beside the folder, and a text in it with a line of
    KITTI's.
    """
    if not folder.list_images(_image_folder(label_folder)):
        return False
    heads = (read_head(folder.uris[p]) for p in folder.list_paths(label_folder, ".txt"))
    first_text = next((head for head in heads if head.strip()), b"")
    return layout_of(first_text, ".txt") == "KITTI"


def _image_folder(label_folder: str) -> str:
    """Return the folder of images that belongs to a folder of labels."""
    before, _, name = label_folder.rpartition("/")
    image_folder = "image_2" if name == LABEL_FOLDER else OTHER_IMAGE_FOLDER
    return f"{before}/{image_folder}".lstrip("/")


def read_kitti(folder: DatasetFolder) -> Dataset:
    """Read a KITTI folder. Images without a text file are not annotated. Raises
    InputError naming file and line.
    """
    label_folders = _label_folders(folder)
    if len(label_folders) == 1:
        datasets = [_read_folder(folder, label_folders[0])]
    else:
        by_split = {path.rpartition("/")[0]: path for path in label_folders}
        selected = folder.select_split(by_split, f"folder with {LABEL_FOLDER}")
        whole = replace(folder, split="")
        datasets = [_read_folder(whole, path) for path in selected]
    folder.read_paths.update(
        path for name in label_folders for path in folder.list_paths(name, ".txt")
    )
    records = tuple(record for dataset in datasets for record in dataset.records)
    missing = tuple(name for dataset in datasets for name in dataset.missing)
    unreadable = tuple(labels for dataset in datasets for labels in dataset.unreadable)
    check_records(records, CORNERS, folder.root)
    names = collect_class_names(records)
    return Dataset("kitti", records, names, missing, unreadable=unreadable)


def _read_folder(folder: DatasetFolder, label_folder: str) -> Dataset:
    base, image_folder = label_folder.rpartition("/")[0], _image_folder(label_folder)
    images = folder.list_images(image_folder)
    labels = {
        f"{image_folder}{strip_suffix(path.removeprefix(label_folder))}": path
        for path in folder.list_paths(label_folder, ".txt")
    }
    label_of_image, unmatched = folder.match_labels(images, labels)
    lists = folder.list_paths("ImageSets", ".txt")
    if folder.split and not lists and folder.split == base:
        folder = replace(folder, split="")
    listed, missing = folder.select_listed("ImageSets", images, image_folder)
    if not folder.split:
        missing += unmatched

    unreadable: list[UnreadableLabels] = []

    def read_record(path: str) -> ImageRecord:
        uri, label = folder.uris[path], label_of_image.get(path)
        file, size = path.removeprefix(f"{image_folder}/"), image_size(uri)
        if label is not None:
            try:
                annotations = _read_annotations(folder, label)
                return ImageRecord.from_annotations(file, uri, size, annotations)
            except InputError as error:
                labels = UnreadableLabels(folder.uris[label], str(error))
                unreadable.append(labels)
        return ImageRecord.from_annotations(file, uri, size, [], annotated=False)

    records = tuple(map_in_threads(read_record, listed))
    annotated_count = sum(record.annotated for record in records)
    errors = check_readable(unreadable, annotated_count)
    return Dataset("kitti", records, (), tuple(missing), unreadable=errors)


def _read_annotations(folder: DatasetFolder, path: str) -> list[Annotation]:
    annotations = []
    for number, line in enumerate(folder.read_lines(path), start=1):
        if line.strip():
            where = f"{folder.uris[path]}:{number}"
            annotations.append(_parse_annotation(line.split(), where))
    return annotations


def _parse_annotation(fields: list[str], where: str) -> Annotation:
    """Read a line whose class name may hold blanks: the fields after it are numbers."""
    name_length = 1
    while name_length < len(fields) and not _is_number(fields[name_length]):
        name_length += 1
    numbers = fields[name_length:]
    if len(numbers) not in (NUMBER_COUNT, NUMBER_COUNT + 1):
        raise InputError(
            f"{where}: expected a class name and the {NUMBER_COUNT} numbers of KITTI, or"
            f" {NUMBER_COUNT + 1} with a score; got {len(numbers)} after"
            f" {' '.join(fields[:name_length])!r}"
        )
    if len(numbers) > NUMBER_COUNT and _may_begin_in_name(numbers):
        raise InputError(
            f"{where}: {numbers[0]!r} may be part of the class name or the first of 15"
            " numbers with a score; write class names without blanks"
        )
    box = [parse_number(number, where) for number in numbers][3:7]
    label = " ".join(fields[:name_length])
    return Annotation(box, label, label.lower() == IGNORED.lower())


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _may_begin_in_name(numbers: Sequence[str]) -> bool:
    """Tell whether a class name like "type 2" fits 15 numbers as well as a score: then
    truncation, occlusion and box, one field later, are valid too.
    """
    if not numbers[0].isdigit():
        return False
    truncated, occluded, _, left, top, right, bottom = map(float, numbers[1:8])
    return (
        -1 <= truncated <= 1
        and occluded in (-1, 0, 1, 2, 3)
        and left < right
        and top < bottom
    )


def kitti_files(
    records: Sequence[ImageRecord], split: str, names: Sequence[str]
) -> dict[str, bytes]:
    """Return one text file per annotated image and the image list of the split. Blanks
    in names become underscores.

    Raises InputError if that makes two names one.
    """
    if len({_type_name(name) for name in names}) < len(names):
        raise InputError(
            "KITTI has no blanks in class names, and without them two of these are"
            f" one: {', '.join(names)}"
        )
    files = {
        f"training/label_2/{strip_suffix(record.file)}.txt": _label_text(
            record
        ).encode()
        for record in records
        if record.annotated
    }
    image_list = "".join(f"{strip_suffix(record.file)}\n" for record in records)
    files[f"ImageSets/{split}.txt"] = image_list.encode()
    return files


def _label_text(record: ImageRecord) -> str:
    lines = []
    for edges, label in zip(record.boxes.tolist(), record.labels, strict=True):
        box = " ".join(format_number(edge) for edge in edges)
        lines.append(LINE.format(type=_type_name(label), box=box))
    return "".join(lines)


def _type_name(name: str) -> str:
    return "_".join(name.split())
