"""Read numbers, JSON and image headers of annotated folders, with errors that name the
file.
"""

from __future__ import annotations

import codecs
from typing import TypeVar

import numpy as np
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from coin_ray import storage
from coin_ray.data.pixels import BROKEN_FILE, FORMATS, orientation
from coin_ray.errors import InputError

SIDEWAYS = 5
"""From this EXIF orientation on width and height are exchanged."""
SHOWN_PROBLEMS = 3
HEAD_BYTES = 1 << 16

T = TypeVar("T")


def parse_number(text: str | None, where: str) -> float:
    """Parse a finite number. Raises InputError that begins with ``where`` for any other
    text.
    """
    try:
        number = float(text or "")
    except ValueError:
        number = float("nan")
    if not np.isfinite(number):
        raise InputError(f"{where}: expected a number, got {text!r}")
    return number


def parse_flag(value: object) -> bool:
    """Return a flag that is written as a Boolean, 0 or 1, or text; None is False.
    Raises ValueError for anything else.
    """
    text = str(value).strip().lower()
    if text in ("none", "", "0", "0.0", "false"):
        return False
    if text in ("1", "1.0", "true"):
        return True
    raise ValueError(f"expected true or false, got {value!r}")


def format_number(number: float) -> str:
    """Write the number as text that reads back as the same number: 12, 12.5."""
    return str(int(number)) if float(number).is_integer() else repr(float(number))


def read_validated_json(kind: TypeAdapter[T], uri: str, description: str) -> T:
    """Read a JSON file as ``kind``. Raises InputError naming the file and the line or
    entry that does not match the ``description`` of the format.
    """
    raw = storage.read_bytes(uri).removeprefix(codecs.BOM_UTF8)
    try:
        return kind.validate_json(raw)
    except ValidationError as error:
        problems = []
        for problem in error.errors()[:SHOWN_PROBLEMS]:
            location = ".".join(str(part) for part in problem["loc"])
            problems.append(f"{location}: {problem['msg']}".lstrip(": "))
        raise InputError(f"{uri} is not {description}: {'; '.join(problems)}") from None


def read_head(uri: str) -> bytes:
    """Read the first bytes of a file, enough to tell its layout."""
    with storage.open_reader(uri) as stream:
        return bytes(stream.read(HEAD_BYTES))


def image_size(uri: str) -> tuple[int, int]:
    """Read the upright (width, height) from the file's header; (0, 0) if it has none."""
    try:
        with (
            storage.open_reader(uri) as stream,
            Image.open(stream, formats=FORMATS) as image,
        ):
            if orientation(image) >= SIDEWAYS:
                return image.height, image.width
            return image.width, image.height
    except (*BROKEN_FILE, Image.DecompressionBombError):
        return 0, 0
