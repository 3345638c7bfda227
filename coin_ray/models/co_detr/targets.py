"""Ground truth of a batch: objects, their weights and ignored regions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_convert, clip_boxes_to_image

from coin_ray.errors import InputError

Size = tuple[int, int]
COVERED_SHARE = 0.5
"""Share of a box in an ignored region from which it is not background."""


@dataclass(frozen=True, slots=True, eq=False)
class DetrTargets:
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
    def object_weights(self) -> Tensor:
        """[N] ``weights``, ones if there are none."""
        if self.weights is None:
            return torch.ones_like(self.labels, dtype=torch.float32)
        return self.weights

    @property
    def ignored_boxes(self) -> Tensor:
        """[M, 4] ``ignored``, M = 0 if there are none."""
        return self.boxes.new_zeros(0, 4) if self.ignored is None else self.ignored

    def to(self, device: torch.device) -> DetrTargets:
        return DetrTargets(
            self.boxes.to(device),
            self.labels.to(device),
            None if self.weights is None else self.weights.to(device),
            None if self.ignored is None else self.ignored.to(device),
        )

    def normalised_boxes(self, size: Size) -> Tensor:
        """Return boxes [N, 4] as cxcywh in 0..1 of an image of ``size`` (height,
        width).
        """
        return normalise(self.boxes, size)


@torch.no_grad()
def is_covered(boxes: Tensor, regions: Tensor) -> Tensor:
    """Return [N] bool: at least half of the box [N, 4] lies in one of ``regions``
    [M, 4] (xyxy).
    """
    if not len(regions):
        return torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    right_bottom = torch.minimum(boxes[:, None, 2:], regions[:, 2:])
    left_top = torch.maximum(boxes[:, None, :2], regions[:, :2])
    intersection = (right_bottom - left_top).clamp(min=0).prod(-1)
    area = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)
    needed = COVERED_SHARE * area[:, None].clamp(min=1e-12)
    return (intersection >= needed).any(1)


def normalise(boxes: Tensor, size: Size) -> Tensor:
    """Convert xyxy pixels [N, 4] to cxcywh in 0..1 of an image of ``size`` (height,
    width).
    """
    height, width = size
    centred: Tensor = box_convert(boxes.float(), "xyxy", "cxcywh")
    return centred / centred.new_tensor([width, height, width, height])


def denormalise(boxes: Tensor, size: Size) -> Tensor:
    """Convert cxcywh in 0..1 [N, 4] to xyxy pixels inside an image of ``size`` (height,
    width).
    """
    height, width = size
    scale = boxes.new_tensor([width, height, width, height])
    corners = box_convert(boxes, "cxcywh", "xyxy") * scale
    clipped: Tensor = clip_boxes_to_image(corners, size)
    return clipped


def validate_targets(
    targets: Sequence[DetrTargets], sizes: Sequence[Size], classes: int
) -> list[DetrTargets]:
    """Return ``targets`` with boxes clipped to their image. Raises InputError for
    targets that no loss can be computed from.
    """
    if len(targets) != len(sizes):
        raise InputError(
            f"expected targets for each of the {len(sizes)} images; got {len(targets)}"
        )
    return [
        _validate_image(image_targets, size, classes, image)
        for image, (image_targets, size) in enumerate(zip(targets, sizes, strict=True))
    ]


def _validate_image(
    targets: DetrTargets, size: Size, classes: int, image: int
) -> DetrTargets:
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
    has_area = (boxes[:, 2:] > boxes[:, :2]).all(1)
    if not bool(has_area.all()):
        empty_box = targets.boxes[~has_area][0].tolist()
        raise InputError(
            f"image {image} of the batch: box {empty_box} has no area inside the image"
            f" (height {size[0]}, width {size[1]}). Boxes are xyxy pixels; remove empty"
            " ones from the annotations"
        )
    weights = _validate_weights(targets, image)
    ignored = clip_boxes_to_image(targets.ignored_boxes.float(), size)
    return DetrTargets(boxes, labels, weights, ignored)


def _validate_weights(targets: DetrTargets, image: int) -> Tensor:
    weights = targets.object_weights.float()
    is_valid = weights.isfinite() & (weights >= 0)
    if weights.shape != targets.labels.shape or not bool(is_valid.all()):
        raise InputError(
            f"image {image} of the batch: expected a finite weight of at least 0 for"
            f" each of {len(targets.labels)} objects; got {weights.tolist()}"
        )
    return weights
