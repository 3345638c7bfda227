"""Load the public-domain drawings that the demo's scenes are composed of.

Every drawing belongs to one *share* of the artwork, drawn once with a fixed seed by
``coin_ray.demo.build.drawings``:

* ``source``: the cloud and CLIP were both trained on it;
* ``target``: the drawings of the target domain. ``known_to_cloud`` and
  ``known_to_clip`` mark the drawings that each teacher was also trained on, in other
  scenes. The two draws are independent;
* ``unseen``: no model was trained on it; kept for measuring the limit.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

CLASSES = ("bird", "bug", "car", "cat", "flower", "fruit", "house", "person")
ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True, slots=True, eq=False)
class Drawing:
    """One drawing with transparency, at most 96 pixels on its longer side."""

    name: str
    """Path inside Debian's ``openclipart-png``."""
    label: str | None
    """One of ``CLASSES``, or None for clutter."""
    share: str
    known_to_cloud: bool
    known_to_clip: bool
    words: tuple[str, ...]
    image: Image.Image


@lru_cache(maxsize=2)
def load_drawings(path: Path = ASSETS / "drawings.parquet") -> tuple[Drawing, ...]:
    """Load all drawings of the file, class drawings and clutter, in a fixed order."""
    rows = pq.read_table(path).to_pylist()
    return tuple(
        Drawing(
            name=row["name"],
            label=row["label"],
            share=row["share"],
            known_to_cloud=row["known_to_cloud"],
            known_to_clip=row["known_to_clip"],
            words=tuple(row["words"]),
            image=Image.open(io.BytesIO(row["webp"])).convert("RGBA"),
        )
        for row in rows
    )
