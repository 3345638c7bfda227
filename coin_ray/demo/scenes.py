"""Scenes composed of drawings: a plain *source* style and a cluttered, hazy *target*
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
    """The drawings one party composes scenes of: objects by class, and unlabelled
    clutter.
    """

    objects: tuple[tuple[Drawing, ...], ...]
    clutter: tuple[Drawing, ...]

    @classmethod
    def from_drawings(cls, drawings: Sequence[Drawing]) -> Artwork:
        objects = tuple(
            tuple(d for d in drawings if d.label == label) for label in CLASSES
        )
        missing = [
            label for label, found in zip(CLASSES, objects, strict=True) if not found
        ]
        if missing:
            raise ValueError(
                "artwork needs at least one drawing of each class; none of"
                f" {', '.join(missing)}"
            )
        return cls(objects, tuple(d for d in drawings if d.label is None))


def compose(
    artwork: Artwork, style: Style, seed: int, objects: tuple[int, int] = (1, 4)
) -> Scene:
    """One scene with ``objects`` (at least, at most) labelled drawings that hardly
    overlap.
    """
    draw = random.Random(seed)
    canvas = _plain(draw) if style == "source" else _busy(draw, artwork.clutter)
    boxes: list[tuple[int, int, int, int]] = []
    placed: list[Drawing] = []
    wanted = draw.randint(*objects)
    for _ in range(wanted):
        drawing = draw.choice(draw.choice(artwork.objects))
        box = _find_place(draw, drawing.image, boxes)
        if box is not None:
            paste(canvas, drawing.image, box, mirrored=draw.random() < 0.5)
            boxes.append(box)
            placed.append(drawing)
    if style == "target":
        canvas = haze(draw, canvas)
    labels = np.array([CLASSES.index(d.label or "") for d in placed], np.int64)
    return Scene(
        canvas, np.array(boxes, np.float32).reshape(-1, 4), labels, tuple(placed)
    )


def paste(
    canvas: Image.Image,
    drawing: Image.Image,
    box: tuple[int, int, int, int],
    mirrored: bool = False,
    opacity: float = 1.0,
) -> None:
    """Draw ``drawing`` over ``canvas``, stretched to ``box`` (xyxy pixels, may reach
    outside the canvas).
    """
    left, top, right, bottom = box
    image = drawing.resize(
        (max(right - left, 1), max(bottom - top, 1)),
        Image.Resampling.BILINEAR,
        reducing_gap=2.0,
    )
    if mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    alpha = image.getchannel("A")
    canvas.paste(
        image,
        (left, top),
        (
            alpha
            if opacity == 1
            else alpha.point([round(a * opacity) for a in range(256)])
        ),
    )


def haze(
    draw: random.Random, image: Image.Image, strength: tuple[float, float] = (0.25, 0.6)
) -> Image.Image:
    """Fog that thickens or thins from top to bottom, a colour cast, and sometimes a
    slight blur.
    """
    pixels = np.asarray(image, np.float32)
    dense = draw.uniform(*strength)
    veil = np.linspace(
        dense, dense * draw.uniform(0.4, 1.0), len(pixels), dtype=np.float32
    )[:, None, None]
    fog = np.float32(draw.uniform(170, 235)) + np.array(
        [draw.uniform(-18, 12), draw.uniform(-8, 8), draw.uniform(-12, 18)], np.float32
    )
    cast = np.array(
        [draw.uniform(0.7, 1.05), draw.uniform(0.8, 1.05), draw.uniform(0.75, 1.1)],
        np.float32,
    )
    hazy = to_image((pixels * (1 - veil) + fog * veil) * cast)
    return (
        hazy.filter(ImageFilter.GaussianBlur(draw.uniform(0.3, 0.9)))
        if draw.random() < 0.5
        else hazy
    )


def to_image(pixels: FloatImage) -> Image.Image:
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def plain_background(draw: random.Random, size: int) -> Image.Image:
    colour = np.array([draw.uniform(150, 255) for _ in range(3)], np.float32)
    shade = np.linspace(
        1,
        draw.uniform(0.8, 1.0) if draw.random() < 0.5 else 1.0,
        size,
        dtype=np.float32,
    )
    return to_image(np.broadcast_to(colour * shade[:, None, None], (size, size, 3)))


def busy_background(
    draw: random.Random, size: int, clutter: Sequence[Drawing], count: tuple[int, int]
) -> Image.Image:
    """A sky and a ground with texture, and pieces of unlabelled clutter, partly
    transparent.
    """
    sky, horizon_sky, horizon_ground, ground = (
        np.array([draw.uniform(60, 240) for _ in range(3)], np.float32)
        for _ in range(4)
    )
    horizon = draw.randint(size // 4, 3 * size // 4)
    y = np.arange(size, dtype=np.float32)[:, None, None]
    above = sky + (horizon_sky - sky) * (y / horizon)
    below = horizon_ground + (ground - horizon_ground) * (
        (y - horizon) / (size - horizon)
    )
    cell = draw.choice([4, 8, 16])
    cells = size // cell + 1
    noise = (
        np.random.default_rng(draw.randrange(1 << 30))
        .normal(0, draw.uniform(4, 22), (cells, cells, 3))
        .astype(np.float32)
    )
    texture = np.stack(
        [
            np.asarray(
                Image.fromarray(noise[..., c]).resize(
                    (size, size), Image.Resampling.BILINEAR
                )
            )
            for c in range(3)
        ],
        -1,
    )
    canvas = to_image(np.where(y < horizon, above, below) + texture)
    for _ in range(draw.randint(*count) if clutter else 0):
        piece = draw.choice(clutter).image
        scale = draw.uniform(0.15, 0.55) * size / max(piece.size)
        width, height = (
            max(4, int(piece.width * scale)),
            max(4, int(piece.height * scale)),
        )
        left, top = (
            draw.randint(-width // 3, size - 2 * width // 3),
            draw.randint(-height // 3, size - 2 * height // 3),
        )
        paste(
            canvas,
            piece,
            (left, top, left + width, top + height),
            opacity=draw.uniform(0.35, 0.9),
        )
    return canvas


def _plain(draw: random.Random) -> Image.Image:
    return plain_background(draw, SIZE)


def _busy(draw: random.Random, clutter: Sequence[Drawing]) -> Image.Image:
    return busy_background(draw, SIZE, clutter, (3, 7))


def _find_place(
    draw: random.Random, image: Image.Image, taken: Sequence[tuple[int, int, int, int]]
) -> tuple[int, int, int, int] | None:
    """A random box for the drawing that covers at most a tenth of itself with boxes
    already taken.
    """
    scale = draw.uniform(0.2, 0.55) * SIZE / max(image.size)
    width, height = int(image.width * scale), int(image.height * scale)
    if min(width, height) < 14:
        return None
    for _ in range(15):
        left, top = draw.randint(0, SIZE - width), draw.randint(0, SIZE - height)
        box = (left, top, left + width, top + height)
        if all(_overlap(box, other) < 0.1 * width * height for other in taken):
            return box
    return None


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> int:
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(
        0, min(a[3], b[3]) - max(a[1], b[1])
    )
