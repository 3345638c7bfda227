"""What the pipeline needs of a detector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from coin_ray.structures import Detections


@dataclass(frozen=True, slots=True, eq=False)
class Images:
    """A batch: ``pixels`` [B, 3, H, W] float32 normalised, padded at the right and bottom; ``sizes`` (height, width) of each image inside."""

    pixels: Tensor
    sizes: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Regions:
    """What a detector says of R given boxes: ``pooled`` [R, C], ``embedded`` [R, D] unit length, ``logits`` [R, K+1], ``deltas`` [R, 4];
    and ``classes`` [K+1, D], the class embeddings the logits come from.
    """

    pooled: Tensor
    embedded: Tensor
    logits: Tensor
    deltas: Tensor
    classes: Tensor

    def float(self) -> Regions:
        """In float32, whatever precision the network ran in."""
        return Regions(self.pooled.float(), self.embedded.float(), self.logits.float(), self.deltas.float(), self.classes.float())


class Detector(Protocol):
    def predict(self, images: Images) -> list[Detections]:
        """Detections in the frame of each image, best first."""


class Regional(Protocol):
    def describe(self, shared: Tensor, boxes: Sequence[Tensor]) -> Regions:
        """RoI features and class logits of given boxes (one [N, 4] per image), what COIN needs of a student."""
