"""The one record that every format is read into, and the folder it is read from."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import fsspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from coin_ray import storage
from coin_ray.data.canonical import BROKEN_FILE, FORMATS, ORIENTATION_TAG
from coin_ray.errors import InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
THREADS = 8

T = TypeVar("T")
U = TypeVar("U")


class Annotation(NamedTuple):
    """A box (left, top, right, bottom), its class name, and whether evaluation neither
    requires nor punishes it.
    """

    box: Sequence[float]
    label: str
    difficult: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class ImageRecord:
    """An image and what is annotated in it: ``boxes`` [N, 4] xyxy, ``labels`` N names,
    ``difficult`` [N].

    Boxes are edges in pixels from the upper left corner: the whole image is 0, 0,
    width, height. ``file`` is the path below the format's image folder. ``width`` and
    ``height`` are 0 if neither the labels nor the image tell. ``annotated`` is False
    where nobody said what is in the image, which is not the same as nothing. Raises
    InputError for what is no box or no name.
    """

    file: str
    uri: str
    width: int
    height: int
    boxes: NDArray[np.float64]
    labels: tuple[str, ...]
    difficult: NDArray[np.bool_]
    annotated: bool = True

    def __post_init__(self) -> None:
        count = len(self.labels)
        if self.boxes.shape != (count, 4) or self.difficult.shape != (count,):
            shapes = f"boxes {self.boxes.shape} and difficult {self.difficult.shape}"
            raise InputError(
                f"{self.file}: {count} labels need boxes ({count}, 4) and difficult"
                f" ({count},); got {shapes}"
            )
        if not np.isfinite(self.boxes).all():
            raise InputError(
                f"{self.file}: a box has a coordinate that is no finite number: {self.boxes.tolist()}"[
                    :300
                ]
            )
        for label in self.labels:
            check_class_name(label, self.file)

    @classmethod
    def of(
        cls,
        file: str,
        uri: str,
        size: tuple[int, int],
        found: Sequence[Annotation],
        annotated: bool = True,
    ) -> ImageRecord:
        """``size``: (width, height)."""
        boxes = np.asarray([a.box for a in found], np.float64).reshape(-1, 4)
        return cls(
            file,
            uri,
            *size,
            boxes,
            tuple(a.label for a in found),
            np.asarray([a.difficult for a in found], np.bool_),
            annotated,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """What a folder holds. ``names``: class names in the format's order. ``missing``:
    what is listed or labelled without being there.
    """

    format: str
    records: tuple[ImageRecord, ...]
    names: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class DatasetFolder:
    """A folder and one of its splits ("": all): ``uris`` by path below the folder."""

    root: str
    split: str
    uris: Mapping[str, str]

    @classmethod
    def open(cls, text: str) -> DatasetFolder:
        """Of ``FOLDER`` or ``FOLDER#SPLIT``. Raises InputError if there is no such
        folder.
        """
        text = storage.absolute_uri(text)
        root, mark, split = text.rpartition("#")
        if not mark or storage.exists(text):
            root, split = text, ""
        root = root.rstrip("/") or "/"
        if not storage.exists(root):
            raise InputError(f"no such folder: {root}")
        start = len(_bare(root)) + 1 if _bare(root) else 0
        return cls(
            root, split, {_bare(uri)[start:]: uri for uri in storage.list_files(root)}
        )

    def below(self, folder: str, *suffixes: str) -> list[str]:
        """Paths below ``folder`` ("": all) that end so in any case, sorted."""
        start = folder and f"{folder}/"
        return sorted(
            p
            for p in self.uris
            if p.startswith(start) and (not suffixes or p.lower().endswith(suffixes))
        )

    def stems(self, folder: str, *suffixes: str) -> dict[str, str]:
        """Paths by the part between folder and suffix: ``a/1`` of
        ``JPEGImages/a/1.jpg``.
        """
        return {
            strip_suffix(p[len(folder) + 1 :]): p for p in self.below(folder, *suffixes)
        }

    def folder(self, *candidates: str) -> str:
        """The first of the folders that holds a file; "" if none does."""
        return next((f for f in candidates if f in self._folders), "")

    @cached_property
    def _folders(self) -> set[str]:
        found: set[str] = set()
        for path in self.uris:
            above = path.rpartition("/")[0]
            while above and above not in found:
                found.add(above)
                above = above.rpartition("/")[0]
        return found

    @cached_property
    def _images(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for path in self.below("", *IMAGE_SUFFIXES):
            found.setdefault(path.rpartition("/")[2], []).append(path)
        return found

    def image(self, name: str, *folders: str) -> str | None:
        """Path of the image that labels call ``name``: in one of ``folders``, or the
        only one with this name; None if there is none.
        """
        for folder in folders:
            path = f"{folder}/{name}" if folder else name
            if path in self.uris:
                return path
        same = self._images.get(name.rpartition("/")[2], [])
        if len(same) > 1:
            same = [p for p in same if p.endswith(f"/{name}")]
        if len(same) > 1:
            raise InputError(
                f"{self.root}: labels name the image {name}, which may be any of"
                f" {', '.join(same[:3])}"
            )
        return same[0] if same else None

    def choose(self, splits: Mapping[str, T], what: str) -> list[T]:
        """What belongs to the asked split, or everything. Raises InputError listing the
        splits there are.
        """
        if not self.split:
            return list(splits.values())
        if self.split not in splits:
            raise InputError(
                f"{self.root} has no {what} for {self.split!r}; it has"
                f" {', '.join(sorted(splits)) or 'none'}"
            )
        return [splits[self.split]]

    def lines(self, path: str) -> list[str]:
        """Lines of a UTF-8 text. Raises InputError for other bytes."""
        try:
            return storage.read_bytes(self.uris[path]).decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self.uris[path]} is not text in UTF-8: {error}"
            ) from None

    def listed(self, path: str, known: Mapping[str, str]) -> list[str]:
        """Names in an image list. In the list of one class a 1, 0 or -1 follows the
        name; -1 says that the class is not in the image.
        """
        rows = [(line.strip(), line.split()) for line in self.lines(path)]
        rows = [
            (line, words)
            for line, words in rows
            if words and (line in known or words[-1] != "-1")
        ]
        return [
            (
                line
                if line in known or words[-1] not in ("0", "1")
                else " ".join(words[:-1]) or line
            )
            for line, words in rows
        ]


def _bare(uri: str) -> str:
    return (uri.partition("://")[2] or uri).strip("/")


def strip_suffix(path: str) -> str:
    folder, slash, name = path.rpartition("/")
    return folder + slash + (name.rpartition(".")[0] or name)


def check_class_name(name: str, where: str) -> None:
    """Raises InputError for a class name that is empty, has blanks at its ends or is
    not one printable line.
    """
    if not name or name != name.strip() or not name.isprintable():
        raise InputError(
            f"{where}: a class name must be one line of printable characters without"
            f" blanks at its ends; got {name!r}"
        )


def parse_number(text: str | None, where: str) -> float:
    """Raises InputError naming ``where`` for what is no finite number."""
    try:
        value = float(text or "")
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise InputError(f"{where}: expected a number, got {text!r}")
    return value


def format_number(value: float) -> str:
    """The number as text that reads back as the same number: 12, 12.5."""
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def read_validated_json(kind: TypeAdapter[T], uri: str, what: str) -> T:
    """A JSON file as ``kind``. Raises InputError naming the file and the line, or the
    entry, that is not as in ``what``.
    """
    try:
        return kind.validate_json(storage.read_bytes(uri).removeprefix(codecs.BOM_UTF8))
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}".lstrip(": ")
            for e in error.errors()[:3]
        )
        raise InputError(f"{uri} is not {what}: {problems}") from None


def map_in_threads(function: Callable[[U], T], items: Iterable[U]) -> list[T]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, items))


def image_size(uri: str) -> tuple[int, int]:
    """Upright (width, height) from the file's header; (0, 0) if it has none."""
    try:
        with (
            fsspec.open(uri, "rb") as stream,
            Image.open(stream, formats=FORMATS) as image,
        ):
            turned = image.getexif().get(ORIENTATION_TAG, 1) in (5, 6, 7, 8)
            return (
                (image.height, image.width) if turned else (image.width, image.height)
            )
    except (*BROKEN_FILE, Image.DecompressionBombError):
        return 0, 0


def collect_class_names(
    found: Iterable[ImageRecord], names: Sequence[Any] = ()
) -> tuple[str, ...]:
    """``names``, then the other labels of the records in the order of the alphabet."""
    stated = tuple(str(n) for n in names)
    return stated + tuple(
        sorted({label for r in found for label in r.labels} - set(stated))
    )
