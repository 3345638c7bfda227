"""Attention over a few sampled places of several maps (Deformable DETR, arXiv
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
    """Each query looks at ``points`` places per head and level around its reference."""

    def __init__(self, width: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.offsets = nn.Linear(width, heads * levels * points * 2)
        self.weights = nn.Linear(width, heads * levels * points)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """As published: heads look in ``heads`` directions, point p at p + 1 cells, all
        with the same weight.
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
        """[B, Q, d] for ``queries`` [B, Q, d].

        ``references`` [B, Q, L, 2] are points in 0..1 of each map, [B, Q, L, 4] boxes
        (cxcywh), whose half sides then scale the offsets. ``tokens`` [B, S, d]: maps of
        ``shapes`` (height, width) behind one another; those in ``padding`` [B, S] count
        as zeros.
        """
        batch, count, _ = queries.shape
        offsets = self.offsets(queries).view(
            batch, count, self.heads, self.levels, self.points, 2
        )
        weights = (
            self.weights(queries)
            .view(batch, count, self.heads, -1)
            .softmax(-1)
            .unflatten(-1, (self.levels, self.points))
        )
        values = self.value(tokens).masked_fill(padding[..., None], 0.0)
        places = sampling_places(references, offsets, shapes)
        attended: Tensor = self.output(sample(values, shapes, places, weights))
        return attended


def sampling_places(references: Tensor, offsets: Tensor, shapes: Shapes) -> Tensor:
    """Places [B, Q, heads, L, points, 2], x and y in 0..1 of each map: ``offsets`` are
    cells around points, or half sides around boxes.
    """
    centres = references[:, :, None, :, None, :2]
    if references.shape[-1] == 2:
        return (
            centres + offsets / offsets.new_tensor([(w, h) for h, w in shapes])[:, None]
        )
    return (
        centres
        + offsets / offsets.shape[-2] * references[:, :, None, :, None, 2:] * 0.5
    )


def sample(values: Tensor, shapes: Shapes, places: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum [B, Q, d] of bilinear samples of ``values`` [B, S, d] at ``places``
    with ``weights`` [B, Q, heads, L, points]; zero outside.

    It is done in the precision of ``places``: half precision would miss the cells.
    """
    batch, count, heads = places.shape[:3]
    maps = (
        values.to(places.dtype)
        .unflatten(-1, (heads, -1))
        .permute(0, 2, 3, 1)
        .flatten(0, 1)
        .split([h * w for h, w in shapes], -1)
    )
    grids = (2 * places - 1).transpose(1, 2).flatten(0, 1)
    shares = weights.to(places.dtype).transpose(1, 2).flatten(0, 1)
    total = places.new_zeros(())
    for level, shape in enumerate(shapes):
        found = F.grid_sample(
            maps[level].unflatten(-1, shape).contiguous(),
            grids[:, :, level].contiguous(),
            align_corners=False,
        )
        total = total + torch.einsum("bdqp,bqp->bdq", found, shares[:, :, level])
    return total.reshape(batch, -1, count).transpose(1, 2)


class SelfAttention(nn.Module):
    """Multi-head attention among queries; positions count for who attends to whom, not
    for what is passed on.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (
            nn.Linear(width, width) for _ in range(4)
        )
        for layer in (self.query, self.key, self.value, self.output):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, content: Tensor, positions: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """[B, Q, d]. ``mask`` [B, Q, Q] bool: row may attend to column; every row needs
        one True.
        """
        placed = content + positions
        inputs = ((self.query, placed), (self.key, placed), (self.value, content))
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in inputs
        )
        allowed = None if mask is None else mask[:, None]
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
        attended: Tensor = self.output(found.transpose(1, 2).flatten(2))
        return attended


class FeedForward(nn.Sequential):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
        for layer in self:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
