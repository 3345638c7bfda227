"""The interface of a trained detector that was read from files."""

from __future__ import annotations

from typing import Protocol

from PIL import Image

from coin_ray.data.pixels import IntensityRange
from coin_ray.structures import Detections


class Predictor(Protocol):
    """A detector with a closed list of ``classes``, called with one PIL image."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def intensity_range(self) -> IntensityRange | None:
        """The range in which it was trained on deep grey images; None: on 8-bit ones."""

    def __call__(self, image: Image.Image) -> Detections:
        """Return the detections in pixels of the upright ``image``, best first.

        ``image`` is of any kind that Pillow opens; the detector sees the pixels that
        training saw (``coin_ray.data.pixels``).
        """
