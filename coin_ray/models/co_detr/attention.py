"""Attention over a few sampled locations of several maps (Deformable DETR, arXiv
2010.04159, eq. 3), and plain self-attention with a mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Shapes = Sequence[tuple[int, int]]


class DeformableAttention(nn.Module):
    """Each query attends to ``points`` locations per head and level around its
    reference.
    """

    def __init__(self, width: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.offsets = nn.Linear(width, heads * levels * points * 2)
        self.weights = nn.Linear(width, heads * levels * points)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as published: heads start in ``heads`` directions, point p at a
        distance of p + 1 cells, all with the same weight.
        """
        for layer in (self.offsets, self.weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        angles = torch.arange(self.heads) * (2 * math.pi / self.heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        distances = torch.arange(1, self.points + 1)[:, None]
        bias = (directions[:, None, None] * distances).expand(
            self.heads, self.levels, self.points, 2
        )
        self.offsets.bias.copy_(bias.reshape(-1))
        for layer in (self.value, self.output):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        queries: Tensor,
        references: Tensor,
        tokens: Tensor,
        shapes: Shapes,
        padding: Tensor,
    ) -> Tensor:
        """Return [B, Q, d] for ``queries`` [B, Q, d].

        ``references`` [B, Q, L, 2] are points in 0..1 of each map, [B, Q, L, 4] boxes
        (cxcywh), whose half sides then scale the offsets. ``tokens`` [B, S, d]:
        concatenated maps of ``shapes`` (height, width); those in ``padding`` [B, S]
        count as zeros.
        """
        batch, count, _ = queries.shape
        offsets = self.offsets(queries).view(
            batch, count, self.heads, self.levels, self.points, 2
        )
        head_logits = self.weights(queries).view(batch, count, self.heads, -1)
        weights = head_logits.softmax(-1).unflatten(-1, (self.levels, self.points))
        features = self.value(tokens).masked_fill(padding[..., None], 0.0)
        locations = sampling_locations(references, offsets, shapes)
        attended: Tensor = self.output(
            sample_maps(features, shapes, locations, weights)
        )
        return attended


def sampling_locations(references: Tensor, offsets: Tensor, shapes: Shapes) -> Tensor:
    """Return locations [B, Q, heads, L, points, 2], x and y in 0..1 of each map:
    ``offsets`` are cells around points, or half sides around boxes.
    """
    centres = references[:, :, None, :, None, :2]
    if references.shape[-1] == 2:
        map_sizes = offsets.new_tensor([(width, height) for height, width in shapes])
        return centres + offsets / map_sizes[:, None]
    sides = references[:, :, None, :, None, 2:]
    points = offsets.shape[-2]
    return centres + offsets / points * sides * 0.5


def sample_maps(
    features: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor
) -> Tensor:
    """Return weighted sums [B, Q, d] of bilinear samples of ``features`` [B, S, d] at
    ``locations`` with ``weights`` [B, Q, heads, L, points]; zero outside.

    It is done in the precision of ``locations``: half precision would miss the cells.
    """
    batch, count, heads = locations.shape[:3]
    per_head = features.to(locations.dtype).unflatten(-1, (heads, -1))
    per_head = per_head.permute(0, 2, 3, 1).flatten(0, 1)
    maps = per_head.split([height * width for height, width in shapes], -1)
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)
    head_weights = weights.to(locations.dtype).transpose(1, 2).flatten(0, 1)
    total = locations.new_zeros(())
    for level, shape in enumerate(shapes):
        samples = F.grid_sample(
            maps[level].unflatten(-1, shape).contiguous(),
            grids[:, :, level].contiguous(),
            align_corners=False,
        )
        level_weights = head_weights[:, :, level]
        total = total + torch.einsum("bdqp,bqp->bdq", samples, level_weights)
    return total.reshape(batch, -1, count).transpose(1, 2)


class SelfAttention(nn.Module):
    """Multi-head attention among queries; positions enter queries and keys, but not
    values.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        for layer in (self.query, self.key, self.value, self.output):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, content: Tensor, positions: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Return [B, Q, d]. ``mask`` [B, Q, Q] bool: row may attend to column; every
        row needs one True.
        """
        with_positions = content + positions
        attended = F.scaled_dot_product_attention(
            self._split_heads(self.query(with_positions)),
            self._split_heads(self.key(with_positions)),
            self._split_heads(self.value(content)),
            attn_mask=None if mask is None else mask[:, None],
        )
        projected: Tensor = self.output(attended.transpose(1, 2).flatten(2))
        return projected

    def _split_heads(self, features: Tensor) -> Tensor:
        """Reshape [B, Q, d] to [B, heads, Q, d / heads]."""
        per_head: Tensor = features.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return per_head


class FeedForward(nn.Sequential):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
        for layer in self:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
