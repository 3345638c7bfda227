"""What the detectors of transformers share: class lists as tokens, in one pass or several,
the forward pass, and boxes in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou

from coin_ray.predictors.scored_boxes import DUPLICATE_IOU


@dataclass(frozen=True, eq=False)
class Prompt:
    """A class list as a model reads it: token tables [R, L] by argument name, and the
    share of each token in each class [K, L].
    """

    tokens: dict[str, Tensor]
    shares: Tensor


class Architecture(Protocol):
    """A transformers model with its processors."""

    @property
    def pads(self) -> bool:
        """Whether images of different sizes change each other's results in one batch."""

    def passes(self, classes: Sequence[str]) -> list[tuple[str, ...]]:
        """Return the classes in lists that the model reads at once."""

    def prompt(self, classes: Sequence[str]) -> Prompt: ...

    def predict(
        self, images: Sequence[Image.Image], prompt: Prompt
    ) -> tuple[Tensor, Tensor]:
        """Return all candidates: boxes [B, Q, 4] xyxy pixels of each image, and scores
        [B, Q, K].
        """


class OnePass:
    """A model that reads class lists of any length at once."""

    def passes(self, classes: Sequence[str]) -> list[tuple[str, ...]]:
        """Return one list."""
        return [tuple(classes)]


def split_classes(
    classes: Sequence[str], tokens: Sequence[int], limit: int
) -> list[tuple[str, ...]]:
    """Return the classes in as few lists as have at most ``limit`` tokens each, in their
    order; ``tokens``: those of each class. A class with more is a list of its own.
    """
    parts: list[list[str]] = []
    tokens_left = 0
    for name, count in zip(classes, tokens, strict=True):
        if not parts or count > tokens_left:
            parts.append([])
            tokens_left = limit
        parts[-1].append(name)
        tokens_left -= count
    return [tuple(part) for part in parts] or [()]


def share_scores(boxes: Sequence[Tensor], scores: Sequence[Tensor]) -> Tensor:
    """Return the scores [sum Q, sum K] of all classes in all boxes from the boxes [Q, 4]
    and scores [Q, K] of each pass over one image: for a class of another pass, the best
    score among that pass's boxes which overlap by ``DUPLICATE_IOU``, else 0.
    """
    all_boxes = torch.cat(list(boxes))
    columns = []
    first = 0
    for boxes_of_pass, scores_of_pass in zip(boxes, scores, strict=True):
        same_object = box_iou(all_boxes, boxes_of_pass) >= DUPLICATE_IOU
        shared = [(same_object * column).amax(1) for column in scores_of_pass.T]
        of_pass = torch.stack(shared, 1)
        of_pass[first : first + len(boxes_of_pass)] = scores_of_pass
        columns.append(of_pass)
        first += len(boxes_of_pass)
    return torch.cat(columns, 1)


def merge_passes(
    boxes: Sequence[Tensor], scores: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the boxes [B, sum Q, 4] and the scores [B, sum Q, sum K] of a batch from the
    boxes [B, Q, 4] and scores [B, Q, K] of each pass over it.
    """
    images = range(len(boxes[0]))
    vectors = [
        share_scores([b[i] for b in boxes], [s[i] for s in scores]) for i in images
    ]
    return torch.cat(list(boxes), 1), torch.stack(vectors)


def forward(model: Any, inputs: dict[str, Any]) -> Any:
    """Run the model on its device."""
    return model(**{name: tensor.to(model.device) for name, tensor in inputs.items()})


def scale_to_pixels(unit_boxes: Tensor, images: Sequence[Image.Image]) -> Tensor:
    """Return boxes [B, Q, 4] xyxy in 0..1 in pixels of each image."""
    sizes = torch.tensor([[*image.size, *image.size] for image in images])
    return unit_boxes * sizes[:, None]
