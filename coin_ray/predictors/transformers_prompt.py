"""What the detectors of transformers share: class lists as tokens, the forward pass, and
boxes in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor


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

    def prompt(self, classes: Sequence[str]) -> Prompt: ...

    def predict(
        self, images: Sequence[Image.Image], prompt: Prompt
    ) -> tuple[Tensor, Tensor]:
        """Return all candidates: boxes [B, Q, 4] xyxy pixels of each image, and scores
        [B, Q, K].
        """


def forward(model: Any, inputs: dict[str, Any]) -> Any:
    """Run the model on its device."""
    return model(**{name: tensor.to(model.device) for name, tensor in inputs.items()})


def scale_to_pixels(unit_boxes: Tensor, images: Sequence[Image.Image]) -> Tensor:
    """Return boxes [B, Q, 4] xyxy in 0..1 in pixels of each image."""
    sizes = torch.tensor([[*image.size, *image.size] for image in images])
    return unit_boxes * sizes[:, None]
