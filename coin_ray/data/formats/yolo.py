"""YOLO: one text file per image below ``labels/...`` or beside it, class names in
``data.yaml``, ``classes.txt`` or darknet's ``obj.names``.

A line is ``class x y width height`` as shares of the image, centre first; a polygon
(``class x y x y ...``) becomes its box. With ``kpt_shape`` key points follow the box.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from coin_ray import storage
from coin_ray.data.file_kinds import IMAGE_SUFFIXES
from coin_ray.data.formats.conventions import CENTRE_SIZE, check_records
from coin_ray.data.formats.folder import DatasetFolder, match_key, strip_suffix
from coin_ray.data.formats.parsing import format_number, image_size, parse_number
from coin_ray.data.formats.record import (
    Annotation,
    Dataset,
    FolderError,
    ImageRecord,
    UnreadableLabels,
    check_readable,
)
from coin_ray.data.threads import map_in_threads
from coin_ray.errors import InputError
from coin_ray.storage import JsonObject

YAMLS = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
NAME_LISTS = ("classes.txt", "obj.names", "data/obj.names", "classes.names")
SPLITS = ("train", "val", "test")
SPLIT_OF_KEY = {"train": "train", "val": "val", "valid": "val", "test": "test"}
SHARES = (-0.01, 1.01)
"""Lowest and highest value of a line, as in Ultralytics: numbers are rounded."""
MESSAGE_LENGTH = 200


@dataclass(frozen=True)
class _Settings:
    """What data.yaml, or darknet's obj.data, says. ``key_point_numbers``: how many
    follow each box; ``sources``: folders, lists or images by split.
    """

    uri: str
    names: tuple[str, ...]
    sources: Mapping[str, Any]
    base: Any = None
    key_point_numbers: int = 0


def is_yolo(folder: DatasetFolder) -> bool:
    """Tell whether the folder is in the YOLO format."""
    return bool(_settings_path(folder))


def _settings_path(folder: DatasetFolder) -> str:
    """Return the file that names the classes; "" if there is none. Raises InputError
    if several files of other names do.
    """
    for name in YAMLS:
        if name in folder.uris:
            return name
    paths = [p for p in folder.list_paths("", ".yaml", ".yml") if "/" not in p]
    described = [path for path in paths if _is_data_yaml(folder.uris[path])]
    if len(described) > 1:
        raise InputError(
            f"{folder.root} has several YOLO files, {', '.join(described)}; name the"
            " one to read data.yaml"
        )
    if described:
        return described[0]
    data_files = [p for p in folder.list_paths("", ".data") if p.count("/") < 2]
    lists = [name for name in NAME_LISTS if name in folder.uris]
    candidates = [*data_files, *lists]
    if candidates and any(_label_of(folder, path) for path in folder.list_images()):
        return candidates[0]
    return ""


def _is_data_yaml(uri: str) -> bool:
    try:
        settings = yaml.load(storage.read_bytes(uri), _UniqueKeys)
    except (yaml.YAMLError, InputError):
        return False
    has_names = isinstance(settings, dict) and "names" in settings
    return has_names and not {"nc", "path", *SPLIT_OF_KEY}.isdisjoint(settings)


def read_yolo(folder: DatasetFolder) -> Dataset:
    """Read a YOLO folder. Images without a text file are not annotated. Raises
    InputError naming file and line.
    """
    settings_path = _settings_path(folder)
    settings = _read_settings(folder, settings_path)
    paths: list[str] = []
    if settings.sources:
        selected = folder.select_split(settings.sources, f"split in {settings_path}")
        for sources in selected:
            paths += _image_paths(folder, sources, settings.base)
    elif folder.split:
        raise InputError(
            f"{folder.root} has no split {folder.split!r}: {settings_path} names none"
        )
    else:
        paths = folder.list_images()
    paths = list(dict.fromkeys(paths))
    _claim_label_files(folder, settings_path, settings)
    present = [path for path in paths if path in folder.uris]
    label_of_image = {path: _label_of(folder, path) for path in present}
    _check_own_labels(folder, label_of_image)

    unreadable: list[UnreadableLabels] = []

    def read_record(path: str) -> ImageRecord:
        uri, label = folder.uris[path], label_of_image[path]
        size = image_size(uri)
        if label is not None:
            try:
                annotations = _read_annotations(folder, label, settings, size)
                return ImageRecord.from_annotations(
                    _file_of(path), uri, size, annotations
                )
            except FolderError:
                raise
            except InputError as error:
                labels = UnreadableLabels(folder.uris[label], str(error))
                unreadable.append(labels)
        return ImageRecord.from_annotations(
            _file_of(path), uri, size, [], annotated=False
        )

    missing = [path for path in paths if path not in folder.uris]
    missing += _labels_without_image(folder, label_of_image)
    records = tuple(map_in_threads(read_record, present))
    check_records(records, CENTRE_SIZE, folder.root)
    annotated_count = sum(record.annotated for record in records)
    errors = check_readable(unreadable, annotated_count)
    return Dataset("yolo", records, settings.names, tuple(missing), unreadable=errors)


def _claim_label_files(
    folder: DatasetFolder, settings_path: str, settings: _Settings
) -> None:
    """Note which files were understood: settings, and the text files of the images of
    all splits.
    """
    for path in (*YAMLS, *NAME_LISTS, settings_path, "notes.json"):
        if path in folder.uris:
            folder.read_paths.add(path)
    images = folder.list_images()
    if settings.sources:
        images = [
            path
            for sources in settings.sources.values()
            for path in _image_paths(folder, sources, settings.base, optional=True)
        ]
    for path in images:
        label = _label_of(folder, path)
        if label is not None:
            folder.read_paths.add(label)


def _label_of(folder: DatasetFolder, path: str) -> str | None:
    """Return the label file of an image, below ``labels/`` or beside it."""
    label_path = _label_path(path)
    return folder.find_path(label_path) or folder.find_path(f"{strip_suffix(path)}.txt")


def _check_own_labels(
    folder: DatasetFolder, label_of_image: Mapping[str, str | None]
) -> None:
    """Check that no two images share a label file."""
    image_of_label: dict[str, str] = {}
    for path, label in label_of_image.items():
        if label is None:
            continue
        if label in image_of_label:
            raise InputError(
                f"{folder.uris[label]} is the label file of {image_of_label[label]} and"
                f" of {path}; rename one of them"
            )
        image_of_label[label] = path


def _labels_without_image(
    folder: DatasetFolder, label_of_image: Mapping[str, str | None]
) -> list[str]:
    """List the text files in the folders of the split's labels that no image has."""
    labels = {label for label in label_of_image.values() if label is not None}
    folders = {label.rpartition("/")[0] for label in labels}
    folders |= {_label_path(path).rpartition("/")[0] for path in label_of_image}
    folders = {name for name in folders if "labels" in name.split("/")}
    image_labels = labels | folder.read_paths
    return [
        path
        for path in folder.list_paths("", ".txt")
        if path.rpartition("/")[0] in folders
        and path not in image_labels
        and match_key(path.rpartition("/")[2]) != "classes.txt"
    ]


