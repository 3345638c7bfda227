"""Objects a batch should find."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_convert, clip_boxes_to_image

from coin_ray.errors import InputError

Size = tuple[int, int]
COVERED = 0.5
"""Share of a box in an ignored region from which it is not background."""


@dataclass(frozen=True, slots=True, eq=False)
class Targets:
    """Objects of one image: ``boxes`` [N, 4] xyxy pixels, ``labels`` [N] in 0..K-1.

    ``weights`` [N]: how much each counts in every loss, as a pseudo-label's score
    (None: 1). ``ignored`` [M, 4]: boxes in which nothing is background, as crowds
    (None: nowhere).
    """

    boxes: Tensor
    labels: Tensor
    weights: Tensor | None = None
    ignored: Tensor | None = None

    @property
    def certainty(self) -> Tensor:
        """[N] ``weights``, ones if there are none."""
        return (
            torch.ones_like(self.labels, dtype=torch.float32)
            if self.weights is None
            else self.weights
        )

    @property
    def left_out(self) -> Tensor:
        """[M, 4] ``ignored``."""
        return self.boxes.new_zeros(0, 4) if self.ignored is None else self.ignored

    def to(self, device: torch.device) -> Targets:
        weights, ignored = (
            None if t is None else t.to(device) for t in (self.weights, self.ignored)
        )
        return Targets(self.boxes.to(device), self.labels.to(device), weights, ignored)

    def normalised(self, size: Size) -> Tensor:
        """Boxes [N, 4] as cxcywh in 0..1 of an image of ``size`` (height, width)."""
        return normalise(self.boxes, size)


@torch.no_grad()
def covered(boxes: Tensor, regions: Tensor) -> Tensor:
    """[N] bool: at least half of the box [N, 4] lies in one of ``regions`` [M, 4]
    (xyxy).
    """
    if not len(regions):
        return torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    sides = torch.minimum(boxes[:, None, 2:], regions[:, 2:]) - torch.maximum(
        boxes[:, None, :2], regions[:, :2]
    )
    area = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)
    return (
        sides.clamp(min=0).prod(-1) >= COVERED * area[:, None].clamp(min=1e-12)
    ).any(1)


def normalise(boxes: Tensor, size: Size) -> Tensor:
    """xyxy pixels [N, 4] -> cxcywh in 0..1 of an image of ``size`` (height, width)."""
    height, width = size
    centred: Tensor = box_convert(boxes.float(), "xyxy", "cxcywh")
    return centred / centred.new_tensor([width, height, width, height])


def pixels(boxes: Tensor, size: Size) -> Tensor:
    """cxcywh in 0..1 [N, 4] -> xyxy pixels inside an image of ``size`` (height, width)."""
    height, width = size
    corners = box_convert(boxes, "cxcywh", "xyxy") * boxes.new_tensor(
        [width, height, width, height]
    )
    clipped: Tensor = clip_boxes_to_image(corners, size)
    return clipped


def checked(
    targets: Sequence[Targets], sizes: Sequence[Size], classes: int
) -> list[Targets]:
    """``targets`` with boxes cut at the border of their image. Raises InputError for
    what no loss can be made of.
    """
    if len(targets) != len(sizes):
        raise InputError(
            f"expected targets for each of the {len(sizes)} images; got {len(targets)}"
        )
    return [
        _checked(t, size, classes, image)
        for image, (t, size) in enumerate(zip(targets, sizes, strict=True))
    ]


def _checked(targets: Targets, size: Size, classes: int, image: int) -> Targets:
    labels = targets.labels
    if targets.boxes.shape != (len(labels), 4):
        raise InputError(
            f"image {image} of the batch: expected boxes [{len(labels)}, 4] for its"
            f" labels; got {list(targets.boxes.shape)}"
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise InputError(
            f"image {image} of the batch: labels must lie in 0..{classes - 1} for"
            f" {classes} classes; got {int(labels.min())}..{int(labels.max())}. Give"
            " the classes the annotations were made with"
        )
    boxes = clip_boxes_to_image(targets.boxes.float(), size)
    good = (boxes[:, 2:] > boxes[:, :2]).all(1)
    if not bool(good.all()):
        bad = targets.boxes[~good][0].tolist()
        raise InputError(
            f"image {image} of the batch: box {bad} has no area inside the image"
            f" (height {size[0]}, width {size[1]}). Boxes are xyxy pixels; remove empty"
            " ones from the annotations"
        )
    return Targets(
        boxes,
        labels,
        _weights(targets, image),
        clip_boxes_to_image(targets.left_out.float(), size),
    )


def _weights(targets: Targets, image: int) -> Tensor:
    weights = targets.certainty.float()
    if weights.shape != targets.labels.shape or not bool(
        (weights.isfinite() & (weights >= 0)).all()
    ):
        raise InputError(
            f"image {image} of the batch: expected a finite weight of at least 0 for"
            f" each of {len(targets.labels)} objects; got {weights.tolist()}"
        )
    return weights
