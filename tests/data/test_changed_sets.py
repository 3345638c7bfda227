"""Any part of a valid data set permuted, renamed, dropped or doubled: an error, an image
that is not annotated, or the same truth; never another one.

Not among the changes is what no reader can notice: a box that is dropped, names that
change places.
"""

from __future__ import annotations

import json
import random
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from coin_ray.data.formats import (
    Annotation,
    Dataset,
    ImageRecord,
    read_dataset,
    write_dataset,
)
from coin_ray.data.formats.coco import coco_files
from coin_ray.data.formats.voc import voc_xml
from coin_ray.data.formats.yolo import yolo_text
from coin_ray.errors import InputError

SIZE = (60, 40)
CLASSES = ("cat", "dog", "person", "car")
NAMES = ("a.png", "b b.png", "ü.png", "empty.png")
SPLITS = ("train", "val")
Records = dict[str, list[ImageRecord]]
"""The images of each split."""


def _make_records(folder: Path) -> Records:
    records = []
    for number, name in enumerate(NAMES):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", SIZE, (60 * number, 9, 90)).save(path)
        boxes = [
            Annotation((2 + 19 * n, 3 + n + number, 18 + 19 * n, 30), label)
            for n, label in enumerate(("person", "car", "person")[: 3 - number])
        ]
        records.append(ImageRecord.from_annotations(name, str(path), SIZE, boxes))
    return {"train": records[::2], "val": records[1::2]}


def _place(record: ImageRecord, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(record.uri, path)


def _write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def _own_format(format: str) -> Callable[[Records, Path], None]:
    def build(records: Records, folder: Path) -> None:
        for split in SPLITS:
            write_dataset(records[split], str(folder), format, split, CLASSES)

    return build


def _roboflow_coco(records: Records, folder: Path) -> None:
    for split, name in (("train", "train"), ("val", "valid")):
        [labels] = coco_files(records[split], split, CLASSES).values()
        _write(folder / name / "_annotations.coco.json", labels)
        for record in records[split]:
            _place(record, folder / name / record.file)


def _voc_beside_images(records: Records, folder: Path) -> None:
    for split in SPLITS:
        for record in records[split]:
            _place(record, folder / split / record.file)
            path = (folder / split / record.file).with_suffix(".xml")
            _write(path, voc_xml(record))


def _darknet(records: Records, folder: Path) -> None:
    lists = "train = data/train.txt\nvalid = data/val.txt\nnames = data/obj.names\n"
    _write(folder / "obj.data", f"classes = {len(CLASSES)}\n{lists}")
    _write(folder / "obj.names", "\n".join(CLASSES))
    for split in SPLITS:
        paths = [f"data/obj_{split}_data/{record.file}\n" for record in records[split]]
        _write(folder / f"{split}.txt", "".join(paths))
        for record in records[split]:
            path = folder / f"obj_{split}_data" / record.file
            _place(record, path)
            _write(path.with_suffix(".txt"), yolo_text(record, CLASSES))


def _kitti_of_fiftyone(records: Records, folder: Path) -> None:
    for split in SPLITS:
        for record in records[split]:
            _place(record, folder / split / "data" / record.file)
            lines = [
                f"{label} 0 0 0 {' '.join(map(str, box))} 0 0 0 0 0 0 0\n"
                for box, label in zip(record.boxes.tolist(), record.labels, strict=True)
            ]
            path = (folder / split / "labels" / record.file).with_suffix(".txt")
            _write(path, "".join(lines))


def _bdd100k_by_image(records: Records, folder: Path) -> None:
    for split in SPLITS:
        for record in records[split]:
            _place(record, folder / "images" / "100k" / split / record.file)
            objects = [
                {
                    "category": label,
                    "box2d": dict(zip(("x1", "y1", "x2", "y2"), box, strict=True)),
                }
                for box, label in zip(record.boxes.tolist(), record.labels, strict=True)
            ]
            stem = Path(record.file).stem
            labels = {"name": stem, "frames": [{"objects": objects}]}
            path = folder / "labels" / "100k" / split / f"{stem}.json"
            _write(path, json.dumps(labels))


def _cityscapes(records: Records, folder: Path) -> None:
    for split in SPLITS:
        for record in records[split]:
            stem = f"{split}/ulm/{Path(record.file).stem}"
            _place(record, folder / "leftImg8bit" / f"{stem}_leftImg8bit.png")
            objects = [
                {
                    "label": label,
                    "polygon": [[x1, y1], [x2, y1], [x2, y2], [x1, y2]],
                }
                for (x1, y1, x2, y2), label in zip(
                    record.boxes.tolist(), record.labels, strict=True
                )
            ]
            labels = {"imgWidth": SIZE[0], "imgHeight": SIZE[1], "objects": objects}
            path = folder / "gtFine" / f"{stem}_gtFine_polygons.json"
            _write(path, json.dumps(labels))


LAYOUTS: dict[str, Callable[[Records, Path], None]] = {
    **{name: _own_format(name) for name in ("coco", "voc", "yolo", "kitti", "bdd100k")},
    "Roboflow COCO": _roboflow_coco,
    "VOC beside images": _voc_beside_images,
    "darknet": _darknet,
    "KITTI of FiftyOne": _kitti_of_fiftyone,
    "BDD100K, a file for each image": _bdd100k_by_image,
    "Cityscapes": _cityscapes,
}


def _truth_of(dataset: Dataset) -> dict[bytes, set[tuple[Any, ...]]]:
    """The labelled boxes of each annotated image, by its bytes."""
    truth: dict[bytes, set[tuple[Any, ...]]] = {}
    for record in dataset.records:
        if record.annotated:
            boxes = record.boxes.round(4).tolist()
            rows = set(zip(map(tuple, boxes), record.labels, strict=True))
            # an image that is there twice must not have two truths
            assert truth.setdefault(Path(record.uri).read_bytes(), rows) == rows
    return truth


# Changes of files and folders


def _rename_upper(path: Path, draw: random.Random) -> None:
    path.rename(path.with_name(path.name.upper()))


def _rename_other(path: Path, draw: random.Random) -> None:
    path.rename(path.with_name(f"other {path.name}"))


def _rename_to_sibling(path: Path, draw: random.Random) -> None:
    """Give the file the name of another one, which goes."""
    sibling = draw.choice(sorted(path.parent.iterdir()))
    if sibling.is_file() and sibling.suffix == path.suffix and _is_image(path):
        sibling.unlink()


def _copy_beside(path: Path, draw: random.Random) -> None:
    shutil.copy(path, path.with_name(f"copy of {path.name}"))


def _copy_upper(path: Path, draw: random.Random) -> None:
    if path.name != path.name.upper():
        shutil.copy(path, path.with_name(path.name.upper()))


def _copy_to_other_suffix(path: Path, draw: random.Random) -> None:
    suffix = ".bmp" if _is_image(path) else f"{path.suffix}2"
    shutil.copy(path, path.with_suffix(suffix))


def _move_to_other_split(path: Path, draw: random.Random) -> None:
    target = path.parents[1] / draw.choice(["test", "train", "val"]) / path.name
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        path.rename(target)


def _copy_to_other_split(path: Path, draw: random.Random) -> None:
    target = path.parents[1] / draw.choice(["test", "train", "val"]) / path.name
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)