class _UniqueKeys(yaml.SafeLoader):
    """A loader that refuses a key twice in one mapping."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        construct_object: Any = self.construct_object
        keys = [construct_object(key, deep=True) for key, _ in node.value]
        repeated = next((key for key in keys if keys.count(key) > 1), None)
        if repeated is not None:
            raise InputError(f"it has the key {repeated!r} twice")
        return dict(super().construct_mapping(node, deep))


def _read_yaml(uri: str) -> JsonObject:
    try:
        settings = yaml.load(storage.read_bytes(uri), _UniqueKeys)
    except (yaml.YAMLError, InputError) as error:
        raise InputError(f"{uri} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise InputError(
            f"{uri}: expected a mapping with names and train, got"
            f" {type(settings).__name__}"
        )
    return settings


def _read_settings(folder: DatasetFolder, path: str) -> _Settings:
    uri = folder.uris[path]
    if path.endswith(".data"):
        return _read_darknet(folder, path)
    if not path.lower().endswith((".yaml", ".yml")):
        return _Settings(uri, _listed_names(folder, path), {})
    settings = _read_yaml(uri)
    names = _class_names(settings.get("names"), uri)
    count = settings.get("nc")
    if count is not None and count != len(names):
        raise InputError(f"{uri}: nc is {count!r}, but there are {len(names)} names")
    sources: JsonObject = {}
    for key, split in SPLIT_OF_KEY.items():
        if settings.get(key):
            if split in sources and sources[split] != settings[key]:
                raise InputError(f"{uri}: val and valid name different images")
            sources[split] = settings[key]
    if folder.split in SPLIT_OF_KEY and folder.split not in sources:
        sources = {
            folder.split if SPLIT_OF_KEY[folder.split] == split else split: source
            for split, source in sources.items()
        }
    key_points = _key_point_numbers(settings.get("kpt_shape"), uri)
    return _Settings(uri, names, sources, settings.get("path"), key_points)


def _key_point_numbers(shape: Any, uri: str) -> int:
    if shape is None:
        return 0
    is_shape = isinstance(shape, list) and len(shape) == 2
    if not is_shape or not all(isinstance(n, int) and n > 0 for n in shape):
        raise InputError(
            f"{uri}: kpt_shape must be [points, 2] or [points, 3]; got {shape!r}"
        )
    return int(shape[0] * shape[1])


def _read_darknet(folder: DatasetFolder, path: str) -> _Settings:
    """Read darknet's ``obj.data``: lines ``names = FILE``, ``train = LIST``."""
    uri = folder.uris[path]
    settings: dict[str, str] = {}
    for line in folder.read_lines(path):
        key, separator, value = line.partition("=")
        if separator and not key.lstrip().startswith("#"):
            if key.strip() in settings:
                raise InputError(f"{uri} has {key.strip()} twice")
            settings[key.strip()] = value.strip()
    names_path = _locate(folder, settings.get("names", "obj.names"), None)
    if names_path not in folder.uris:
        raise InputError(f"{uri}: the file of class names {names_path} is not there")
    names = _listed_names(folder, names_path)
    if settings.get("classes", str(len(names))) != str(len(names)):
        raise InputError(
            f"{uri}: classes is {settings['classes']}, but {names_path} has"
            f" {len(names)} names"
        )
    sources: JsonObject = {}
    for key, split in SPLIT_OF_KEY.items():
        if key in settings:
            list_path = _locate(folder, settings[key], None)
            if list_path in folder.uris:
                folder.read_paths.add(list_path)
                sources[split] = settings[key]
    folder.read_paths.add(names_path)
    return _Settings(uri, names, sources)


