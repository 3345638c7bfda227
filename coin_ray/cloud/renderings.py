"""How an image is shown to a cloud. A detector of ordinary photos may see far more in
another rendering of a strange domain.

A view is ``plain``, or operations joined by "+", done in the order of ``RENDERING_OPERATIONS``:
``inverted+reduced``. What each is good for is measured in docs/demo.md. Boxes come back
in the original's frame (``coin_ray.cloud.adapters.parsing.to_original_frame``).
"""

from __future__ import annotations

from dataclasses import replace

from PIL import Image, ImageOps

from coin_ray.config import PLAIN_RENDERING, RENDERING_OPERATIONS
from coin_ray.data.canonical import CanonicalImage, canonical_image, decode_sent, encode_jpeg

REDUCED = 1.5
"""Side of the canvas / side of the image in its upper left corner, for ``reduced``:
objects that fill the image look smaller."""
MARGIN = (114, 114, 114)
"""Colour of the rest of the canvas; detectors that pad are trained with it."""


def image_in_view(raw: bytes, max_side: int, view: str) -> CanonicalImage:
    """The file's image in a view, with a longer side of at most ``max_side`` pixels.
    Raises ``InputError`` for what is not a usable image.
    """
    if view == PLAIN_RENDERING:
        return canonical_image(raw, max_side)
    asked = view.split("+")
    image = canonical_image(
        raw, max(1, int(max_side / REDUCED)) if "reduced" in asked else max_side
    )
    pixels = decode_sent(image)
    for operation in RENDERING_OPERATIONS:
        if operation in asked:
            pixels = _DONE[operation](pixels)
    shown = (image.width, image.height)
    return replace(
        image,
        data=encode_jpeg(pixels),
        media_type="image/jpeg",
        width=pixels.width,
        height=pixels.height,
        visible_size=shown,
        mirrored="mirrored" in asked,
    )


def _grey(pixels: Image.Image) -> Image.Image:
    return pixels.convert("L").convert("RGB")


def _inverted(pixels: Image.Image) -> Image.Image:
    """Of the brightness: "white is hot" becomes "black is hot"."""
    return ImageOps.invert(pixels.convert("L")).convert("RGB")


def _reduced(pixels: Image.Image) -> Image.Image:
    canvas = Image.new(
        "RGB", (round(pixels.width * REDUCED), round(pixels.height * REDUCED)), MARGIN
    )
    canvas.paste(pixels)
    return canvas


_DONE = {
    "mirrored": ImageOps.mirror,
    "grey": _grey,
    "inverted": _inverted,
    "reduced": _reduced,
}
