"""First stage: encoder tokens propose boxes, the best ones become the decoder's
queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coin_ray.config.co_detr import CoDetr
from coin_ray.models.co_detr.attention import Shapes
from coin_ray.models.co_detr.decoder import (
    Queries,
    new_box_branch,
    new_linear_classifier,
)
from coin_ray.models.co_detr.encoder import Memory, cell_centres
from coin_ray.models.co_detr.positions import box_positions, inverse_sigmoid

FIRST_LEVEL_SIDE = 0.05
"""Side of a proposal on the first level, as a share of the image; it doubles with each
level."""
BORDER = 0.01
"""Priors whose centre or side is within this share of 0 or 1 are not used."""


@dataclass(frozen=True, slots=True, eq=False)
class Proposals:
    """Proposals of all tokens: ``objectness`` [B, S, 1] logits, ``boxes`` [B, S, 4]
    (cxcywh in 0..1), ``usable`` [B, S] bool; and the queries made of the best.
    """

    objectness: Tensor
    boxes: Tensor
    usable: Tensor
    queries: Queries


class BoxEmbedding(nn.Module):
    """Maps boxes [..., 4] to two vectors [..., d]: a position and a content."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.project = nn.Linear(2 * width, 2 * width)
        self.norm = nn.LayerNorm(2 * width)
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        embedding = self.norm(self.project(box_positions(boxes, self.width)))
        position, content = embedding.chunk(2, -1)
        return position, content


class TwoStage(nn.Module):
    """Proposals are ranked by objectness alone, whatever the classes are."""

    def __init__(self, config: CoDetr) -> None:
        super().__init__()
        self.queries, self.mixed_selection = config.queries, config.mixed_selection
        self.project = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width)
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)
        self.classify = new_linear_classifier(config.width, 1)
        self.regress = new_box_branch(config.width)
        self.embedding = BoxEmbedding(config.width)
        self.content = (
            nn.Parameter(torch.randn(config.queries, config.width))
            if config.mixed_selection
            else None
        )

    def forward(self, memory: Memory) -> Proposals:
        """Make the best ``queries`` usable tokens (all, if there are fewer) queries;
        their boxes carry no gradient.
        """
        priors, usable = prior_boxes(memory.shapes, memory.valid_ratios, memory.padding)
        usable_tokens = memory.tokens.masked_fill(~usable[..., None], 0.0)
        tokens = self.norm(self.project(usable_tokens))
        objectness = self.classify(tokens).float()
        boxes = (self.regress(tokens).float() + inverse_sigmoid(priors)).sigmoid()
        scores = objectness[..., 0].detach().masked_fill(~usable, -torch.inf)
        best = scores.topk(min(self.queries, scores.shape[1]), 1).indices
        references = boxes.detach().gather(1, best[..., None].expand(-1, -1, 4))
        return Proposals(objectness, boxes, usable, self.queries_at(references))

    def queries_at(self, references: Tensor) -> Queries:
        """Make queries at ``references`` [B, Q, 4]."""
        batch, count, _ = references.shape
        position, content = self.embedding(references)
        if self.content is not None:
            content = self.content[:count].expand(batch, -1, -1)
        return Queries(content, position, references)


def prior_boxes(
    shapes: Shapes, ratios: Tensor, padding: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the boxes [B, S, 4] (cxcywh in 0..1) that proposals start from, and which
    of them [B, S] are usable: neither padding nor at the very border.
    """
    sides = [
        torch.full((height * width, 2), FIRST_LEVEL_SIDE * 2**level)
        for level, (height, width) in enumerate(shapes)
    ]
    batch_sides = torch.cat(sides).to(ratios)[None].expand(len(ratios), -1, -1)
    boxes = torch.cat([cell_centres(shapes, ratios), batch_sides], -1)
    is_off_border = ((boxes > BORDER) & (boxes < 1 - BORDER)).all(-1)
    return boxes, is_off_border & ~padding
