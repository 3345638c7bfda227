"""The interface of the detectors that the server runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from PIL import Image

from coin_ray.data.pixels import IntensityRange
from coin_ray.predictors.scored_boxes import ScoredBoxes


class ServedDetector(Protocol):
    """``classes``: those it was trained on; empty if it accepts any."""

    @property
    def name(self) -> str: ...

    @property
    def classes(self) -> Sequence[str]: ...

    def detect(
        self, image: Image.Image, classes: Sequence[str], score_min: float
    ) -> ScoredBoxes:
        """Return boxes [N, 4] xyxy pixels of the RGB image and independent scores [N,
        len(classes)], best first.
        """


@runtime_checkable
class BatchDetector(ServedDetector, Protocol):
    """A detector that takes several images at once and checks itself which classes it
    can be asked about.
    """

    @property
    def batch_max(self) -> int: ...

    def check(self, classes: Sequence[str]) -> None:
        """Raise InputError with the reason if it can't be asked about ``classes``."""

    def detect_batch(
        self, images: Sequence[Image.Image], classes: Sequence[str], score_min: float
    ) -> list[ScoredBoxes]:
        """Return what ``detect`` returns for each image, in less time."""


def intensity_range_of(detector: ServedDetector) -> IntensityRange | None:
    """Return the range in which the detector was trained on deep grey images; None for
    the others, as all teachers are.
    """
    intensity_range: IntensityRange | None = getattr(detector, "intensity_range", None)
    return intensity_range
