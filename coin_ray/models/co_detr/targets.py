"""Objects a batch should find."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_convert, clip_boxes_to_image

from coin_ray.errors import InputError

Size = tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Targets:
    """Objects of one image: ``boxes`` [N, 4] xyxy pixels, ``labels`` [N] in 0..K-1."""

    boxes: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Targets:
        return Targets(self.boxes.to(device), self.labels.to(device))

    def normalised(self, size: Size) -> Tensor:
        """Boxes [N, 4] as cxcywh in 0..1 of an image of ``size`` (height, width)."""
        return normalise(self.boxes, size)


def normalise(boxes: Tensor, size: Size) -> Tensor:
    """xyxy pixels [N, 4] -> cxcywh in 0..1 of an image of ``size`` (height, width)."""
    height, width = size
    centred: Tensor = box_convert(boxes.float(), "xyxy", "cxcywh")
    return centred / centred.new_tensor([width, height, width, height])


def pixels(boxes: Tensor, size: Size) -> Tensor:
    """cxcywh in 0..1 [N, 4] -> xyxy pixels inside an image of ``size`` (height, width)."""
    height, width = size
    corners = box_convert(boxes, "cxcywh", "xyxy") * boxes.new_tensor([width, height, width, height])
    clipped: Tensor = clip_boxes_to_image(corners, size)
    return clipped


def checked(targets: Sequence[Targets], sizes: Sequence[Size], classes: int) -> list[Targets]:
    """``targets`` with boxes cut at the border of their image. Raises InputError for what no loss can be made of."""
    if len(targets) != len(sizes):
        raise InputError(f"expected targets for each of the {len(sizes)} images; got {len(targets)}")
    return [_checked(t, size, classes, image) for image, (t, size) in enumerate(zip(targets, sizes, strict=True))]


def _checked(targets: Targets, size: Size, classes: int, image: int) -> Targets:
    labels = targets.labels
    if targets.boxes.shape != (len(labels), 4):
        raise InputError(f"image {image} of the batch: expected boxes [{len(labels)}, 4] for its labels; got {list(targets.boxes.shape)}")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise InputError(
            f"image {image} of the batch: labels must lie in 0..{classes - 1} for {classes} classes; got "
            f"{int(labels.min())}..{int(labels.max())}. Give the classes the annotations were made with"
        )
    boxes = clip_boxes_to_image(targets.boxes.float(), size)
    good = (boxes[:, 2:] > boxes[:, :2]).all(1)
    if not bool(good.all()):
        bad = targets.boxes[~good][0].tolist()
        raise InputError(
            f"image {image} of the batch: box {bad} has no area inside the image (height {size[0]}, width {size[1]}). "
            "Boxes are xyxy pixels; remove empty ones from the annotations"
        )
    return Targets(boxes, labels)
