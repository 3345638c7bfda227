"""The one record type of the pipeline, and what separation makes of two of them.

Conventions stated once: boxes are absolute xyxy pixels of the upright original image; K
foreground classes are 0..K-1; in probability vectors background is the LAST of K+1
columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
        shapes = [
            tuple(t.shape) for t in (self.boxes, self.scores, self.labels, self.probs)
        ]
        expected = [(count, 4), (count,), (count,), (count, self.probs.shape[-1])]
        if shapes != expected:
            raise ValueError(
                "boxes, scores, labels, probs must have shapes [N, 4], [N], [N], [N,"
                f" K+1]; got {shapes}"
            )

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: Tensor | slice) -> Detections:
        """The detections at a mask [N], an index tensor [M] or a slice, in that order."""
        return Detections(
            self.boxes[index], self.scores[index], self.labels[index], self.probs[index]
        )

    @property
    def num_classes(self) -> int:
        """K, without background."""
        return self.probs.shape[1] - 1

    @classmethod
    def empty(cls, num_classes: int) -> Detections:
        return cls(
            torch.zeros(0, 4),
            torch.zeros(0),
            torch.zeros(0, dtype=torch.int64),
            torch.zeros(0, num_classes + 1),
        )

    @classmethod
    def cat(cls, parts: Sequence[Detections]) -> Detections:
        return cls(
            torch.cat([p.boxes for p in parts]),
            torch.cat([p.scores for p in parts]),
            torch.cat([p.labels for p in parts]),
            torch.cat([p.probs for p in parts]),
        )

    def with_boxes(self, boxes: Tensor) -> Detections:
        return Detections(boxes, self.scores, self.labels, self.probs)

    def to(self, device: torch.device) -> Detections:
        return Detections(
            *(t.to(device) for t in (self.boxes, self.scores, self.labels, self.probs))
        )


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Detections of the same objects by both teachers, row by row, and the box that
    stands for each pair [N, 4].
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
        boxes = torch.cat([p.boxes for p in parts])
        return cls(
            boxes,
            Detections.cat([p.cloud for p in parts]),
            Detections.cat([p.clip for p in parts]),
        )

    @classmethod
    def empty(cls, num_classes: int) -> Pairs:
        none = Detections.empty(num_classes)
        return cls(none.boxes, none, none)


@dataclass(frozen=True, slots=True, eq=False)
class Separation:
    """One image's cloud and CLIP results: both agree on box and class | on the box only
    | seen by one teacher only.
    """

    consistent: Pairs
    inconsistent: Pairs
    private: Detections
    reviewed: bool = False
    """A person says what is in the image: all consistent, and where there is no box
    there is nothing."""

    @classmethod
    def from_labels(cls, labels: Detections, *, reviewed: bool = False) -> Separation:
        """Labels that are to be believed as they are: a person's, those of propagation,
        plain pseudo-labels, the oracle's.
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
        )
