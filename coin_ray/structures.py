"""Detections of one image, the separation of two teachers' detections, and what it
teaches a student.

Conventions: boxes are absolute xyxy pixels of the upright original image; K
foreground classes are 0..K-1; in probability vectors background is the LAST of K+1
columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """Detections of one image.

    boxes [N, 4] float32, scores [N] float32 in 0..1, labels [N] int64, probs [N, K+1]
    float32 whose rows sum to 1.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    probs: Tensor

    def __post_init__(self) -> None:
        count = len(self.boxes)
        tensors = self.boxes, self.scores, self.labels, self.probs
        shapes = [tuple(tensor.shape) for tensor in tensors]
        expected = [(count, 4), (count,), (count,), (count, self.probs.shape[-1])]
        if shapes != expected:
            raise ValueError(
                "boxes, scores, labels, probs must have shapes [N, 4], [N], [N], [N,"
                f" K+1]; got {shapes}"
            )

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: Tensor | slice) -> Detections:
        """Select detections by a mask [N], an index tensor [M] or a slice, in that
        order.
        """
        return Detections(
            self.boxes[index], self.scores[index], self.labels[index], self.probs[index]
        )

    @property
    def num_classes(self) -> int:
        """K, without background."""
        return self.probs.shape[1] - 1

    @classmethod
    def empty(cls, num_classes: int) -> Detections:
        """Return no detections, of K = ``num_classes`` classes."""
        return cls(
            torch.zeros(0, 4),
            torch.zeros(0),
            torch.zeros(0, dtype=torch.int64),
            torch.zeros(0, num_classes + 1),
        )

    @classmethod
    def cat(cls, parts: Sequence[Detections]) -> Detections:
        """Concatenate detections of the same classes."""
        return cls(
            torch.cat([p.boxes for p in parts]),
            torch.cat([p.scores for p in parts]),
            torch.cat([p.labels for p in parts]),
            torch.cat([p.probs for p in parts]),
        )

    def with_boxes(self, boxes: Tensor) -> Detections:
        """Return the detections with other boxes [N, 4]."""
        return Detections(boxes, self.scores, self.labels, self.probs)

    def to(self, device: torch.device) -> Detections:
        return Detections(
            self.boxes.to(device),
            self.scores.to(device),
            self.labels.to(device),
            self.probs.to(device),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Detections of the same objects by both teachers, row by row, and the fused box
    of each pair [N, 4].
    """

    boxes: Tensor
    cloud: Detections
    clip: Detections

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: Tensor | slice) -> Pairs:
        return Pairs(self.boxes[index], self.cloud[index], self.clip[index])

    def to(self, device: torch.device) -> Pairs:
        return Pairs(self.boxes.to(device), self.cloud.to(device), self.clip.to(device))

    @classmethod
    def cat(cls, parts: Sequence[Pairs]) -> Pairs:
        """Concatenate pairs of the same classes."""
        return cls(
            torch.cat([p.boxes for p in parts]),
            Detections.cat([p.cloud for p in parts]),
            Detections.cat([p.clip for p in parts]),
        )

    @classmethod
    def empty(cls, num_classes: int) -> Pairs:
        """Return no pairs, of K = ``num_classes`` classes."""
        nothing = Detections.empty(num_classes)
        return cls(nothing.boxes, nothing, nothing)


@dataclass(frozen=True, slots=True, eq=False)
class Separation:
    """One image's cloud and CLIP detections, separated: ``consistent`` pairs agree on
    box and class, ``inconsistent`` pairs on the box only, ``private`` detections are
    from one teacher only.
    """

    consistent: Pairs
    inconsistent: Pairs
    private: Detections
    reviewed: bool = False
    """The boxes are a person's: all consistent, and complete."""
    cloud_private: int = 0
    """The first so many ``private`` detections are the cloud's, the others CLIP's."""

    @classmethod
    def from_labels(cls, labels: Detections, *, reviewed: bool = False) -> Separation:
        """Treat labels as certain: all consistent. They may be a person's, those of
        propagation, plain pseudo-labels or the oracle's.
        """
        return cls(
            Pairs(labels.boxes, labels, labels),
            Pairs.empty(labels.num_classes),
            labels[:0],
            reviewed,
        )

    def to(self, device: torch.device) -> Separation:
        return Separation(
            self.consistent.to(device),
            self.inconsistent.to(device),
            self.private.to(device),
            self.reviewed,
            self.cloud_private,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Targets:
    """What one image teaches a detector.

    boxes [N, 4] float32 xyxy pixels of the image tensor they come with; probs [N, K+1]
    float32, each box's class distribution, background last; weights [N] in 0..1: how
    much a box counts, 1 for a certain one, 0 for none; ignored [M, 4]: regions without
    any loss, which are neither object nor background.
    """

    boxes: Tensor
    probs: Tensor
    weights: Tensor
    ignored: Tensor

    def __post_init__(self) -> None:
        count, columns = len(self.boxes), self.probs.shape[-1]
        tensors = self.boxes, self.probs, self.weights, self.ignored
        shapes = [tuple(tensor.shape) for tensor in tensors]
        expected = [(count, 4), (count, columns), (count,), (len(self.ignored), 4)]
        if shapes != expected:
            raise ValueError(
                "boxes, probs, weights, ignored must have shapes [N, 4], [N, K+1], [N],"
                f" [M, 4]; got {shapes}"
            )

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def num_classes(self) -> int:
        """K, without background."""
        return self.probs.shape[1] - 1

    @property
    def labels(self) -> Tensor:
        """The most probable foreground class of each box, [N] int64."""
        return self.probs[:, :-1].argmax(1)

    @classmethod
    def from_labels(
        cls,
        boxes: Tensor,
        labels: Tensor,
        num_classes: int,
        ignored: Tensor | None = None,
    ) -> Targets:
        """Treat boxes [N, 4] with labels [N] as certain, such as a person's."""
        return cls(
            boxes,
            F.one_hot(labels, num_classes + 1).float(),
            torch.ones(len(boxes), device=boxes.device),
            boxes.new_zeros(0, 4) if ignored is None else ignored,
        )

    def to(self, device: torch.device) -> Targets:
        return Targets(
            self.boxes.to(device),
            self.probs.to(device),
            self.weights.to(device),
            self.ignored.to(device),
        )
