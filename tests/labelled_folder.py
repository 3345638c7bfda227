"""Write labelled images that a detector can be trained on in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from coin_ray.data.formats import Annotation, ImageRecord

CLASSES = ("cat", "dog")


def write_image_records(folder: Path, count: int, seed: int) -> list[ImageRecord]:
    """Write images of noise with one block per object: cats are red, dogs blue."""
    draw = np.random.default_rng(seed)
    image_records = []
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = draw.integers(90, 160, (48, 64, 3), np.uint8)
        annotations = []
        for label, colour in (("cat", (220, 20, 20)), ("dog", (20, 20, 220)))[
            : 1 + number % 2
        ]:
            x1, y1 = int(draw.integers(0, 40)), int(draw.integers(0, 24))
            pixels[y1 : y1 + 20, x1 : x1 + 20] = colour
            annotations.append(
                Annotation((float(x1), float(y1), x1 + 20.0, y1 + 20.0), label)
            )
        uri = folder / f"{seed}_{number}.png"
        Image.fromarray(pixels).save(uri)
        image_records.append(
            ImageRecord.from_annotations(uri.name, str(uri), (64, 48), annotations)
        )
    return image_records
