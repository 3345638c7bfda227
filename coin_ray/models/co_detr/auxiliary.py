"""Outputs that all auxiliary heads share: losses, and the positives of a one-to-many
assignment.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Positives:
    """Positives of one image: ``boxes`` [P, 4] that were assigned (anchors or
    proposals) and their objects' ``truth`` [P, 4] (xyxy pixels), ``labels`` [P],
    ``features`` [P, d] of the pyramid there, and the objects' ``weights`` [P].
    """

    boxes: Tensor
    truth: Tensor
    labels: Tensor
    features: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, rows: Tensor) -> Positives:
        return Positives(
            self.boxes[rows],
            self.truth[rows],
            self.labels[rows],
            self.features[rows],
            self.weights[rows],
        )


@dataclass(frozen=True, slots=True, eq=False)
class HeadOutputs:
    """``losses``: unweighted. ``positives``: one per image."""

    losses: dict[str, Tensor]
    positives: list[Positives]


def sample_rows(rows: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Sample at most ``count`` of ``rows`` [N] at random."""
    if len(rows) <= count:
        return rows
    order = torch.randperm(len(rows), generator=generator)
    return rows[order[:count].to(rows.device)]


def sample_balanced(
    positive: Tensor,
    negative: Tensor,
    count: int,
    share: float,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Sample ``count`` rows, at most ``share`` of them from ``positive`` [P], the
    others from ``negative`` [N].
    """
    positive = sample_rows(positive, int(count * share), generator)
    negative = sample_rows(negative, count - len(positive), generator)
    return positive, negative
