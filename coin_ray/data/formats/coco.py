"""COCO detection: one JSON file among or beside its images, or one for each split.

Boxes are (left, top, width, height) from 0. Crowds and ignored boxes count as
difficult. An image that the file does not list is not annotated.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from coin_ray.data.formats.conventions import (
    LEFT_TOP_SIZE,
    check_against_polygons,
    check_boxes,
)
from coin_ray.data.formats.folder import (
    DatasetFolder,
    split_of_folder,
    strip_suffix,
)
from coin_ray.data.formats.json_stream import iterate_json
from coin_ray.data.formats.parsing import image_size, parse_flag, read_head
from coin_ray.data.formats.record import (
    Dataset,
    ImageRecord,
    LeftOut,
    UnreadableLabels,
    check_readable,
    collect_class_names,
)
from coin_ray.data.formats.turned import extent_of_turned
from coin_ray.data.threads import map_in_threads
from coin_ray.errors import InputError

Key = int | str
SINGLE_FILES = (
    "annotations.json",
    "_annotations.coco.json",
    "labels.json",
    "result.json",
    "coco.json",
    "instances.json",
    "instances_default.json",
)
"""Files that hold all labels of the folder they are in, as tools name them."""
OTHER_TASKS = ("captions_", "person_keypoints_", "stuff_", "panoptic_", "image_info_")
LISTS = frozenset(("images", "annotations", "categories"))
MOST_POLYGONS = 200
"""Polygons of a file that its boxes are compared with."""
WRITTEN_BY = "coin_ray: every listed image is annotated"
"""The description in files that ``coco_files`` makes."""
DESCRIPTION = "COCO json"


@dataclass
class _Labels:
    """The columns of a file. ``edges``: left, top, width, height of each annotation;
    ``polygon_boxes``: such numbers of some annotations, and those of their polygons.
    """

    images: list[tuple[Key, str, int, int]] = field(default_factory=list)
    names: dict[Key, str] = field(default_factory=dict)
    image_ids: list[Key] = field(default_factory=list)
    category_ids: list[Key] = field(default_factory=list)
    edges: array[float] = field(default_factory=lambda: array("d"))
    difficult: bytearray = field(default_factory=bytearray)
    images_without_box: Counter[Key] = field(default_factory=Counter)
    repeated_ids: int = 0
    turned_count: int = 0
    polygon_boxes: list[tuple[list[float], list[float]]] = field(default_factory=list)
    has_annotations: bool = False
    error_of_image: dict[Key, str] = field(default_factory=dict)


def is_coco(folder: DatasetFolder) -> bool:
    """Tell whether the folder is in the COCO format."""
    return bool(_find_labels(folder))


def _find_labels(folder: DatasetFolder) -> dict[str, str]:
    """Return the label files by split: "" for that of the whole folder."""
    root_files = [path for path in folder.list_paths("", ".json") if "/" not in path]
    single_files = [name for name in SINGLE_FILES if name in root_files]
    single_files = [name for name in single_files if looks_like_coco(folder, name)]
    if not single_files and not folder.first_folder("annotations"):
        single_files = [name for name in root_files if looks_like_coco(folder, name)]
    if len(single_files) == 1:
        return {"": single_files[0]}
    if single_files:
        return {strip_suffix(name): name for name in single_files}
    return _split_files(folder) or _files_in_split_folders(folder)


def _split_files(folder: DatasetFolder) -> dict[str, str]:
    """Return the label files of ``annotations/`` by split."""
    paths_by_split = {
        strip_suffix(path.removeprefix("annotations/")): path
        for path in folder.list_paths("annotations", ".json")
        if path.count("/") == 1
    }
    instances = {
        stem.removeprefix("instances_"): path
        for stem, path in paths_by_split.items()
        if stem.startswith("instances_")
    }
    if instances:
        folder.read_paths.update(paths_by_split.values())
        return instances
    return {
        stem: path
        for stem, path in paths_by_split.items()
        if looks_like_coco(folder, path)
    }


def _files_in_split_folders(folder: DatasetFolder) -> dict[str, str]:
    """Return the label files of ``train/_annotations.coco.json`` and the like."""
    paths_by_split: dict[str, str] = {}
    for path in folder.list_paths("", *(f"/{name}" for name in SINGLE_FILES)):
        split, _, name = path.rpartition("/")
        if name in SINGLE_FILES and looks_like_coco(folder, path):
            if split in paths_by_split:
                raise InputError(
                    f"{folder.root}/{split} has two label files, {name} and"
                    f" {paths_by_split[split]}; leave one"
                )
            paths_by_split[split] = path
    return paths_by_split


def looks_like_coco(folder: DatasetFolder, path: str) -> bool:
    """Tell from its first keys whether a JSON file is in the COCO format. A file of a
    COCO name whose start does not tell is taken for one.
    """
    head = read_head(folder.uris[path])
    if path.rpartition("/")[2] in ("annotations.json", "_annotations.coco.json"):
        return True
    has_images = b'"images"' in head or b'"file_name"' in head
    has_labels = any(
        key in head
        for key in (b'"annotations"', b'"categories"', b'"image_id"', b'"licenses"')
    )
    return head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{" and has_images and has_labels


def read_coco(folder: DatasetFolder) -> Dataset:
    """Read a COCO folder. Raises InputError naming file and entry."""
    paths_by_split = _find_labels(folder)
    folder.read_paths.update(paths_by_split.values())
    if "" in paths_by_split:
        path = paths_by_split[""]
        if folder.split and folder.split != strip_suffix(path):
            raise InputError(
                f"{folder.root} has no split {folder.split!r}: {path} holds the labels"
                " of the whole folder"
            )
        return _read_labels(folder, path, "")
    selected = _select_files(folder, paths_by_split)
    datasets = [_read_labels(folder, path, split) for split, path in selected.items()]
    if len(datasets) == 1:
        return datasets[0]
    names = dict.fromkeys(name for dataset in datasets for name in dataset.names)
    return Dataset(
        "coco",
        tuple(record for dataset in datasets for record in dataset.records),
        tuple(names),
        tuple(name for dataset in datasets for name in dataset.missing),
        tuple(image for dataset in datasets for image in dataset.left_out),
        notes=tuple(note for dataset in datasets for note in dataset.notes),
        unreadable=tuple(
            labels for dataset in datasets for labels in dataset.unreadable
        ),
    )


def _select_files(
    folder: DatasetFolder, paths_by_split: Mapping[str, str]
) -> dict[str, str]:
    """Return the file of the folder's split; without a split the only file, or all
    files if each is in the folder of its images.
    """
    split = folder.split
    if split and split not in paths_by_split:
        expected = split_of_folder(split)
        same = [
            s for s in paths_by_split if expected and split_of_folder(s) == expected
        ]
        split = same[0] if len(same) == 1 else split
    if split and split not in paths_by_split:
        folder.select_split(paths_by_split, "annotations/instances_*.json")
    if split:
        return {split: paths_by_split[split]}
    in_own_folder = all(
        path.rpartition("/")[0] == name for name, path in paths_by_split.items()
    )
    if len(paths_by_split) > 1 and not in_own_folder:
        splits = " or ".join(f"{folder.root}#{name}" for name in sorted(paths_by_split))
        raise InputError(
            f"{folder.root} has several annotation files; say which: {splits}"
        )
    return dict(paths_by_split)


def _read_labels(folder: DatasetFolder, path: str, split: str) -> Dataset:
    uri = folder.uris[path]
    labels = _read_columns(uri)
    own_folder = path.rpartition("/")[0]
    if own_folder in ("annotations", ""):
        own_folder = ""
    image_folders = _image_folders(own_folder, split)
    path_of_image = _find_images(folder, labels, image_folders, split, uri)
    unreadable: list[UnreadableLabels] = []
    records = list(_make_records(folder, labels, path_of_image, uri, unreadable))
    annotated_count = sum(record.annotated for record in records)
    errors = check_readable(unreadable, annotated_count)
    unlisted = _unlisted_images(folder, own_folder, split, path_of_image)
    left_out: tuple[LeftOut, ...] = ()
    if split == "" or own_folder:
        records += map_in_threads(
            lambda path: _read_unlisted(folder, path, own_folder), unlisted
        )
    else:
        reason = f"not listed in {path}"
        left_out = tuple(LeftOut(folder.uris[path], reason) for path in unlisted)
    missing = tuple(
        name
        for (_, name, _, _), image in zip(labels.images, path_of_image, strict=True)
        if image is None
    )
    names = collect_class_names(records, list(dict.fromkeys(labels.names.values())))
    notes = _notes(labels, path)
    return Dataset("coco", tuple(records), names, missing, left_out, (), notes, errors)


def _image_folders(own_folder: str, split: str) -> tuple[str, ...]:
    if own_folder:
        return own_folder, f"{own_folder}/images", f"{own_folder}/data"
    if split:
        return split, f"images/{split}", f"{split}/images", "images", "data", ""
    return "images", "data", ""


def _notes(labels: _Labels, path: str) -> tuple[str, ...]:
    notes = []
    if not labels.has_annotations:
        notes.append(f"{path} holds no annotation, so none of its images is annotated")
    if labels.images_without_box:
        count = labels.images_without_box.total()
        notes.append(f"{path}: {count} annotations have an empty box and no polygon")
    if labels.repeated_ids:
        count = labels.repeated_ids
        notes.append(
            f"{path}: {count} annotations have the id of another; all are read"
        )
    if labels.turned_count:
        count = labels.turned_count
        notes.append(
            f"{path}: {count} boxes that are turned by their attribute rotation became"
            " the upright ones around them"
        )
    return tuple(notes)


def _read_columns(uri: str) -> _Labels:
    labels = _Labels()
    found_lists = set()
    written_by_us = WRITTEN_BY.encode() in read_head(uri)
    image_ids: set[Key] = set()
    annotation_ids = _Ids()
    for key, position, entry in iterate_json(uri, DESCRIPTION, LISTS):
        if position < 0:
            found_lists.add(key)
            continue
        try:
            if key == "annotations":
                _add_annotation(labels, entry, annotation_ids)
            elif key == "images":
                _add_image(labels, entry, image_ids)
            else:
                _add_category(labels, entry)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            message = f"{uri} is not {DESCRIPTION}: {key}.{position}: {reason}"
            image_id = entry.get("image_id") if isinstance(entry, dict) else None
            if key != "annotations" or not isinstance(image_id, (int, str)):
                raise InputError(message) from None
            labels.error_of_image.setdefault(image_id, message)
            del labels.edges[4 * len(labels.image_ids) :]  # what was read of the box
    required = ("images", "categories") if "image_info" in uri else sorted(LISTS)
    absent = [f"{key}: Field required" for key in required if key not in found_lists]
    if absent:
        raise InputError(f"{uri} is not {DESCRIPTION}: {'; '.join(absent)}")
    labels.repeated_ids = annotation_ids.count_repeated()
    labels.has_annotations = bool(labels.image_ids) or written_by_us
    return labels


def _add_image(labels: _Labels, entry: Any, earlier_ids: set[Key]) -> None:
    key, name = entry["id"], entry["file_name"]
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"file_name: expected a text, got {name!r}")
    _check_new_key(key, earlier_ids)
    earlier_ids.add(key)
    sides = (int(entry.get("width") or 0), int(entry.get("height") or 0))
    labels.images.append((key, name, *sides))


def _add_category(labels: _Labels, entry: Any) -> None:
    key, name = entry["id"], entry["name"]
    if not isinstance(name, str):
        raise ValueError(f"name: expected a text, got {name!r}")
    _check_new_key(key, labels.names)
    labels.names[key] = name.strip()


def _check_new_key(key: Any, earlier: Iterable[Key]) -> None:
    if not isinstance(key, (int, str)) or isinstance(key, bool):
        raise ValueError(f"id: expected a number or a text, got {key!r}")
    if key in earlier:  # type: ignore[operator]
        raise ValueError(f"id {key!r} is in the file twice; give each entry its own id")


class _Ids:
    """Ids of annotations."""

    def __init__(self) -> None:
        self.keys: list[Any] = []
        self.add = self.keys.append

    def count_repeated(self) -> int:
        """Return how many ids occurred before; entries without one do not count."""
        try:
            # numbers that rise, as they usually do, need no set
            keys = np.array(self.keys, np.int64)
            if (keys[1:] > keys[:-1]).all():
                return 0
        except (TypeError, ValueError, OverflowError):
            pass
        known_keys = [key for key in self.keys if key is not None]
        return len(known_keys) - len(set(map(str, known_keys)))


def _add_annotation(labels: _Labels, entry: Any, ids: _Ids) -> None:
    image_id, category_id = entry["image_id"], entry["category_id"]
    if "id" in entry:
        ids.add(entry["id"])
    box, polygon = entry.get("bbox"), entry.get("segmentation")
    is_compared = len(labels.polygon_boxes) < MOST_POLYGONS
    if not box or (polygon and (is_compared or not any(box))):
        box = _compare_polygon(labels, box, polygon)
    if not box and entry.get("bbox") == []:
        labels.images_without_box[image_id] += 1
        return
    if not isinstance(box, list) or len(box) != 4:
        raise ValueError(f"bbox: expected four numbers or a polygon, got {box!r}")
    crowd, ignore = entry.get("iscrowd"), entry.get("ignore")
    is_difficult = False
    if crowd or ignore:
        is_difficult = parse_flag(crowd) or parse_flag(ignore)
    attributes = entry.get("attributes")
    if attributes:
        box = _make_upright(labels, box, attributes)
    labels.edges.extend(box)
    labels.image_ids.append(image_id)
    labels.category_ids.append(category_id)
    labels.difficult.append(is_difficult)


def _compare_polygon(labels: _Labels, box: Any, segmentation: Any) -> Any:
    """Return the box, or that of the polygon where the file has none or an empty one;
    note both where it has both.
    """
    has_numbers = isinstance(box, list) and len(box) == 4
    if has_numbers and not isinstance(segmentation, list):
        return box  # a run-length mask
    polygon_box = _outer_box(segmentation)
    if not box or (has_numbers and not any(box)):
        return polygon_box or box
    if has_numbers and polygon_box:
        labels.polygon_boxes.append((box, polygon_box))
    return box


def _make_upright(labels: _Labels, box: list[float], attributes: Any) -> list[float]:
    """Return (left, top, width, height) around a box that its attribute ``rotation``
    turns about its centre, as CVAT exports it.
    """
    degrees = attributes.get("rotation") if isinstance(attributes, dict) else None
    if not degrees or not isinstance(degrees, (int, float)):
        return box
    labels.turned_count += 1
    left, top, width, height = box
    edges = left, top, left + width, top + height
    centre = left + width / 2, top + height / 2
    x1, y1, x2, y2 = extent_of_turned(edges, degrees, centre)
    return [x1, y1, x2 - x1, y2 - y1]


def _outer_box(segmentation: Any) -> list[float]:
    """Return (left, top, width, height) around polygons; empty without a polygon."""
    if not segmentation:
        return []
    if not isinstance(segmentation, list):
        raise ValueError("bbox: a run-length mask needs a bbox beside it, got none")
    polygons = segmentation if isinstance(segmentation[0], list) else [segmentation]
    x = [number for polygon in polygons for number in polygon[::2]]
    y = [number for polygon in polygons for number in polygon[1::2]]
    if not x or not y:
        return []
    return [min(x), min(y), max(x) - min(x), max(y) - min(y)]


def _find_images(
    folder: DatasetFolder,
    labels: _Labels,
    image_folders: Sequence[str],
    split: str,
    uri: str,
) -> list[str | None]:
    """Return the path of each listed image; None where there is none. Raises InputError
    if two entries are one image.
    """
    paths: list[str | None] = []
    name_of_path: dict[str, str] = {}
    for _, name, _, _ in labels.images:
        path = folder.find_image(name, *image_folders, split=split)
        paths.append(path)
        if path is None:
            continue
        if path in name_of_path:
            raise InputError(
                f"{uri} lists the image {path} twice, as {name_of_path[path]} and as"
                f" {name}; an image has one entry with all its boxes"
            )
        name_of_path[path] = name
    return paths


def _make_records(
    folder: DatasetFolder,
    labels: _Labels,
    path_of_image: Sequence[str | None],
    uri: str,
    unreadable: list[UnreadableLabels],
) -> Iterator[ImageRecord]:
    """Yield the record of each image that is there; images whose annotations have an
    error are not annotated, and are added to ``unreadable``.
    """
    order, bounds, name_rows = _sort_by_image(labels, uri)
    edges = np.frombuffer(labels.edges, np.float64).reshape(-1, 4)
    boxes = edges[order]
    sizes = _image_sizes(folder, labels, path_of_image)
    box_sizes = np.repeat(np.array(sizes, np.float64), np.diff(bounds), axis=0)
    check_against_polygons(
        labels.polygon_boxes, LEFT_TOP_SIZE, f"{uri} is not {DESCRIPTION}: bbox"
    )
    check_boxes(boxes, box_sizes, LEFT_TOP_SIZE, f"{uri} is not {DESCRIPTION}: bbox")
    boxes[:, 2:] += boxes[:, :2]
    difficult = np.frombuffer(labels.difficult, np.bool_)[order]
    names = list(labels.names.values())
    label_rows = [names[row] for row in name_rows[order].tolist()]
    errors = dict(labels.error_of_image)
    for row, (key, name, _, _) in enumerate(labels.images):
        path, error_message = path_of_image[row], errors.pop(key, "")
        if key in labels.images_without_box and bounds[row] == bounds[row + 1]:
            error_message = f"{uri}: no annotation of {name} has a box or a polygon"
        if path is None:
            if error_message:
                unreadable.append(UnreadableLabels(name, error_message))
            continue
        boxes_of_image = slice(bounds[row], bounds[row + 1])
        image_uri, (width, height) = folder.uris[path], sizes[row]
        try:
            if error_message:
                raise InputError(error_message)
            yield ImageRecord(
                name,
                image_uri,
                width,
                height,
                boxes[boxes_of_image],
                tuple(label_rows[boxes_of_image]),
                difficult[boxes_of_image],
                labels.has_annotations,
            )
        except InputError as error:
            unreadable.append(UnreadableLabels(image_uri, str(error)))
            yield ImageRecord.from_annotations(
                name, image_uri, sizes[row], [], annotated=False
            )
    if errors:
        raise InputError(min(errors.values()))


def _sort_by_image(labels: _Labels, uri: str) -> tuple[Any, list[int], Any]:
    """Return the order of annotations by image, where each image's begin in it, and the
    row of the category of each annotation.
    """
    rows = []
    for field_name, ids, known in (
        ("image_id", labels.image_ids, [image[0] for image in labels.images]),
        ("category_id", labels.category_ids, list(labels.names)),
    ):
        row_of_key = {key: row for row, key in enumerate(known)}
        try:
            rows.append(
                np.fromiter(map(row_of_key.__getitem__, ids), np.int64, len(ids))
            )
        except (KeyError, TypeError):
            bad = next(n for n, key in enumerate(ids) if not _is_known(key, row_of_key))
            raise InputError(
                f"{uri} is not {DESCRIPTION}: annotations.{bad}.{field_name}"
                f" {ids[bad]!r} is not in the file"
            ) from None
    order = np.argsort(rows[0], kind="stable")
    counts = np.bincount(rows[0], minlength=len(labels.images))
    bounds = np.concatenate([[0], np.cumsum(counts)]).tolist()
    return order, bounds, rows[1]


def _is_known(key: Any, rows: Mapping[Key, int]) -> bool:
    return isinstance(key, (int, str)) and key in rows


def _image_sizes(
    folder: DatasetFolder, labels: _Labels, path_of_image: Sequence[str | None]
) -> list[tuple[int, int]]:
    """Return the size of each image as the file says, else from the image's header."""
    sizes = [(width, height) for _, _, width, height in labels.images]
    unknown = [
        (row, path)
        for row, path in enumerate(path_of_image)
        if path is not None and not all(sizes[row])
    ]
    read_sizes = map_in_threads(lambda item: image_size(folder.uris[item[1]]), unknown)
    for (row, _), size in zip(unknown, read_sizes, strict=True):
        sizes[row] = size
    return sizes


