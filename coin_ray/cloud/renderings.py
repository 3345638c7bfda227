"""Renderings of an image for a cloud. A detector of ordinary photos may detect far more
in another rendering of an unusual domain.

A rendering is ``plain``, or operations joined by "+", applied in the order of
``RENDERING_OPERATIONS``: ``inverted+reduced``. docs/demo.md measures what each is good
for. Boxes come back in the original's frame
(``coin_ray.cloud.adapters.parsing.to_original_frame``).
"""

from __future__ import annotations

from dataclasses import replace

from PIL import Image, ImageOps

from coin_ray.config import PLAIN_RENDERING, RENDERING_OPERATIONS
from coin_ray.data.canonical import (
    CanonicalImage,
    canonical_image,
    decode_sent,
    encode_jpeg,
)
from coin_ray.data.pixels import IntensityRange

REDUCED = 1.5
"""Side of the canvas / side of the image in its upper left corner, for ``reduced``:
objects that fill the image look smaller."""
MARGIN = (114, 114, 114)
"""Colour of the rest of the canvas; detectors that pad are trained with it."""


def render_image(
    image_file: bytes,
    max_side: int,
    rendering: str,
    intensity_range: IntensityRange | None = None,
    inspected_id: str = "",
) -> CanonicalImage:
    """Return a rendering of the file's image whose longer side has at most ``max_side``
    pixels. ``intensity_range``: of a run's deep grey images; ``inspected_id``: as in
    ``canonical_image``. Raises ``InputError`` for what is not a usable image.
    """
    if rendering == PLAIN_RENDERING:
        return canonical_image(image_file, max_side, intensity_range, inspected_id)
    operations = rendering.split("+")
    if "reduced" in operations:
        max_side = max(1, int(max_side / REDUCED))
    image = canonical_image(image_file, max_side, intensity_range)
    pixels = decode_sent(image)
    for operation in RENDERING_OPERATIONS:
        if operation in operations:
            pixels = _OPERATIONS[operation](pixels)
    return replace(
        image,
        data=encode_jpeg(pixels),
        media_type="image/jpeg",
        width=pixels.width,
        height=pixels.height,
        visible_size=(image.width, image.height),
        mirrored="mirrored" in operations,
    )


def _grey(pixels: Image.Image) -> Image.Image:
    return pixels.convert("L").convert("RGB")


def _invert_brightness(pixels: Image.Image) -> Image.Image:
    """Turn "white is hot" into "black is hot"."""
    return ImageOps.invert(pixels.convert("L")).convert("RGB")


def _pad_to_canvas(pixels: Image.Image) -> Image.Image:
    size = (round(pixels.width * REDUCED), round(pixels.height * REDUCED))
    canvas = Image.new("RGB", size, MARGIN)
    canvas.paste(pixels)
    return canvas


_OPERATIONS = {
    "mirrored": ImageOps.mirror,
    "grey": _grey,
    "inverted": _invert_brightness,
    "reduced": _pad_to_canvas,
}
