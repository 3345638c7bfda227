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
from coin_ray.data.formats.record import (
    IMAGE_SUFFIXES,
    Annotation,
    Dataset,
    DatasetFolder,
    ImageRecord,
    format_number,
    image_size,
    map_in_threads,
    parse_number,
    strip_suffix,
)
from coin_ray.errors import InputError

YAMLS = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
SPLITS = ("train", "val", "test")


def is_yolo(place: DatasetFolder) -> bool:
    return any(name in place.uris for name in YAMLS)


def read_yolo(place: DatasetFolder) -> Dataset:
    """Images without a text file are not annotated. Raises InputError naming file and
    line.
    """
    at = next(name for name in YAMLS if name in place.uris)
    content = _yaml(place.uris[at])
    names = _names(content.get("names"), place.uris[at])
    splits = {split: content[split] for split in SPLITS if content.get(split)}
    wanted = dict.fromkeys(
        path
        for value in place.choose(splits, "split in data.yaml")
        for path in _images(place, value, content.get("path"))
    )

    def record(path: str) -> ImageRecord:
        label, uri = _label_path(path), place.uris[path]
        size = image_size(uri)
        found = _annotations(place, label, names, size) if label in place.uris else []
        return ImageRecord.of(
            _file(path), uri, size, found, annotated=label in place.uris
        )

    present = [path for path in wanted if path in place.uris]
    return Dataset(
        "yolo",
        tuple(map_in_threads(record, present)),
        names,
        tuple(path for path in wanted if path not in place.uris),
    )


def _yaml(uri: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(storage.read_bytes(uri))
    except yaml.YAMLError as error:
        raise InputError(f"{uri} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise InputError(
            f"{uri}: expected a mapping with names and train, got"
            f" {type(content).__name__}"
        )
    return content


def _names(value: Any, uri: str) -> tuple[str, ...]:
    rows = dict(enumerate(value)) if isinstance(value, list) else value
    if not isinstance(rows, dict) or set(rows) != set(range(len(rows))):
        raise InputError(
            f"{uri}: names must be a list, or a mapping from 0, 1, ...; got"
            f" {str(value)[:200]}"
        )
    return tuple(str(rows[k]).strip() for k in range(len(rows)))


def _images(place: DatasetFolder, value: Any, base: Any) -> list[str]:
    """Paths that a split names: folders, or text files with one path per line."""
    found: list[str] = []
    for entry in value if isinstance(value, list) else [value]:
        path = _below(place, str(entry), base)
        if path.endswith(".txt") and path in place.uris:
            found += [
                _below(place, line.strip(), base)
                for line in place.lines(path)
                if line.strip()
            ]
            continue
        inside = place.below(path, *IMAGE_SUFFIXES)
        if not inside:
            raise InputError(
                f"{place.root}: data.yaml names {entry}, but there is no image below"
                f" {path or place.root}"
            )
        found += inside
    return found


def _below(place: DatasetFolder, entry: str, base: Any) -> str:
    """The path below the folder: data.yaml may have lain elsewhere, so leading parts
    are left out until something is there.
    """
    parts = [p for p in f"{base or ''}/{entry}".split("/") if p not in ("", ".", "..")]
    for start in range(len(parts)):
        path = "/".join(parts[start:])
        if path in place.uris or place.folder(path):
            return path
    return "/".join(p for p in entry.split("/") if p not in ("", ".", ".."))


def _label_path(path: str) -> str:
    """``images`` becomes ``labels`` in its last place, as Ultralytics does."""
    before, found, after = f"/{path}".rpartition("/images/")
    return (
        f"{strip_suffix(f'{before}/labels/{after}' if found else path).lstrip('/')}.txt"
    )


def _file(path: str) -> str:
    """Below ``images/SPLIT/`` or ``SPLIT/images/``."""
    inside = f"/{path}".partition("/images/")[2] or path
    first, slash, rest = inside.partition("/")
    return rest if slash and first in SPLITS else inside


def _annotations(
    place: DatasetFolder, path: str, names: Sequence[str], size: tuple[int, int]
) -> list[Annotation]:
    rows = enumerate(place.lines(path), start=1)
    return [
        _annotation(line.split(), names, size, f"{place.uris[path]}:{row}")
        for row, line in rows
        if line.strip()
    ]


def _annotation(
    words: list[str], names: Sequence[str], size: tuple[int, int], where: str
) -> Annotation:
    if len(words) not in (5, 6) and (len(words) < 7 or len(words) % 2 == 0):
        raise InputError(
            f"{where}: expected 'class x y width height', or a polygon; got"
            f" {len(words)} words"
        )
    label, *values = (parse_number(word, where) for word in words)
    if not label.is_integer() or not 0 <= label < len(names):
        raise InputError(
            f"{where}: class {words[0]} is not in data.yaml, which names {len(names)}"
            " classes from 0"
        )
    if len(words) > 6:
        left, top, right, bottom = (
            min(values[::2]),
            min(values[1::2]),
            max(values[::2]),
            max(values[1::2]),
        )
    else:
        x, y, width, height = values[:4]
        left, top, right, bottom = (
            x - width / 2,
            y - height / 2,
            x + width / 2,
            y + height / 2,
        )
    return Annotation(
        (left * size[0], top * size[1], right * size[0], bottom * size[1]),
        names[int(label)],
    )


def write_yolo(
    records: Sequence[ImageRecord], root: str, split: str, names: Sequence[str]
) -> None:
    """A second split is added to ``data.yaml`` if it has the same names; else
    InputError.
    """
    if split not in SPLITS:
        raise InputError(f"YOLO has the splits {', '.join(SPLITS)}; got {split!r}")
    uri = storage.join(root, "data.yaml")
    content: dict[str, Any] = (
        _yaml(uri) if storage.exists(uri) else {"names": dict(enumerate(names))}
    )
    if _names(content.get("names"), uri) != tuple(names):
        raise InputError(
            f"{uri} has other class names than the records: {', '.join(names)}; give"
            " names= in the order of the file"
        )
    for record in records:
        if record.annotated:
            text = "".join(
                _line(box, names.index(label), record)
                for box, label in zip(record.boxes.tolist(), record.labels, strict=True)
            )
            storage.write_bytes(
                storage.join(root, _label_path(f"images/{split}/{record.file}")),
                text.encode(),
            )
    content[split] = f"images/{split}"
    storage.write_bytes(
        uri, yaml.safe_dump(content, allow_unicode=True, sort_keys=False).encode()
    )


def _line(box: Sequence[float], label: int, record: ImageRecord) -> str:
    left, top, right, bottom = box
    across, down = (left + right) / 2 / record.width, (top + bottom) / 2 / record.height
    shares = (
        across,
        down,
        (right - left) / record.width,
        (bottom - top) / record.height,
    )
    return f"{label} {' '.join(format_number(s) for s in shares)}\n"
