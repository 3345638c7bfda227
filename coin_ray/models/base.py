"""Interfaces and tensors that all detectors share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from coin_ray import config


@dataclass(frozen=True, slots=True, eq=False)
class Images:
    """A batch: ``pixels`` [B, 3, H, W] float32 normalised, padded at the right and
    bottom; ``sizes`` (height, width) of each image inside.
    """

    pixels: Tensor
    sizes: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, eq=False)
class RegionOutputs:
    """Outputs of the region head for R boxes: ``pooled`` [R, C], ``embedded`` [R, D]
    unit length, ``logits`` [R, K+1], ``deltas`` [R, 4]; and ``classes`` [K+1, D], the
    class embeddings the logits come from.
    """

    pooled: Tensor
    embedded: Tensor
    logits: Tensor
    deltas: Tensor
    classes: Tensor

    def float(self) -> RegionOutputs:
        """Convert to float32, whatever precision the network ran in."""
        return RegionOutputs(
            self.pooled.float(),
            self.embedded.float(),
            self.logits.float(),
            self.deltas.float(),
            self.classes.float(),
        )


@dataclass(frozen=True, slots=True, eq=False)
class RpnOutputs:
    """Outputs of a region proposal network: ``anchors`` [A, 4] (the same for every
    image), ``objectness`` [B, A] logits, ``deltas`` [B, A, 4], ``boxes``: proposals
    [P, 4] per image.
    """

    anchors: Tensor
    objectness: Tensor
    deltas: Tensor
    boxes: list[Tensor]


class TwoStageStudent(Protocol):
    """A detector that COIN can train: it proposes boxes and describes any given box.
    ``config`` says how anchors and RoIs are sampled.
    """

    config: config.Detector
    num_classes: int

    def prepare(
        self, images: Sequence[Tensor], at_least: tuple[int, int] = (0, 0)
    ) -> Images:
        """Normalise uint8 images [3, H, W] of any sizes into one batch, padded to hold
        all of them and ``at_least`` (H, W).
        """

    def propose(self, images: Images) -> tuple[Any, RpnOutputs]:
        """Return the features computed once per image, for ``describe``, and the
        outputs of the region proposal network.
        """

    def describe(self, shared: Any, boxes: Sequence[Tensor]) -> RegionOutputs:
        """Return RoI features, class logits and deltas of boxes (one [N, 4] per
        image).
        """
