"""YOLO: ``data.yaml`` with class names and image folders, ``images/...`` and one text
file per image below ``labels/...``.

A line is ``class x y width height`` as shares of the image, centre first; a polygon
(``class x y x y ...``) becomes its box.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from coin_ray import storage
from coin_ray.data.formats.folder import IMAGE_SUFFIXES, DatasetFolder, strip_suffix
from coin_ray.data.formats.parsing import format_number, image_size, parse_number
from coin_ray.data.formats.record import Annotation, Dataset, ImageRecord
from coin_ray.data.threads import map_in_threads
from coin_ray.errors import InputError

YAMLS = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
SPLITS = ("train", "val", "test")
MESSAGE_LENGTH = 200


def is_yolo(folder: DatasetFolder) -> bool:
    """Tell whether the folder is in the YOLO format."""
    return any(name in folder.uris for name in YAMLS)


def read_yolo(folder: DatasetFolder) -> Dataset:
    """Read a YOLO folder. Images without a text file are not annotated. Raises
    InputError naming file and line.
    """
    yaml_path = next(name for name in YAMLS if name in folder.uris)
    yaml_uri = folder.uris[yaml_path]
    settings = _read_yaml(yaml_uri)
    names = _class_names(settings.get("names"), yaml_uri)
    splits = {split: settings[split] for split in SPLITS if settings.get(split)}
    paths: list[str] = []
    for sources in folder.select_split(splits, "split in data.yaml"):
        paths += _image_paths(folder, sources, settings.get("path"))
    paths = list(dict.fromkeys(paths))

    def read_record(path: str) -> ImageRecord:
        uri, label_path = folder.uris[path], _label_path(path)
        size, annotated = image_size(uri), label_path in folder.uris
        annotations = (
            _read_annotations(folder, label_path, names, size) if annotated else []
        )
        return ImageRecord.from_annotations(
            _file_of(path), uri, size, annotations, annotated
        )

    present = [path for path in paths if path in folder.uris]
    missing = tuple(path for path in paths if path not in folder.uris)
    return Dataset("yolo", tuple(map_in_threads(read_record, present)), names, missing)


def _read_yaml(uri: str) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(storage.read_bytes(uri))
    except yaml.YAMLError as error:
        raise InputError(f"{uri} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise InputError(
            f"{uri}: expected a mapping with names and train, got"
            f" {type(settings).__name__}"
        )
    return settings


def _class_names(names: Any, uri: str) -> tuple[str, ...]:
    by_number = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(by_number, dict) or set(by_number) != set(range(len(by_number))):
        raise InputError(
            f"{uri}: names must be a list, or a mapping from 0, 1, ...; got"
            f" {str(names)[:MESSAGE_LENGTH]}"
        )
    return tuple(str(by_number[number]).strip() for number in range(len(by_number)))


def _image_paths(folder: DatasetFolder, sources: Any, base: Any) -> list[str]:
    """List the images of a split, whose ``sources`` are folders, or text files with one
    path per line.
    """
    paths: list[str] = []
    for source in sources if isinstance(sources, list) else [sources]:
        path = _locate(folder, str(source), base)
        if path.endswith(".txt") and path in folder.uris:
            lines = (line.strip() for line in folder.read_lines(path))
            paths += [_locate(folder, line, base) for line in lines if line]
            continue
        images = folder.list_paths(path, *IMAGE_SUFFIXES)
        if not images:
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
    ``labels``, as in Ultralytics.
    """
    before, separator, after = f"/{path}".rpartition("/images/")
    if separator:
        path = f"{before}/labels/{after}".lstrip("/")
    return f"{strip_suffix(path)}.txt"


def _file_of(path: str) -> str:
    """Return the part of the path below ``images/SPLIT/`` or ``SPLIT/images/``."""
    below_images = f"/{path}".partition("/images/")[2] or path
    first, slash, below_split = below_images.partition("/")
    return below_split if slash and first in SPLITS else below_images


def _read_annotations(
    folder: DatasetFolder, path: str, names: Sequence[str], size: tuple[int, int]
) -> list[Annotation]:
    annotations = []
    for number, line in enumerate(folder.read_lines(path), start=1):
        if line.strip():
            where = f"{folder.uris[path]}:{number}"
            annotations.append(_parse_annotation(line.split(), names, size, where))
    return annotations


def _parse_annotation(
    words: list[str], names: Sequence[str], size: tuple[int, int], where: str
) -> Annotation:
    is_box = len(words) in (5, 6)
    is_polygon = len(words) >= 7 and len(words) % 2 == 1
    if not is_box and not is_polygon:
        raise InputError(
            f"{where}: expected 'class x y width height', or a polygon; got"
            f" {len(words)} words"
        )
    label, *shares = (parse_number(word, where) for word in words)
    if not label.is_integer() or not 0 <= label < len(names):
        raise InputError(
            f"{where}: class {words[0]} is not in data.yaml, which names {len(names)}"
            " classes from 0"
        )
    if is_polygon:
        x1, x2 = min(shares[::2]), max(shares[::2])
        y1, y2 = min(shares[1::2]), max(shares[1::2])
    else:
        x, y, width, height = shares[:4]
        x1, x2 = x - width / 2, x + width / 2
        y1, y2 = y - height / 2, y + height / 2
    image_width, image_height = size
    box = (
        x1 * image_width,
        y1 * image_height,
        x2 * image_width,
        y2 * image_height,
    )
    return Annotation(box, names[int(label)])


def write_yolo(
    records: Sequence[ImageRecord], root: str, split: str, names: Sequence[str]
) -> None:
    """Write one text file per annotated image and add the split to ``data.yaml``.
    Raises InputError if ``data.yaml`` exists with other names.
    """
    if split not in SPLITS:
        raise InputError(f"YOLO has the splits {', '.join(SPLITS)}; got {split!r}")
    uri = storage.join(root, "data.yaml")
    settings: dict[str, Any] = {"names": dict(enumerate(names))}
    if storage.exists(uri):
        settings = _read_yaml(uri)
    if _class_names(settings.get("names"), uri) != tuple(names):
        raise InputError(
            f"{uri} has other class names than the records: {', '.join(names)}; give"
            " names= in the order of the file"
        )
    for record in records:
        if record.annotated:
            path = _label_path(f"images/{split}/{record.file}")
            text = _label_text(record, names)
            storage.write_bytes(storage.join(root, path), text.encode())
    settings[split] = f"images/{split}"
    text = yaml.safe_dump(settings, allow_unicode=True, sort_keys=False)
    storage.write_bytes(uri, text.encode())


def _label_text(record: ImageRecord, names: Sequence[str]) -> str:
    lines = []
    for box, label in zip(record.boxes.tolist(), record.labels, strict=True):
        x1, y1, x2, y2 = box
        shares = (
            (x1 + x2) / 2 / record.width,
            (y1 + y2) / 2 / record.height,
            (x2 - x1) / record.width,
            (y2 - y1) / record.height,
        )
        numbers = " ".join(format_number(share) for share in shares)
        lines.append(f"{names.index(label)} {numbers}\n")
    return "".join(lines)