def _unlisted_images(
    folder: DatasetFolder,
    own_folder: str,
    split: str,
    path_of_image: Sequence[str | None],
) -> list[str]:
    """List the images that belong to the file by their folder and are not listed."""
    listed = set(path_of_image)
    if own_folder or not split:
        paths = folder.list_images(own_folder)
    else:
        image_folders = (split, f"images/{split}", f"{split}/images")
        image_folder = folder.first_folder(*image_folders)
        paths = folder.list_images(image_folder) if image_folder else []
    return [path for path in paths if path not in listed]


def _read_unlisted(folder: DatasetFolder, path: str, own_folder: str) -> ImageRecord:
    uri = folder.uris[path]
    file = path.removeprefix(f"{own_folder}/" if own_folder else "images/")
    return ImageRecord.from_annotations(file, uri, image_size(uri), [], annotated=False)


def coco_files(
    records: Sequence[ImageRecord], split: str, names: Sequence[str]
) -> dict[str, bytes]:
    """Return ``annotations/instances_SPLIT.json``, without images that are not
    annotated.
    """
    category_ids = {name: number for number, name in enumerate(names, start=1)}
    annotated = [record for record in records if record.annotated]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, record in enumerate(annotated, start=1):
        image = {"id": image_id, "file_name": record.file}
        images.append(image | {"width": record.width, "height": record.height})
        rows = zip(record.boxes.tolist(), record.labels, record.difficult, strict=True)
        for (x1, y1, x2, y2), label, difficult in rows:
            width, height = x2 - x1, y2 - y1
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_ids[label],
                    "bbox": [x1, y1, width, height],
                    "area": width * height,
                    "iscrowd": int(difficult),
                }
            )
    labels = {
        "info": {"description": WRITTEN_BY},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": n, "name": name} for name, n in category_ids.items()],
    }
    return {f"annotations/instances_{split}.json": json.dumps(labels).encode()}
