"""KITTI object detection: ``training/image_2/*.png`` and ``training/label_2/*.txt``;
lists, if any, in ``ImageSets/*.txt``.

A line has 15 fields: type, truncated, occluded, alpha, left, top, right, bottom, then
seven of the 3D box. Boxes are pixels from 0 and are taken as they stand. ``DontCare``
regions count as difficult.
"""

from __future__ import annotations

from collections.abc import Sequence

from coin_ray import storage
from coin_ray.data.formats.record import (
    IMAGE_SUFFIXES,
    Annotation,
    Dataset,
    DatasetFolder,
    ImageRecord,
    collect_class_names,
    format_number,
    image_size,
    map_in_threads,
    parse_number,
    strip_suffix,
)
from coin_ray.errors import InputError

IGNORED = "DontCare"
UNKNOWN = "-1 -1 -10 {} -1 -1 -1 -1000 -1000 -1000 -10"
"""KITTI's own values for what a 2D box does not say."""


def is_kitti(place: DatasetFolder) -> bool:
    return bool(place.folder("training/label_2", "label_2"))


def read_kitti(place: DatasetFolder) -> Dataset:
    """Images without a text file are not annotated. Raises InputError naming file and
    line.
    """
    base = place.folder("training/label_2", "label_2").removesuffix("label_2")
    images, labels = (
        place.stems(f"{base}image_2", *IMAGE_SUFFIXES),
        place.stems(f"{base}label_2", ".txt"),
    )
    lists = place.stems("ImageSets", ".txt") if place.split else {}
    chosen = [
        name
        for path in place.choose(lists, "list ImageSets/*.txt")
        for name in place.listed(path, images)
    ]
    wanted = (
        dict.fromkeys(chosen)
        if place.split
        else dict.fromkeys(sorted(images.keys() | labels.keys()))
    )

    def record(name: str) -> ImageRecord:
        file, uri = (
            images[name].removeprefix(f"{base}image_2/"),
            place.uris[images[name]],
        )
        found = _annotations(place, labels[name]) if name in labels else []
        return ImageRecord.of(
            file, uri, image_size(uri), found, annotated=name in labels
        )

    records = tuple(map_in_threads(record, [name for name in wanted if name in images]))
    return Dataset(
        "kitti",
        records,
        collect_class_names(records),
        tuple(f"{base}image_2/{name}" for name in wanted if name not in images),
    )


def _annotations(place: DatasetFolder, path: str) -> list[Annotation]:
    rows = enumerate(place.lines(path), start=1)
    return [
        _annotation(line.split(), f"{place.uris[path]}:{row}")
        for row, line in rows
        if line.strip()
    ]


def _annotation(words: list[str], where: str) -> Annotation:
    if len(words) not in (15, 16):
        raise InputError(
            f"{where}: expected the 15 fields of KITTI, or 16 with a score; got"
            f" {len(words)}"
        )
    return Annotation(
        [parse_number(word, where) for word in words[4:8]],
        words[0],
        words[0] == IGNORED,
    )


def write_kitti(
    records: Sequence[ImageRecord], root: str, split: str, names: Sequence[str]
) -> None:
    """Blanks in names become underscores. Raises InputError if that makes two names
    one.
    """
    if len({_type(name) for name in names}) < len(names):
        raise InputError(
            "KITTI has no blanks in class names, and without them two of these are"
            f" one: {', '.join(names)}"
        )
    for record in records:
        if record.annotated:
            rows = (
                f"{_type(label)} {UNKNOWN.format(' '.join(map(format_number, box)))}\n"
                for box, label in zip(record.boxes.tolist(), record.labels, strict=True)
            )
            storage.write_bytes(
                storage.join(
                    root, "training/label_2", f"{strip_suffix(record.file)}.txt"
                ),
                "".join(rows).encode(),
            )
    storage.write_bytes(
        storage.join(root, "ImageSets", f"{split}.txt"),
        "".join(f"{strip_suffix(r.file)}\n" for r in records).encode(),
    )


def _type(name: str) -> str:
    return "_".join(name.split())