def _rename_folder(path: Path, draw: random.Random) -> None:
    folder = path.parent
    name = draw.choice([folder.name.upper(), f"other {folder.name}", "images"])
    if not folder.with_name(name).exists():
        folder.rename(folder.with_name(name))


def _copy_folder(path: Path, draw: random.Random) -> None:
    target = path.parent.with_name(f"copy of {path.parent.name}")
    if not target.exists():
        shutil.copytree(path.parent, target)


def _drop(path: Path, draw: random.Random) -> None:
    path.unlink()


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in (".png", ".bmp")


# Changes inside label files


def _lists_in(part: Any) -> Iterator[list[Any]]:
    """Yield the lists of objects in a JSON value."""
    if isinstance(part, list) and part and isinstance(part[0], dict):
        yield part
    for inner in part.values() if isinstance(part, dict) else ():
        yield from _lists_in(inner)
    for inner in part if isinstance(part, list) else ():
        yield from _lists_in(inner)


def _change_entries(
    change: Callable[[list[Any], random.Random], None],
) -> Callable[[Path, random.Random], None]:
    """Make the change of a file that changes a list of entries in it: JSON objects, XML
    objects, lines."""

    def change_file(path: Path, draw: random.Random) -> None:
        if path.suffix == ".json":
            labels = json.loads(path.read_text())
            lists = list(_lists_in(labels))
            if lists:
                change(draw.choice(lists), draw)
            path.write_text(json.dumps(labels))
        elif path.suffix == ".xml":
            root = ET.fromstring(path.read_bytes())
            entries = list(root)
            change(entries, draw)
            root[:] = entries
            path.write_bytes(ET.tostring(root, "utf-8"))
        elif path.suffix in (".txt", ".data", ".yaml"):
            lines = path.read_text().splitlines()
            change(lines, draw)
            path.write_text("\n".join(lines))

    change_file.__name__ = change.__name__
    return change_file


