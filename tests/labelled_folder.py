"""Labelled images that a detector can be trained on in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from coin_ray.data.formats import Annotation, ImageRecord

CLASSES = ("cat", "dog")


def records(folder: Path, count: int, seed: int) -> list[ImageRecord]:
    """Images of noise with one block per object: cats are red, dogs blue."""
    draw = np.random.default_rng(seed)
    made = []
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = draw.integers(90, 160, (48, 64, 3), np.uint8)
        found = []
        for label, colour in (("cat", (220, 20, 20)), ("dog", (20, 20, 220)))[
            : 1 + number % 2
        ]:
            left, top = int(draw.integers(0, 40)), int(draw.integers(0, 24))
            pixels[top : top + 20, left : left + 20] = colour
            found.append(
                Annotation((float(left), float(top), left + 20.0, top + 20.0), label)
            )
        uri = folder / f"{seed}_{number}.png"
        Image.fromarray(pixels).save(uri)
        made.append(ImageRecord.from_annotations(uri.name, str(uri), (64, 48), found))
    return made
