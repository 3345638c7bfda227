"""First stage: encoder tokens propose boxes, the best ones become the decoder's
queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coin_ray.config.co_detr import CoDetr
from coin_ray.models.co_detr.attention import Shapes
from coin_ray.models.co_detr.decoder import Queries, box_branch, linear_classifier
from coin_ray.models.co_detr.encoder import Memory, cell_centres
from coin_ray.models.co_detr.positions import box_positions, logit

SMALLEST = 0.05
"""Side of a proposal on the first level, as a share of the image; it doubles with each
level."""


@dataclass(frozen=True, slots=True, eq=False)
class Proposals:
    """Of every token: ``objectness`` [B, S, 1] logits, ``boxes`` [B, S, 4] (cxcywh in
    0..1), ``usable`` [B, S] bool; and the queries made of them.
    """

    objectness: Tensor
    boxes: Tensor
    usable: Tensor
    queries: Queries


class BoxEmbedding(nn.Module):
    """Boxes [..., 4] -> two vectors [..., d]: a position and a content."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.project, self.norm = (
            nn.Linear(2 * width, 2 * width),
            nn.LayerNorm(2 * width),
        )
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        position, content = self.norm(
            self.project(box_positions(boxes, self.width))
        ).chunk(2, -1)
        return position, content


class TwoStage(nn.Module):
    """Proposals are ranked by objectness alone, whatever the classes are."""

    def __init__(self, config: CoDetr) -> None:
        super().__init__()
        self.queries, self.mixed_selection = config.queries, config.mixed_selection
        self.project, self.norm = (
            nn.Linear(config.width, config.width),
            nn.LayerNorm(config.width),
        )
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)
        self.classify = linear_classifier(config.width, 1)
        self.regress = box_branch(config.width)
        self.embedding = BoxEmbedding(config.width)
        self.content = (
            nn.Parameter(torch.randn(config.queries, config.width))
            if config.mixed_selection
            else None
        )

    def forward(self, memory: Memory) -> Proposals:
        """The best ``queries`` usable tokens (all, if there are fewer) become queries;
        their boxes carry no gradient.
        """
        priors, usable = prior_boxes(memory.shapes, memory.valid, memory.padding)
        tokens = self.norm(
            self.project(memory.tokens.masked_fill(~usable[..., None], 0.0))
        )
        objectness = self.classify(tokens).float()
        boxes = (self.regress(tokens).float() + logit(priors)).sigmoid()
        scores = objectness[..., 0].detach().masked_fill(~usable, -torch.inf)
        chosen = scores.topk(min(self.queries, scores.shape[1]), 1).indices
        references = boxes.detach().gather(1, chosen[..., None].expand(-1, -1, 4))
        return Proposals(objectness, boxes, usable, self.start(references))

    def start(self, references: Tensor) -> Queries:
        """Queries at ``references`` [B, Q, 4]."""
        position, content = self.embedding(references)
        if self.content is not None:
            content = self.content[: references.shape[1]].expand(
                len(references), -1, -1
            )
        return Queries(content, position, references)


def prior_boxes(
    shapes: Shapes, valid: Tensor, padding: Tensor
) -> tuple[Tensor, Tensor]:
    """Boxes [B, S, 4] (cxcywh in 0..1) that proposals start from, and which of them [B,
    S] are not padding or at the very border.
    """
    sides = [
        torch.full((height * width, 2), SMALLEST * 2**level)
        for level, (height, width) in enumerate(shapes)
    ]
    side = torch.cat(sides).to(valid)[None].expand(len(valid), -1, -1)
    boxes = torch.cat([cell_centres(shapes, valid), side], -1)
    return boxes, ((boxes > 0.01) & (boxes < 0.99)).all(-1) & ~padding
