"""Show a student its training images at random sizes: scale jitter, as detectors are
trained with (torchvision's ``ScaleJitter`` and ``RandomZoomOut``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from coin_ray.structures import Pairs, Separation, Targets

GREY = 114
"""Value of pixels around an image that was made smaller."""
VISIBLE_SHARE = 0.35
"""Boxes of which less is left after the crop are not learned."""
SIDE_MIN = 2.0
"""Nor are those with a shorter side, in pixels."""


@dataclass(frozen=True)
class Zoom:
    """An image of ``size`` (height, width) scaled to ``scaled`` (height, width), its
    left top corner at ``offset`` (x, y) of an image of the same size.
    """

    size: tuple[int, int]
    scaled: tuple[int, int]
    offset: tuple[int, int]

    @classmethod
    def draw(
        cls,
        size: tuple[int, int],
        zoom: tuple[float, float],
        generator: torch.Generator,
    ) -> Zoom:
        """Draw a factor from ``zoom``, and a random place."""
        lowest, highest = zoom
        draws = torch.rand(3, generator=generator).tolist()
        factor = lowest + (highest - lowest) * draws[0]
        height, width = size
        new_height = max(1, round(height * factor))
        new_width = max(1, round(width * factor))
        left = round(draws[1] * (width - new_width))
        top = round(draws[2] * (height - new_height))
        return cls(size, (new_height, new_width), (left, top))

    def zoom_image(self, image: Tensor) -> Tensor:
        """Zoom a uint8 image [3, H, W]. What is too large is cropped, what is left over
        is grey.
        """
        return _paste(_resize(image, *self.scaled), *self.size, *self.offset)

    def zoom_targets(self, targets: Targets) -> Targets:
        boxes, is_visible = self._zoom_boxes(targets.boxes)
        ignored, is_ignored = self._zoom_boxes(targets.ignored)
        return Targets(
            boxes[is_visible],
            targets.probs[is_visible],
            targets.weights[is_visible],
            ignored[is_ignored],
        )

    def zoom_separation(self, separation: Separation) -> Separation:
        private, is_visible = self._zoom_boxes(separation.private.boxes)
        return Separation(
            self._zoom_pairs(separation.consistent),
            self._zoom_pairs(separation.inconsistent),
            separation.private.with_boxes(private)[is_visible],
            separation.reviewed,
            int(is_visible[: separation.cloud_private].sum()),
        )

    def _zoom_pairs(self, pairs: Pairs) -> Pairs:
        """Zoom the pairs' fused boxes, which are learned; each teacher's own stay."""
        boxes, is_visible = self._zoom_boxes(pairs.boxes)
        return Pairs(boxes, pairs.cloud, pairs.clip)[is_visible]

    def _zoom_boxes(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Return boxes [N, 4] in the new image, cut at its edges, and [N] whether enough
        of each is left.
        """
        height, width = self.size
        factors = self.scaled[1] / width, self.scaled[0] / height
        moved = boxes * boxes.new_tensor(factors * 2)
        moved = moved + boxes.new_tensor(self.offset * 2)
        cut = torch.minimum(moved.clamp(min=0), boxes.new_tensor((width, height) * 2))
        sides = cut[:, 2:] - cut[:, :2]
        area_before = (moved[:, 2:] - moved[:, :2]).prod(1)
        is_visible = sides.prod(1) >= VISIBLE_SHARE * area_before
        return cut, is_visible & (sides.amin(1) >= SIDE_MIN)


def zoom_randomly(
    image: Tensor,
    targets: Targets,
    zoom: tuple[float, float],
    generator: torch.Generator,
) -> tuple[Tensor, Targets]:
    """Scale a uint8 image [3, H, W] and its targets by a factor drawn from ``zoom``, at
    a random place of an image of the same size.
    """
    if zoom == (1.0, 1.0):
        return image, targets
    drawn = Zoom.draw((image.shape[1], image.shape[2]), zoom, generator)
    return drawn.zoom_image(image), drawn.zoom_targets(targets)


def zoom_separation_randomly(
    image: Tensor,
    separation: Separation,
    zoom: tuple[float, float],
    generator: torch.Generator,
) -> tuple[Tensor, Separation]:
    """Scale an image and its separation as ``zoom_randomly`` does."""
    if zoom == (1.0, 1.0):
        return image, separation
    drawn = Zoom.draw((image.shape[1], image.shape[2]), zoom, generator)
    return drawn.zoom_image(image), drawn.zoom_separation(separation)


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    resized = F.interpolate(
        image[None].float(),
        (height, width),
        mode="bilinear",
        antialias=True,
        align_corners=False,
    )
    return resized[0].round().clamp(0, 255).to(torch.uint8)


def _paste(image: Tensor, height: int, width: int, left: int, top: int) -> Tensor:
    """Return a grey image [3, height, width] with ``image`` at (left, top), which may be
    negative.
    """
    canvas = image.new_full((3, height, width), GREY)
    first_x, first_y = max(0, left), max(0, top)
    end_x = min(width, left + image.shape[2])
    end_y = min(height, top + image.shape[1])
    canvas[:, first_y:end_y, first_x:end_x] = image[
        :, first_y - top : end_y - top, first_x - left : end_x - left
    ]
    return canvas
