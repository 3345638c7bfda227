"""Customised positive queries (arXiv 2211.12860, eq. 4): an auxiliary head's positives
as queries whose objects are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from coin_ray.config.co_detr import CoDetr
from coin_ray.models.co_detr.auxiliary import Positives, draw
from coin_ray.models.co_detr.criterion import Assigned
from coin_ray.models.co_detr.decoder import Queries
from coin_ray.models.co_detr.positions import EPSILON
from coin_ray.models.co_detr.targets import Size, normalise
from coin_ray.models.co_detr.two_stage import BoxEmbedding


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Queries whose objects are known, padded to the image with the most;
    ``assigned.counts`` [B, M] tells which are real.

    They fall into ``parts`` of equal length that don't see each other.
    """

    queries: Queries
    assigned: Assigned
    parts: int = 1


class PositiveQueries(nn.Module):
    def __init__(self, config: CoDetr, classes: int) -> None:
        super().__init__()
        self.limit, self.classes = config.max_positives, classes
        self.embedding = BoxEmbedding(config.width)
        self.feature, self.feature_norm = (
            nn.Linear(config.width, config.width),
            nn.LayerNorm(config.width),
        )
        self.head = nn.Parameter(torch.randn(config.width) * 0.02)

    def forward(
        self,
        positives: Sequence[Positives],
        sizes: Sequence[Size],
        generator: torch.Generator | None = None,
    ) -> Group:
        """Where the boxes were assigned, and what lies there; of more than
        ``max_positives`` a random choice.
        """
        chosen = [
            p[draw(torch.arange(len(p), device=p.boxes.device), self.limit, generator)]
            for p in positives
        ]
        references = _padded(
            [normalise(p.boxes, size) for p, size in zip(chosen, sizes, strict=True)],
            0.5,
        ).clamp(EPSILON, 1 - EPSILON)
        position, content = self.embedding(references)
        content = content + self.feature_norm(
            self.feature(_padded([p.features for p in chosen]))
        )
        assigned = Assigned(
            _padded([p.labels for p in chosen], self.classes),
            _padded(
                [
                    normalise(p.truth, size)
                    for p, size in zip(chosen, sizes, strict=True)
                ]
            ),
            _padded([torch.ones_like(p.labels, dtype=torch.bool) for p in chosen], 0),
            _padded([p.weights for p in chosen]),
        )
        return Group(Queries(content, position + self.head, references), assigned)


def joined(main: Queries, groups: Sequence[Group]) -> tuple[Queries, Tensor | None]:
    """All queries behind one another, and the mask [B, Q, Q] that keeps groups apart.
    None: there is nothing to keep apart.
    """
    parts = [main, *(g.queries for g in groups)]
    if len(parts) == 1:
        return main, None
    queries = Queries(
        torch.cat([p.content for p in parts], 1),
        torch.cat([p.positions for p in parts], 1),
        torch.cat([p.references for p in parts], 1),
    )
    return queries, group_mask(
        torch.ones_like(main.content[..., 0], dtype=torch.bool),
        [part for g in groups for part in g.assigned.counts.chunk(g.parts, 1)],
    )


def group_mask(main: Tensor, groups: Sequence[Tensor]) -> Tensor:
    """[B, Q, Q] bool: a query sees the real queries of its own group, and itself, so
    that no row is empty. Inputs [B, M]: which are real.
    """
    real = torch.cat([main, *groups], 1)
    sizes = torch.tensor(
        [main.shape[1], *(g.shape[1] for g in groups)], device=real.device
    )
    group = torch.repeat_interleave(torch.arange(len(sizes), device=real.device), sizes)
    same = group[:, None] == group
    return (same & real[:, None]) | torch.eye(
        len(group), dtype=torch.bool, device=real.device
    )


def _padded(rows: Sequence[Tensor], value: float = 0.0) -> Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_value=value)