def _listed_names(folder: DatasetFolder, path: str) -> tuple[str, ...]:
    """Read a file of class names, one per line; blank lines at the end do not count."""
    lines = [line.strip() for line in folder.read_lines(path)]
    while lines and not lines[-1]:
        lines.pop()
    if not lines or "" in lines:
        raise InputError(f"{folder.uris[path]}: expected one class name per line")
    return tuple(lines)


def _class_names(names: Any, uri: str) -> tuple[str, ...]:
    by_number = dict(enumerate(names)) if isinstance(names, list) else names
    if isinstance(by_number, dict):
        texts = {key: str(key).strip() for key in by_number}
        by_number = {
            int(texts[key]) if texts[key].isdecimal() else key: name
            for key, name in by_number.items()
        }
        if len(by_number) < len(texts):
            raise InputError(f"{uri}: names has a class number twice")
    if not isinstance(by_number, dict) or set(by_number) != set(range(len(by_number))):
        raise InputError(
            f"{uri}: names must be a list, or a mapping from 0, 1, ...; got"
            f" {str(names)[:MESSAGE_LENGTH]}"
        )
    names_in_order = [by_number[number] for number in range(len(by_number))]
    for name in names_in_order:
        # YAML reads yes, no, on and off as Booleans, and ~ as nothing
        if isinstance(name, bool) or not isinstance(name, (str, int)):
            raise InputError(
                f"{uri}: expected texts in names, got {name!r}: put the name in quotes"
            )
    return tuple(str(name).strip() for name in names_in_order)