@_change_entries
def _reverse(entries: list[Any], draw: random.Random) -> None:
    entries.reverse()


@_change_entries
def _shuffle(entries: list[Any], draw: random.Random) -> None:
    draw.shuffle(entries)


@_change_entries
def _double(entries: list[Any], draw: random.Random) -> None:
    entries += entries


@_change_entries
def _double_one(entries: list[Any], draw: random.Random) -> None:
    if entries:
        entries.insert(0, draw.choice(entries))


def _drop_entry(path: Path, draw: random.Random) -> None:
    """Drop an image, a category or a frame, or a line of a list of images."""
    if path.suffix == ".json":
        labels = json.loads(path.read_text())
        by_key = labels if isinstance(labels, dict) else {"images": labels}
        for key in ("images", "categories"):
            if by_key.get(key) and draw.random() < 0.5:
                by_key[key].pop(draw.randrange(len(by_key[key])))
        path.write_text(json.dumps(labels))
    elif path.name in ("train.txt", "val.txt", "obj.names", "data.yaml"):
        lines = path.read_text().splitlines()
        lines.pop(draw.randrange(len(lines)))
        path.write_text("\n".join(lines))


def _drop_key(path: Path, draw: random.Random) -> None:
    """Drop a key of every entry of a list in JSON: its id, its size, its name."""
    if path.suffix == ".json":
        labels = json.loads(path.read_text())
        entries = draw.choice([[labels], *_lists_in(labels)])
        keys = sorted(entries[0]) if isinstance(entries[0], dict) else []
        key = draw.choice(keys) if keys else ""
        for entry in entries if key else ():
            entry.pop(key, None)
        path.write_text(json.dumps(labels))


def _rename_in_labels(path: Path, draw: random.Random) -> None:
    """Write the image's name as other tools do, or another name."""
    if path.suffix not in (".json", ".xml", ".txt"):
        return
    name = draw.choice(NAMES)
    stem = Path(name).stem
    others = (name.upper(), f"images\\\\{name}", f"/data/{name}", f"https://h/{name}")
    new_name = draw.choice([*others, name.replace(" ", "%20"), stem, f"x{name}", ""])
    path.write_text(path.read_text().replace(name, new_name))


CHANGES: tuple[Callable[[Path, random.Random], None], ...] = (
    _rename_upper,
    _rename_other,
    _rename_to_sibling,
    _copy_beside,
    _copy_upper,
    _copy_to_other_suffix,
    _move_to_other_split,
    _copy_to_other_split,
    _rename_folder,
    _copy_folder,
    _drop,
)
CHANGES_INSIDE: tuple[Callable[[Path, random.Random], None], ...] = (
    _reverse,
    _shuffle,
    _double,
    _double_one,
    _drop_entry,
    _drop_key,
    _rename_in_labels,
)
ORDER_IS_MEANING = {"obj.names", "data.yaml"}
"""Files whose lines may not change places: their order numbers the classes."""


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 1 << 20),
    changes=st.lists(st.sampled_from(CHANGES + CHANGES_INSIDE), min_size=1, max_size=3),
)
def test_a_changed_set_is_an_error_or_has_the_same_truth(
    tmp_path_factory: pytest.TempPathFactory,
    layout: str,
    seed: int,
    changes: Sequence[Callable[[Path, random.Random], None]],
) -> None:
    folder, draw = tmp_path_factory.mktemp("set"), random.Random(seed)
    LAYOUTS[layout](_make_records(folder / "from"), folder / "to")
    truths = {}
    for split in SPLITS:
        truths |= _truth_of(read_dataset(f"{folder / 'to'}#{split}"))
    assert len(truths) == len(NAMES)
    for change in changes:
        paths = sorted(path for path in (folder / "to").rglob("*") if path.is_file())
        if change in CHANGES_INSIDE:
            paths = [path for path in paths if not _is_image(path)]
        if change in (_reverse, _shuffle):
            paths = [path for path in paths if path.name not in ORDER_IS_MEANING]
        try:
            change(draw.choice(paths), draw)
        except (OSError, IndexError, ValueError, ET.ParseError):
            continue
    for split in SPLITS:
        try:
            changed = _truth_of(read_dataset(f"{folder / 'to'}#{split}"))
        except InputError:
            continue
        for image, boxes in changed.items():
            assert boxes == truths[image]
