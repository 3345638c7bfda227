"""Deformable encoder: every cell of every level attends to places around it on all
levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coin_ray.config.co_detr import CoDetr
from coin_ray.models.co_detr.attention import DeformableAttention, FeedForward, Shapes
from coin_ray.models.co_detr.positions import map_positions

FIRST_STRIDE = 8


@dataclass(frozen=True, slots=True, eq=False)
class Memory:
    """Levels behind one another: ``tokens`` [B, S, d], ``shapes`` (height, width) of
    each level, ``padding`` [B, S] bool, ``valid`` [B, L, 2]: share of each level's
    width and height that is image.
    """

    tokens: Tensor
    shapes: tuple[tuple[int, int], ...]
    padding: Tensor
    valid: Tensor

    def maps(self) -> list[Tensor]:
        """[B, d, H, W] of each level."""
        parts = self.tokens.split([h * w for h, w in self.shapes], 1)
        return [
            part.transpose(1, 2).unflatten(2, shape)
            for part, shape in zip(parts, self.shapes, strict=True)
        ]


class EncoderLayer(nn.Module):
    def __init__(self, config: CoDetr) -> None:
        super().__init__()
        self.attention = DeformableAttention(
            config.width, config.heads, config.levels, config.points
        )
        self.attention_norm = nn.LayerNorm(config.width)
        self.feedforward = FeedForward(config.width, config.feedforward)
        self.feedforward_norm = nn.LayerNorm(config.width)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        references: Tensor,
        shapes: Shapes,
        padding: Tensor,
    ) -> Tensor:
        tokens = self.attention_norm(
            tokens
            + self.attention(tokens + positions, references, tokens, shapes, padding)
        )
        encoded: Tensor = self.feedforward_norm(tokens + self.feedforward(tokens))
        return encoded


class Encoder(nn.Module):
    def __init__(self, config: CoDetr) -> None:
        super().__init__()
        self.checkpoint_layers = config.checkpoint_layers
        self.level_embeddings = nn.Parameter(torch.randn(config.levels, config.width))
        self.layers = nn.ModuleList(
            [EncoderLayer(config) for _ in range(config.encoder_layers)]
        )

    def forward(
        self, maps: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> Memory:
        """Encode ``maps`` [B, d, H, W], strides 8, 16, ...; ``sizes``: (height, width)
        in pixels of each image inside the padding.
        """
        shapes = tuple((int(m.shape[2]), int(m.shape[3])) for m in maps)
        paddings = padding_masks(shapes, sizes, maps[0].device)
        width = maps[0].shape[1]
        placed = [
            map_positions(p, width) + e
            for p, e in zip(paddings, self.level_embeddings, strict=True)
        ]
        positions = torch.cat([p.flatten(1, 2) for p in placed], 1)
        tokens = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)
        padding, valid = (
            torch.cat([p.flatten(1) for p in paddings], 1),
            valid_shares(shapes, sizes, maps[0].device),
        )
        references = cell_centres(shapes, valid)
        per_level = references[:, :, None] * valid[:, None]
        for layer in self.layers:
            if self.checkpoint_layers and torch.is_grad_enabled():
                tokens = checkpoint(
                    layer,
                    tokens,
                    positions,
                    per_level,
                    shapes,
                    padding,
                    use_reentrant=False,
                )
            else:
                tokens = layer(tokens, positions, per_level, shapes, padding)
        return Memory(tokens, shapes, padding, valid)


def strides(levels: int) -> list[int]:
    """Pixels per cell of each level."""
    return [FIRST_STRIDE * 2**level for level in range(levels)]


def padding_masks(
    shapes: Shapes, sizes: Sequence[tuple[int, int]], device: torch.device
) -> list[Tensor]:
    """[B, H, W] bool per level: cells that start outside their image."""
    limits = torch.tensor(sizes, device=device).view(-1, 2, 1, 1)
    masks = []
    for (height, width), stride in zip(shapes, strides(len(shapes)), strict=True):
        rows = torch.arange(height, device=device)[:, None] * stride >= limits[:, 0]
        columns = torch.arange(width, device=device) * stride >= limits[:, 1]
        masks.append(rows | columns)
    return masks


def valid_shares(
    shapes: Shapes, sizes: Sequence[tuple[int, int]], device: torch.device
) -> Tensor:
    """[B, L, 2]: share of the width and of the height of each level that is image, in
    pixels rather than whole cells.

    So a place in the image is the same place on every level. Published: whole cells,
    which differ where images are small.
    """
    held = [
        (width * stride, height * stride)
        for (height, width), stride in zip(shapes, strides(len(shapes)), strict=True)
    ]
    own = torch.tensor(
        [(width, height) for height, width in sizes], dtype=torch.float32, device=device
    )
    return own[:, None] / own.new_tensor(held)


def cell_centres(shapes: Shapes, valid: Tensor) -> Tensor:
    """[B, S, 2]: x, y of every cell's centre, 0..1 over the image (beyond 1 in the
    padding).
    """
    centres = []
    for level, (height, width) in enumerate(shapes):
        y = (torch.arange(height, device=valid.device) + 0.5) / height
        x = (torch.arange(width, device=valid.device) + 0.5) / width
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)
        centres.append(grid[None] / valid[:, level, None])
    return torch.cat(centres, 1)