def _image_paths(
    folder: DatasetFolder, sources: Any, base: Any, optional: bool = False
) -> list[str]:
    """List the images of a split, whose ``sources`` are folders, or text files with one
    path per line. Raises InputError for a folder without images, if not ``optional``.
    """
    paths: list[str] = []
    for source in sources if isinstance(sources, list) else [sources]:
        path = _locate(folder, str(source), base)
        if path.endswith(".txt") and path in folder.uris:
            folder.read_paths.add(path)
            lines = (line.strip() for line in folder.read_lines(path))
            paths += [_locate(folder, line, base) for line in lines if line]
            continue
        if path.lower().endswith(IMAGE_SUFFIXES) and path in folder.uris:
            paths.append(path)
            continue
        images = folder.list_images(path)
        if not images and not optional:
            raise InputError(
                f"{folder.root}: data.yaml names {source}, but there is no image below"
                f" {path or folder.root}"
            )
        paths += images
    return paths


def _locate(folder: DatasetFolder, source: str, base: Any) -> str:
    """Return the path of a source below the folder. data.yaml may have been moved, so
    leading parts are dropped until the path exists.
    """
    parts = _path_parts(f"{base or ''}/{source}")
    for start in range(len(parts)):
        path = "/".join(parts[start:])
        if path in folder.uris or folder.first_folder(path):
            return path
    return "/".join(_path_parts(source))


def _path_parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".", "..")]


def _label_path(path: str) -> str:
    """Return the label file of an image: the last ``images`` of its path becomes
    ``labels``, as in Ultralytics, in upper or lower case.
    """
    start = f"/{path}".lower().rfind("/images/")
    if start >= 0:
        path = f"{path[:start]}labels{path[start + len('images') :]}"
    return f"{strip_suffix(path)}.txt"


def _file_of(path: str) -> str:
    """Return the part of the path below ``images/SPLIT/`` or ``SPLIT/images/``."""
    below_images = f"/{path}".partition("/images/")[2] or path
    first, slash, below_split = below_images.partition("/")
    return below_split if slash and first in SPLITS else below_images


def _read_annotations(
    folder: DatasetFolder, path: str, settings: _Settings, size: tuple[int, int]
) -> list[Annotation]:
    annotations = []
    for number, line in enumerate(folder.read_lines(path), start=1):
        if line.strip():
            where = f"{folder.uris[path]}:{number}"
            annotations.append(_parse_annotation(line.split(), settings, size, where))
    return annotations


def _parse_annotation(
    words: list[str], settings: _Settings, size: tuple[int, int], where: str
) -> Annotation:
    numbers = [parse_number(word, where) for word in words]
    shares = _box_or_polygon(numbers, settings, where)
    label = numbers[0]
    if not label.is_integer() or not 0 <= label < len(settings.names):
        source = settings.uri.rpartition("/")[2]
        raise FolderError(
            f"{where}: class {words[0]} is not in {source}, which names"
            f" {len(settings.names)} classes from 0"
        )
    if any(not SHARES[0] <= share <= SHARES[1] for share in shares):
        raise InputError(
            f"{where}: expected shares of the image from 0 to 1, got"
            f" {' '.join(words[1:7])}; divide pixels by the image's width and height"
        )
    if len(shares) > 4:
        x1, x2 = min(shares[::2]), max(shares[::2])
        y1, y2 = min(shares[1::2]), max(shares[1::2])
    else:
        x, y, width, height = shares
        x1, x2 = x - width / 2, x + width / 2
        y1, y2 = y - height / 2, y + height / 2
    image_width, image_height = size
    box = (
        x1 * image_width,
        y1 * image_height,
        x2 * image_width,
        y2 * image_height,
    )
    return Annotation(box, settings.names[int(label)])


