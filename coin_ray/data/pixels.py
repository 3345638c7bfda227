"""Turn an opened image of any kind into the upright 8-bit RGB pixels that every model
and every service sees. Needs numpy and Pillow only: an export holds a copy of it.

Upright by EXIF, first frame, in sRGB, transparency on white. 8-bit values stay as they
are. Deeper grey images (16 and 32 bits, floats) have no defined white: an intensity
range says which values become 0 and 255.
"""

import io
import struct
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

IntensityRange = tuple[float, float]
"""The values of a deep grey image that become 0 and 255; values beyond are clipped."""

HAS_AVIF = find_spec("PIL.AvifImagePlugin") is not None
FORMATS = (
    *("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000"),
    *(("AVIF",) if HAS_AVIF else ()),
)
"""Formats that are opened. Pillow knows more, some of which start other programs."""
EXTREME_SHARE = 0.001
"""Share of pixels at either end that an image's own range leaves out: dead pixels."""
PHOTOMETRIC_TAG, SAMPLE_FORMAT_TAG = 0x0106, 0x0153
"""Of TIFF: 0 says that low values are white; 1 that they have no sign."""
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
DARK_LEVEL = 64
"""16-bit colours below this level in their upper 8 bits are of 14 bits or fewer."""
FEW_LEVELS = 32
"""16-bit colours within so few levels of their upper 8 bits are measurements, as of a
thermal camera, that need a range of their own."""


class TooFewLevels(ValueError):
    """An image has 16-bit colours of which 8 bits keep nearly nothing."""


def upright_rgb(
    image: Image.Image,
    intensity_range: IntensityRange | None = None,
    size: tuple[int, int] | None = None,
) -> Image.Image:
    """Return the image upright as 8-bit RGB without metadata, in ``size`` (of the
    upright image; None: full size). Raises what Pillow raises for a damaged file, and
    TooFewLevels for 16-bit colours that would be nearly uniform.

    ``intensity_range`` applies to deep grey images; None: each image's own range. The
    image is resized as stored, in the frame of the decoder's box, then turned.
    """
    stored_size = size
    if size is not None and orientation(image) >= 5:
        stored_size = size[1], size[0]
    deep_colour = is_deep_colour(image)
    box = None if stored_size is None else _decode_smaller(image, stored_size)
    image.load()
    opaque = _without_alpha(_eight_bit(image, intensity_range))
    rgb = _convert_to_srgb(opaque, image.info.get("icc_profile"))
    if deep_colour:
        _check_levels(rgb)
    if stored_size is not None and rgb.size != stored_size:
        rgb = rgb.resize(stored_size, Image.Resampling.LANCZOS, box, reducing_gap=3.0)
    turn = ORIENTATIONS.get(orientation(image))  # Pillow has turned a TIFF by now
    return rgb.transpose(turn) if turn is not None else rgb


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation 1..8; damaged EXIF data counts as upright."""
    try:
        value = image.getexif().get(ORIENTATION_TAG, 1)
    except BROKEN_FILE:
        return 1
    is_valid = isinstance(value, int) and 1 <= value <= 8
    return value if is_valid else 1


def is_deep(image: Image.Image) -> bool:
    """Tell whether an intensity range applies: grey with more than 8 bits."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def is_deep_colour(image: Image.Image) -> bool:
    """Tell whether an opened file, not yet decoded, holds colours of 16 bits. Pillow
    decodes only the upper 8 bits of each.
    """
    is_colour = image.mode in ("RGB", "RGBA", "RGBX", "CMYK")
    tiles = getattr(image, "tile", ())
    return is_colour and any(";16" in str(tile[3]) for tile in tiles)


def _check_levels(image: Image.Image) -> None:
    """Raise TooFewLevels if the upper 8 bits of 16-bit colours are nearly all equal."""
    levels = np.asarray(image)
    lowest, highest = int(levels.min()), int(levels.max())
    if highest < DARK_LEVEL:
        raise TooFewLevels(
            "the image has 16-bit colours, none of which exceeds"
            f" {256 * highest + 255} of 65535: it would be nearly black, with"
            f" {highest + 1} levels; stretch its values and store it with 8 bits"
        )
    if highest < lowest + FEW_LEVELS:
        raise TooFewLevels(
            f"the image has 16-bit colours between {256 * lowest} and"
            f" {256 * highest + 255} only: it would be nearly uniform, with"
            f" {highest - lowest + 1} levels; store it as 16-bit grey without"
            " transparency, or stretch its values and store it with 8 bits"
        )


