"""Read image files in one way, so that every model and every service sees the same
upright pixels.

``coin_ray.data.pixels`` says which pixels. ``decode_rgb`` gives them in full size,
``canonical_image`` the bytes to send: without metadata and no longer than the service
wants.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from PIL import Image, JpegImagePlugin, UnidentifiedImageError

from coin_ray.data.pixels import (
    BROKEN_FILE,
    FORMATS,
    IntensityRange,
    TooFewLevels,
    orientation,
    own_range,
    upright_rgb,
)
from coin_ray.errors import InputError

PIXELS_MAX = 178_956_970
SIDE_MIN = 8
JPEG_QUALITY = 95
"""High enough that the loss makes no difference to a detector."""


@dataclass(frozen=True, slots=True)
class CanonicalImage:
    """An image ready to send: ``data`` holds ``width`` x ``height`` pixels;
    ``original`` is the upright full size (width, height).
    """

    data: bytes = field(repr=False)
    media_type: str
    width: int
    height: int
    original: tuple[int, int]
    image_id: str
    """sha256 of the file's bytes, in hexadecimal."""
    visible_size: tuple[float, float] | None = None
    """(width, height) of the part of the sent pixels, from the upper left, that is the
    image; None: all of it. The rest is margin."""
    mirrored: bool = False
    """The image is sent left to right."""


def canonical_image(
    raw: bytes,
    max_side: int,
    intensity_range: IntensityRange | None = None,
    inspected_id: str = "",
) -> CanonicalImage:
    """Return the file's image with a longer side of at most ``max_side`` pixels. Raises
    ``InputError`` if the file is not a usable image. ``intensity_range``: of a run's
    deep grey images.

    A plain upright RGB JPEG that fits is sent unchanged; everything else becomes a new
    JPEG. ``inspected_id``: sha256 of the file as it was when ``upright_size_and_range``
    decoded it; the same file is not searched for damage again.
    """
    image_id = _sha256(raw)
    with _readable(raw) as image:
        if image.format != "JPEG":
            image.load()  # Pillow turns a TIFF upright while it loads it
        original = _upright_size(image)
        if max(original) <= max_side and _is_plain_jpeg(image, raw):
            if image_id != inspected_id:
                # reads the whole file, which finds damage, but decodes only an eighth
                # of the pixels
                image.draft(None, (1, 1))
                image.load()
            return CanonicalImage(raw, "image/jpeg", *original, original, image_id)
        size = _limit_size(original, max_side)
        pixels = upright_rgb(image, intensity_range, size)
    return CanonicalImage(encode_jpeg(pixels), "image/jpeg", *size, original, image_id)


def decode_rgb(
    raw: bytes, intensity_range: IntensityRange | None = None
) -> Image.Image:
    """Return the file's image upright, in full size, as 8-bit RGB. Raises
    ``InputError`` if the file is not a usable image. ``intensity_range``: of a run's
    deep grey images; None: each image's own.
    """
    with _readable(raw) as image:
        return upright_rgb(image, intensity_range)


def upright_size_and_range(
    raw: bytes,
) -> tuple[tuple[int, int], IntensityRange | None]:
    """Decode the whole file and return its upright (width, height), and the own range
    of a deep grey image. Raises ``InputError`` if the file is not a usable image, or
    holds 16-bit colours of which the decoder loses nearly all levels.
    """
    with _readable(raw) as image:
        pixels = upright_rgb(image)
        return pixels.size, own_range(image)


def decode_sent(image: CanonicalImage) -> Image.Image:
    """Return the pixels that are sent, 8-bit RGB, however narrow."""
    with Image.open(io.BytesIO(image.data)) as sent:
        return sent.convert("RGB")


def stored_size(raw: bytes) -> tuple[int, int]:
    """Return (width, height) from the file's header, before any pixel is decoded.
    Raises ``InputError`` if the file is not a usable image.
    """
    with _readable(raw) as image:
        return image.size


@contextmanager
def _readable(raw: bytes) -> Iterator[Image.Image]:
    """Open the image; every error of Pillow inside the block becomes an
    ``InputError``.
    """
    if not raw:
        raise InputError("the image file is empty")
    try:
        with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
            _check_size(image)
            yield image
    except InputError:
        raise
    except Image.DecompressionBombError:
        raise InputError(f"the image has more than {PIXELS_MAX:,} pixels") from None
    except UnidentifiedImageError:
        raise InputError(
            f"the file is not an image in one of the formats {', '.join(FORMATS)};"
            " convert it to one of them, for example PNG"
        ) from None
    except TooFewLevels as error:
        raise InputError(str(error)) from None
    except BROKEN_FILE as error:
        raise InputError(f"the image file is damaged or truncated: {error}") from None


def _check_size(image: Image.Image) -> None:
    if image.width * image.height > PIXELS_MAX:
        raise InputError(
            f"the image has more than {PIXELS_MAX:,} pixels: {image.width} x"
            f" {image.height}"
        )
    if min(image.size) < SIDE_MIN:
        raise InputError(
            f"the image is too small, {image.width} x {image.height}; both sides need"
            f" at least {SIDE_MIN} pixels"
        )


def _upright_size(image: Image.Image) -> tuple[int, int]:
    return (image.height, image.width) if orientation(image) >= 5 else image.size


def _limit_size(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    width, height = size
    scale = min(1.0, max_side / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _is_plain_jpeg(image: Image.Image, raw: bytes) -> bool:
    """Tell whether the file is an upright RGB JPEG with nothing in it but the image: no
    EXIF, profile, comment, thumbnail or second image.
    """
    if not isinstance(image, JpegImagePlugin.JpegImageFile):
        return False
    if image.format != "JPEG" or image.mode != "RGB":
        return False
    for name, segment in image.applist:
        is_jfif = segment[:5] == b"JFIF\0" and len(segment) == 14
        if name != "APP14" and not (name == "APP0" and is_jfif):
            return False
    return raw.endswith(b"\xff\xd9")


def encode_jpeg(image: Image.Image) -> bytes:
    """Encode the pixels for sending."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
