"""How far the boxes of a service's answers reach: a unit that one answer does not give
away, as whole numbers of percent, puts the boxes of all answers into the upper left.
"""

from __future__ import annotations

import logging

from coin_ray.cloud.protocol import Frame, RawDetections
from coin_ray.errors import BadRequest

CORNER_SHARE = 0.101
"""Percent read as thousandths reach to a tenth of the sides."""
CORNER_ANSWERS, CORNER_BOXES = 10, 20
PART_SHARE = 0.6
"""Pixels or thousandths read as the other may reach so far."""
PART_ANSWERS, PART_BOXES = 30, 100

logger = logging.getLogger(__name__)


class BoxExtent:
    """Notes the largest coordinate of all boxes, as a share of the images' sides."""

    def __init__(self) -> None:
        self._answers = self._boxes = 0
        self._largest_share = 0.0
        self._is_told = False

    def add(self, raw: RawDetections, frame: Frame) -> None:
        """Note an answer. Raises ``BadRequest`` once enough boxes all lie in the upper
        left corner, and warns where they only keep to a part of the images.
        """
        if not len(raw) or frame.mirrored:
            return
        width, height = frame.original
        x_share = float(raw.boxes[:, 2].max()) / width
        y_share = float(raw.boxes[:, 3].max()) / height
        self._largest_share = max(self._largest_share, x_share, y_share)
        self._answers += 1
        self._boxes += len(raw)
        message = (
            f"all {self._boxes} boxes of {self._answers} answers lie in the upper left"
            f" {self._largest_share:.0%} of the images: are the coordinates in"
            " the unit that the prompt asks for? Otherwise set cloud.coordinates to what"
            " the model writes"
        )
        enough = self._answers >= CORNER_ANSWERS and self._boxes >= CORNER_BOXES
        if enough and self._largest_share <= CORNER_SHARE:
            raise BadRequest(message)
        enough = self._answers >= PART_ANSWERS and self._boxes >= PART_BOXES
        if enough and self._largest_share <= PART_SHARE and not self._is_told:
            self._is_told = True
            logger.warning("%s", message)