def _box_or_polygon(
    numbers: Sequence[float], settings: _Settings, where: str
) -> Sequence[float]:
    """Return the four shares of the box, or those of the polygon's corners."""
    count, key_points = len(numbers), settings.key_point_numbers
    if key_points:
        if count not in (5, 5 + key_points):
            raise FolderError(
                f"{where}: kpt_shape in the settings expects 5 words or"
                f" {5 + key_points}; got {count} words"
            )
        return numbers[1:5]
    if count in (5, 6):
        return numbers[1:5]
    if count < 7 or count % 2 == 0:
        raise InputError(
            f"{where}: expected 'class x y width height', or a polygon; got {count}"
            " words (key points need kpt_shape in data.yaml)"
        )
    if _may_be_key_points(numbers):
        raise InputError(
            f"{where}: {count} words may be a polygon, or a box and key points with"
            " visibility; name kpt_shape in data.yaml for the latter"
        )
    return numbers[1:]


def _may_be_key_points(numbers: Sequence[float]) -> bool:
    """Tell whether a box and key points (x, y, visibility) fit the numbers too."""
    visibilities = numbers[7::3]
    is_triples = (len(numbers) - 5) % 3 == 0
    return is_triples and all(value in (0, 1, 2) for value in visibilities)


def yolo_files(
    records: Sequence[ImageRecord], root: str, split: str, names: Sequence[str]
) -> dict[str, bytes]:
    """Return one text file per annotated image, and ``data.yaml`` with the split added.
    Raises InputError if ``data.yaml`` exists with other names or with this split.
    """
    if split not in SPLITS:
        raise InputError(f"YOLO has the splits {', '.join(SPLITS)}; got {split!r}")
    uri = storage.join(root, "data.yaml")
    settings: JsonObject = {"names": dict(enumerate(names))}
    if storage.exists(uri):
        settings = _read_yaml(uri)
    if _class_names(settings.get("names"), uri) != tuple(names):
        raise InputError(
            f"{uri} has other class names than the records: {', '.join(names)}; give"
            " names= in the order of the file"
        )
    if settings.get(split):
        raise InputError(
            f"{uri} has the split {split!r} already; write to another folder or split"
        )
    files = {
        _label_path(f"images/{split}/{record.file}"): yolo_text(record, names).encode()
        for record in records
        if record.annotated
    }
    settings[split] = f"images/{split}"
    text = yaml.safe_dump(settings, allow_unicode=True, sort_keys=False)
    return {**files, "data.yaml": text.encode()}


def yolo_text(record: ImageRecord, names: Sequence[str]) -> str:
    """Return the lines of an image's text file. Raises InputError for a box whose
    centre or size is beyond the image.
    """
    lines = []
    for box, label in zip(record.boxes.tolist(), record.labels, strict=True):
        x1, y1, x2, y2 = box
        shares = (
            (x1 + x2) / 2 / record.width,
            (y1 + y2) / 2 / record.height,
            (x2 - x1) / record.width,
            (y2 - y1) / record.height,
        )
        if any(not SHARES[0] <= share <= SHARES[1] for share in shares):
            raise InputError(
                f"{record.file}: YOLO can't hold the box {[x1, y1, x2, y2]}: its centre"
                " or its size is beyond the image"
            )
        numbers = " ".join(format_number(share) for share in shares)
        lines.append(f"{names.index(label)} {numbers}\n")
    return "".join(lines)
