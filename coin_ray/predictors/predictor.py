"""The interface of a trained detector that was read from files."""

from __future__ import annotations

from typing import Protocol

from PIL import Image

from coin_ray.structures import Detections


class Predictor(Protocol):
    """A detector with a closed list of ``classes``, called with one PIL image."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    def __call__(self, image: Image.Image) -> Detections:
        """Return the detections in pixels of ``image``, best first."""
