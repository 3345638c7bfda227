"""Compose scenes of drawings: a plain *source* style and a cluttered, hazy *target*
style.

Every scene is a pure function of its seed and of the drawings it may use.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from coin_ray.demo.drawings import CLASSES, Drawing

SIZE = 192
Style = Literal["source", "target"]
FloatImage = NDArray[np.float32]
PixelBox = tuple[int, int, int, int]
"""left, top, right, bottom"""
PLACEMENT_TRIES = 15
SIDE_MIN = 14
MAX_OVERLAP = 0.1
"""Largest share of a drawing that other boxes may cover."""


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """``image``: RGB, SIZE x SIZE. ``boxes``: [N, 4] xyxy pixels. ``labels``: [N]
    indices into CLASSES. ``drawings``: their origin.
    """

    image: Image.Image
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    drawings: tuple[Drawing, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Artwork:
    """The drawings to compose scenes of: objects by class, and unlabelled clutter."""

    objects: tuple[tuple[Drawing, ...], ...]
    clutter: tuple[Drawing, ...]

    @classmethod
    def from_drawings(cls, drawings: Sequence[Drawing]) -> Artwork:
        """Group drawings by class. Raises ValueError if a class has none."""
        objects: list[tuple[Drawing, ...]] = []
        missing_classes: list[str] = []
        for label in CLASSES:
            class_drawings = tuple(d for d in drawings if d.label == label)
            objects.append(class_drawings)
            if not class_drawings:
                missing_classes.append(label)
        if missing_classes:
            raise ValueError(
                "artwork needs at least one drawing of each class; none of"
                f" {', '.join(missing_classes)}"
            )
        clutter = tuple(drawing for drawing in drawings if drawing.label is None)
        return cls(tuple(objects), clutter)


def compose(
    artwork: Artwork, style: Style, seed: int, objects: tuple[int, int] = (1, 4)
) -> Scene:
    """Compose a scene of ``objects`` (at least, at most) labelled drawings that hardly
    overlap.
    """
    draw = random.Random(seed)
    if style == "source":
        canvas = plain_background(draw, SIZE)
    else:
        canvas = busy_background(draw, SIZE, artwork.clutter, (3, 7))
    boxes: list[PixelBox] = []
    drawings: list[Drawing] = []
    for _ in range(draw.randint(*objects)):
        drawing = draw.choice(draw.choice(artwork.objects))
        box = _find_free_box(draw, drawing.image, boxes)
        if box is not None:
            paste(canvas, drawing.image, box, mirrored=draw.random() < 0.5)
            boxes.append(box)
            drawings.append(drawing)
    if style == "target":
        canvas = haze(draw, canvas)
    box_array = np.array(boxes, np.float32).reshape(-1, 4)
    labels = [CLASSES.index(drawing.label or "") for drawing in drawings]
    return Scene(canvas, box_array, np.array(labels, np.int64), tuple(drawings))


def paste(
    canvas: Image.Image,
    drawing: Image.Image,
    box: PixelBox,
    mirrored: bool = False,
    opacity: float = 1.0,
) -> None:
    """Draw ``drawing`` over ``canvas``, stretched to ``box`` (xyxy pixels, may reach
    outside the canvas).
    """
    left, top, right, bottom = box
    size = max(right - left, 1), max(bottom - top, 1)
    image = drawing.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    if mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    alpha = image.getchannel("A")
    if opacity != 1:
        alpha = alpha.point([round(level * opacity) for level in range(256)])
    canvas.paste(image, (left, top), alpha)


def haze(
    draw: random.Random, image: Image.Image, strength: tuple[float, float] = (0.25, 0.6)
) -> Image.Image:
    """Add fog that thickens or thins from top to bottom, a colour cast, and sometimes a
    slight blur.
    """
    pixels = np.asarray(image, np.float32)
    top_density = draw.uniform(*strength)
    bottom_density = top_density * draw.uniform(0.4, 1.0)
    density = np.linspace(top_density, bottom_density, len(pixels), dtype=np.float32)
    veil = density[:, None, None]
    fog_brightness = np.float32(draw.uniform(170, 235))
    fog_tint = [draw.uniform(-18, 12), draw.uniform(-8, 8), draw.uniform(-12, 18)]
    fog = fog_brightness + np.array(fog_tint, np.float32)
    cast = [draw.uniform(0.7, 1.05), draw.uniform(0.8, 1.05), draw.uniform(0.75, 1.1)]
    foggy = pixels * (1 - veil) + fog * veil
    hazy = to_image(foggy * np.array(cast, np.float32))
    if draw.random() < 0.5:
        return hazy.filter(ImageFilter.GaussianBlur(draw.uniform(0.3, 0.9)))
    return hazy


def to_image(pixels: FloatImage) -> Image.Image:
    """Convert pixels [H, W, 3] to an image, clipped to 0..255."""
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def plain_background(draw: random.Random, size: int) -> Image.Image:
    """Draw a bright colour, half of the time darker towards the bottom."""
    colour = np.array([draw.uniform(150, 255) for _ in range(3)], np.float32)
    bottom_shade = draw.uniform(0.8, 1.0) if draw.random() < 0.5 else 1.0
    shade = np.linspace(1, bottom_shade, size, dtype=np.float32)
    rows = colour * shade[:, None, None]
    return to_image(np.broadcast_to(rows, (size, size, 3)))


def busy_background(
    draw: random.Random, size: int, clutter: Sequence[Drawing], count: tuple[int, int]
) -> Image.Image:
    """Draw a sky and a ground with texture, and pieces of unlabelled clutter, partly
    transparent.
    """
    canvas = to_image(_landscape(draw, size) + _texture(draw, size))
    if not clutter:
        return canvas
    for _ in range(draw.randint(*count)):
        piece = draw.choice(clutter).image
        scale = draw.uniform(0.15, 0.55) * size / max(piece.size)
        width = max(4, int(piece.width * scale))
        height = max(4, int(piece.height * scale))
        left = draw.randint(-width // 3, size - 2 * width // 3)
        top = draw.randint(-height // 3, size - 2 * height // 3)
        box = (left, top, left + width, top + height)
        paste(canvas, piece, box, opacity=draw.uniform(0.35, 0.9))
    return canvas


def _landscape(draw: random.Random, size: int) -> FloatImage:
    """Draw a sky and a ground, each with a colour gradient."""
    sky, horizon_sky, horizon_ground, ground = (
        np.array([draw.uniform(60, 240) for _ in range(3)], np.float32)
        for _ in range(4)
    )
    horizon = draw.randint(size // 4, 3 * size // 4)
    y = np.arange(size, dtype=np.float32)[:, None, None]
    above = sky + (horizon_sky - sky) * (y / horizon)
    depth = (y - horizon) / (size - horizon)
    below = horizon_ground + (ground - horizon_ground) * depth
    landscape: FloatImage = np.where(y < horizon, above, below)
    return landscape


def _texture(draw: random.Random, size: int) -> FloatImage:
    """Draw noise [size, size, 3] with a grain of 4, 8 or 16 pixels."""
    cell = draw.choice([4, 8, 16])
    cells = size // cell + 1
    generator = np.random.default_rng(draw.randrange(1 << 30))
    noise = generator.normal(0, draw.uniform(4, 22), (cells, cells, 3))
    channels = [
        Image.fromarray(channel).resize((size, size), Image.Resampling.BILINEAR)
        for channel in np.moveaxis(noise.astype(np.float32), -1, 0)
    ]
    return np.stack([np.asarray(channel) for channel in channels], -1)


def _find_free_box(
    draw: random.Random, image: Image.Image, boxes: Sequence[PixelBox]
) -> PixelBox | None:
    """Draw a random box for the drawing of which each other box covers at most a tenth;
    None if the drawing is too small or no box was free.
    """
    scale = draw.uniform(0.2, 0.55) * SIZE / max(image.size)
    width, height = int(image.width * scale), int(image.height * scale)
    if min(width, height) < SIDE_MIN:
        return None
    for _ in range(PLACEMENT_TRIES):
        left, top = draw.randint(0, SIZE - width), draw.randint(0, SIZE - height)
        box = (left, top, left + width, top + height)
        limit = MAX_OVERLAP * width * height
        if all(_shared_area(box, other) < limit for other in boxes):
            return box
    return None


def _shared_area(a: PixelBox, b: PixelBox) -> int:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(0, width) * max(0, height)