def own_range(image: Image.Image) -> IntensityRange | None:
    """Return the range of a deep grey image's values without a thousandth of the pixels
    at either end; None for other images. A constant image has a range of length 0.
    """
    if not is_deep(image):
        return None
    pixels = _deep_values(image)
    values = pixels[np.isfinite(pixels) & ~_transparent(image, pixels)]
    if not values.size:
        return 0.0, 0.0
    low = float(np.quantile(values, EXTREME_SHARE, method="lower"))
    high = float(np.quantile(values, 1 - EXTREME_SHARE, method="higher"))
    if low == high:  # a few pixels are all that differs
        low, high = float(values.min()), float(values.max())
    return low, high


def model_input(image: Image.Image, metadata: Mapping[str, str]) -> NDArray[np.uint8]:
    """Return the input ``images`` [1, H, W, 3] of an exported ONNX model for an opened
    image. ``metadata``: the model's, which may hold the range it was trained on.
    """
    intensity_range = parse_range(metadata.get("intensity_range", ""))
    return np.asarray(upright_rgb(image, intensity_range))[None]


def format_range(intensity_range: IntensityRange) -> str:
    """Return the range as text, for a model's metadata; ``parse_range`` reads it."""
    return " ".join(map(repr, map(float, intensity_range)))


def parse_range(text: str) -> IntensityRange | None:
    """Return the range in a model's metadata; None for an empty text."""
    if not text:
        return None
    low, high = map(float, text.split())
    return low, high


def _eight_bit(
    image: Image.Image, intensity_range: IntensityRange | None
) -> Image.Image:
    """Convert a deep grey image to 8 bits; return another one as it is. Pixels that are
    no number are black, transparent ones white.
    """
    own = own_range(image)
    if own is None:
        return image
    low, high = intensity_range or own
    pixels = _deep_values(image)
    scale = 255 / max(high - low, 1e-12)
    if pixels.dtype == np.uint16:
        levels = np.arange(1 << 16, dtype=np.float64)
        grey = _stretch(levels, low, scale)[pixels]
    else:
        grey = _stretch(pixels.astype(np.float64), low, scale)
    if _tiff_tag(image, PHOTOMETRIC_TAG) == 0:
        grey = 255 - grey
    grey[_transparent(image, pixels)] = 255
    return Image.fromarray(grey)


def _deep_values(image: Image.Image) -> NDArray[np.generic]:
    """Return the values of a deep grey image. Pillow gives 32 bits a sign that they may
    not have in the file.
    """
    pixels: NDArray[np.generic] = np.asarray(image)
    has_no_sign = _tiff_tag(image, SAMPLE_FORMAT_TAG) == 1
    if has_no_sign and pixels.dtype == np.int32:
        return pixels.view(np.uint32)
    return pixels


def _tiff_tag(image: Image.Image, tag: int) -> object:
    """Return the first number of a tag of an opened TIFF; None if it has none."""
    numbers = getattr(image, "tag_v2", {}).get(tag)
    return numbers[0] if isinstance(numbers, tuple) and numbers else numbers


def _stretch(
    values: NDArray[np.float64], low: float, scale: float
) -> NDArray[np.uint8]:
    values -= low
    values *= scale
    np.nan_to_num(values, copy=False, nan=0.0)
    np.clip(values, 0, 255, out=values)
    return np.round(values).astype(np.uint8)


def _transparent(image: Image.Image, pixels: NDArray[np.generic]) -> NDArray[np.bool_]:
    """Return which pixels of a deep grey image have its transparent value."""
    value = image.info.get("transparency")
    if not isinstance(value, int):
        return np.zeros(pixels.shape, np.bool_)
    return np.asarray(pixels == value, np.bool_)


def _without_alpha(image: Image.Image) -> Image.Image:
    if image.mode in ("L", "RGB", "CMYK") and "transparency" not in image.info:
        return image
    if not image.has_transparency_data:
        return image.convert("L" if image.mode == "1" else "RGB")
    if image.mode == "La":
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _convert_to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert to 8-bit RGB in sRGB, without metadata; a damaged profile, or one for
    another mode, is ignored.
    """
    if profile:
        with suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if not ImageCms.getProfileDescription(source).startswith("sRGB"):
                image = _apply_profile(image, source)
    rgb = image.convert("RGB")
    rgb.info = {}
    return rgb


def _apply_profile(image: Image.Image, source: ImageCms.ImageCmsProfile) -> Image.Image:
    target = ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
    return converted or image


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
