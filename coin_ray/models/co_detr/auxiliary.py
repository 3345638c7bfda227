"""What every auxiliary head gives: its losses, and the positives of its one-to-many
assignment.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Positives:
    """Of one image: ``boxes`` [P, 4] that were assigned (anchors or proposals) and the
    objects' ``truth`` [P, 4] (xyxy pixels), ``labels`` [P], ``features`` [P, d] of the
    pyramid there, and the objects' ``weights`` [P].
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
class Outcome:
    """``losses``: plain, without any weight. ``positives``: one per image."""

    losses: dict[str, Tensor]
    positives: list[Positives]


def draw(rows: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """At most ``count`` of ``rows`` [N], at random."""
    if len(rows) <= count:
        return rows
    return rows[torch.randperm(len(rows), generator=generator)[:count].to(rows.device)]


def draw_balanced(
    positive: Tensor,
    negative: Tensor,
    count: int,
    share: float,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """``count`` rows, at most ``share`` of them from ``positive`` [P], the rest from
    ``negative`` [N].
    """
    positive = draw(positive, int(count * share), generator)
    return positive, draw(negative, count - len(positive), generator)
