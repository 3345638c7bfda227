"""Images for the tests of the export."""

from __future__ import annotations

import numpy as np
from PIL import Image


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Coarse random patches."""
    pixels = np.random.default_rng(seed).integers(
        0, 255, (max(1, height // 12), max(1, width // 12), 3), np.uint8
    )
    return Image.fromarray(pixels).resize((width, height))
