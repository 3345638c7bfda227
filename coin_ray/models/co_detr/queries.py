"""Customised positive queries (arXiv 2211.12860, eq. 4): an auxiliary head's positives
as decoder queries whose targets are known without matching.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from coin_ray.config.co_detr import CoDetr
from coin_ray.models.co_detr.auxiliary import Positives, sample_rows
from coin_ray.models.co_detr.criterion import QueryTargets
from coin_ray.models.co_detr.decoder import Queries
from coin_ray.models.co_detr.positions import EPSILON
from coin_ray.models.co_detr.targets import Size, normalise
from coin_ray.models.co_detr.two_stage import BoxEmbedding


@dataclass(frozen=True, slots=True, eq=False)
class QueryGroup:
    """Queries with known targets, padded to the image with the most;
    ``targets.has_loss`` [B, M]: which are real.

    They consist of ``parts`` of equal length that do not attend to each other.
    """

    queries: Queries
    targets: QueryTargets
    parts: int = 1


class PositiveQueries(nn.Module):
    def __init__(self, config: CoDetr, classes: int) -> None:
        super().__init__()
        self.limit, self.classes = config.max_positives, classes
        self.embedding = BoxEmbedding(config.width)
        self.feature = nn.Linear(config.width, config.width)
        self.feature_norm = nn.LayerNorm(config.width)
        self.head = nn.Parameter(torch.randn(config.width) * 0.02)

    def forward(
        self,
        positives: Sequence[Positives],
        sizes: Sequence[Size],
        generator: torch.Generator | None = None,
    ) -> QueryGroup:
        """Make queries of the assigned boxes and the features there; of more than
        ``max_positives`` of an image a random sample.
        """
        samples = [self._sample(p, generator) for p in positives]
        boxes = [normalise(p.boxes, s) for p, s in zip(samples, sizes, strict=True)]
        truth = [normalise(p.truth, s) for p, s in zip(samples, sizes, strict=True)]
        references = _pad(boxes, 0.5).clamp(EPSILON, 1 - EPSILON)
        position, content = self.embedding(references)
        features = self.feature(_pad([p.features for p in samples]))
        content = content + self.feature_norm(features)
        is_real = [torch.ones_like(p.labels, dtype=torch.bool) for p in samples]
        targets = QueryTargets(
            _pad([p.labels for p in samples], self.classes),
            _pad(truth),
            _pad(is_real, 0),
            _pad([p.weights for p in samples]),
        )
        return QueryGroup(Queries(content, position + self.head, references), targets)

    def _sample(
        self, positives: Positives, generator: torch.Generator | None
    ) -> Positives:
        rows = torch.arange(len(positives), device=positives.boxes.device)
        return positives[sample_rows(rows, self.limit, generator)]


def concatenate_queries(
    main: Queries, groups: Sequence[QueryGroup]
) -> tuple[Queries, Tensor | None]:
    """Concatenate all queries, and return the mask [B, Q, Q] that keeps groups from
    attending to each other (None if there is only ``main``).
    """
    queries = [main, *(group.queries for group in groups)]
    if len(queries) == 1:
        return main, None
    concatenated = Queries(
        torch.cat([q.content for q in queries], 1),
        torch.cat([q.positions for q in queries], 1),
        torch.cat([q.references for q in queries], 1),
    )
    main_is_real = torch.ones_like(main.content[..., 0], dtype=torch.bool)
    parts: list[Tensor] = []
    for group in groups:
        parts += group.targets.has_loss.chunk(group.parts, 1)
    return concatenated, group_mask(main_is_real, parts)


def group_mask(main: Tensor, groups: Sequence[Tensor]) -> Tensor:
    """Return [B, Q, Q] bool: a query attends to the real queries of its own group, and
    to itself, so that no row is empty. Inputs [B, M]: which are real.
    """
    is_real = torch.cat([main, *groups], 1)
    lengths = [main.shape[1], *(group.shape[1] for group in groups)]
    sizes = torch.tensor(lengths, device=is_real.device)
    numbers = torch.arange(len(sizes), device=is_real.device)
    group_of_query = torch.repeat_interleave(numbers, sizes)
    same_group = group_of_query[:, None] == group_of_query
    itself = torch.eye(len(group_of_query), dtype=torch.bool, device=is_real.device)
    return (same_group & is_real[:, None]) | itself


def _pad(rows: Sequence[Tensor], padding: float = 0.0) -> Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_value=padding)
