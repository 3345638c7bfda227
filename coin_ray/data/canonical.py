"""Read image files in one way, so that every model and every service sees the same
upright pixels.

Images are upright by EXIF, first frame, 8-bit sRGB, transparency on white. ``decode_rgb`` gives
those pixels in full size, ``canonical_image`` the bytes to send: without metadata and
no longer than the service wants.
"""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageCms, JpegImagePlugin, UnidentifiedImageError

from coin_ray.errors import InputError

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000")
"""Formats that are opened. Pillow knows more, some of which start other programs."""
PIXELS_MAX = 178_956_970
SIDE_MIN = 8
JPEG_QUALITY = 95
"""High enough that the loss makes no difference to a detector."""
ORIENTATION_TAG = 0x0112
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BROKEN_FILE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    ZeroDivisionError,
)
"""What Pillow's readers raise for damaged files."""


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


def canonical_image(raw: bytes, max_side: int) -> CanonicalImage:
    """Return the file's image with a longer side of at most ``max_side`` pixels. Raises
    ``InputError`` if the file is not a usable image.

    A plain upright RGB JPEG that fits is sent unchanged; everything else becomes a new
    JPEG.
    """
    with _readable(raw) as image:
        if image.format != "JPEG":
            image.load()  # Pillow turns a TIFF upright while it loads it
        original = _upright_size(image)
        if max(original) <= max_side and _is_plain_jpeg(image, raw):
            # reads the whole file, which finds damage, but decodes only an eighth of
            # the pixels
            image.draft(None, (1, 1))
            image.load()
            return CanonicalImage(raw, "image/jpeg", *original, original, _sha256(raw))
        size = _limit_size(original, max_side)
        pixels = _upright_rgb(image, size)
    return CanonicalImage(
        encode_jpeg(pixels), "image/jpeg", *size, original, _sha256(raw)
    )


def decode_rgb(raw: bytes) -> Image.Image:
    """Return the file's image upright, in full size, as 8-bit RGB. Raises
    ``InputError`` if the file is not a usable image.
    """
    with _readable(raw) as image:
        return _upright_rgb(image)


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
            f"the file is not an image in one of the formats {', '.join(FORMATS)}"
        ) from None
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


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation 1..8; damaged EXIF data counts as upright."""
    try:
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
    except BROKEN_FILE:
        return 1
    is_valid = isinstance(orientation, int) and 1 <= orientation <= 8
    return orientation if is_valid else 1


def _upright_size(image: Image.Image) -> tuple[int, int]:
    return (image.height, image.width) if _orientation(image) >= 5 else image.size


def _limit_size(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    width, height = size
    scale = min(1.0, max_side / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _decode_smaller(
    image: Image.Image, size: tuple[int, int]
) -> tuple[float, float, float, float] | None:
    """Let the JPEG decoder skip detail that a resize to the stored ``size`` would throw
    away: a panorama then needs little memory.

    Returns the box that holds the whole image: an odd side ends within the last pixel
    of the smaller one. None: all of it.
    """
    if image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return None
    mode_and_box = image.draft(None, size)
    return None if mode_and_box is None else mode_and_box[1]


def _upright_rgb(
    image: Image.Image, size: tuple[int, int] | None = None
) -> Image.Image:
    """Decode the image upright, in ``size`` (of the upright image; None: full size). It
    is resized as stored, in the frame of the decoder's box, then turned.
    """
    orientation = _orientation(image)
    stored_size = size
    if size is not None and orientation >= 5:
        stored_size = size[1], size[0]
    box = None if stored_size is None else _decode_smaller(image, stored_size)
    image.load()
    opaque = _without_alpha(_eight_bit(image))
    rgb = _convert_to_srgb(opaque, image.info.get("icc_profile"))
    if stored_size is not None and rgb.size != stored_size:
        rgb = rgb.resize(stored_size, Image.Resampling.LANCZOS, box, reducing_gap=3.0)
    turn = ORIENTATIONS.get(_orientation(image))
    return rgb.transpose(turn) if turn is not None else rgb


def _eight_bit(image: Image.Image) -> Image.Image:
    """Convert to 8 bits. 16-bit grey is divided by 256; 32-bit integers and floats have
    no defined white, so their own range is stretched.
    """
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint16) >> 8
        return Image.fromarray(grey.astype(np.uint8))
    if image.mode not in ("I", "F"):
        return image
    pixels = np.nan_to_num(np.asarray(image, np.float64))
    pixels -= pixels.min()
    scale = 255 / max(float(pixels.max()), 1e-12)
    return Image.fromarray(np.round(pixels * scale).astype(np.uint8))


def _without_alpha(image: Image.Image) -> Image.Image:
    if image.mode in ("L", "RGB", "CMYK") and "transparency" not in image.info:
        return image
    if not image.has_transparency_data:
        return image.convert("L" if image.mode == "1" else "RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _convert_to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert to 8-bit RGB in sRGB, without metadata; a damaged profile, or one for
    another mode, is ignored.
    """
    if profile:
        with suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):
            image = _apply_profile(image, profile)
    rgb = image.convert("RGB").copy()
    rgb.info = {}
    return rgb


def _apply_profile(image: Image.Image, profile: bytes) -> Image.Image:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if ImageCms.getProfileDescription(source).startswith("sRGB"):
        return image
    target = ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
    return converted or image


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
