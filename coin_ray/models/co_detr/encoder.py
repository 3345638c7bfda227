"""Deformable encoder: every cell of every level attends to locations around it on all
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
    """The encoder's outputs, levels concatenated: ``tokens`` [B, S, d], ``shapes``
    (height, width) of each level, ``padding`` [B, S] bool, ``valid_ratios`` [B, L, 2]:
    share of each level's width and height that is image.
    """

    tokens: Tensor
    shapes: tuple[tuple[int, int], ...]
    padding: Tensor
    valid_ratios: Tensor

    def maps(self) -> list[Tensor]:
        """Split the tokens into the maps [B, d, H, W] of the levels."""
        parts = self.tokens.split([height * width for height, width in self.shapes], 1)
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
        queries = tokens + positions
        attended = self.attention(queries, references, tokens, shapes, padding)
        tokens = self.attention_norm(tokens + attended)
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
        device = maps[0].device
        shapes = tuple((int(m.shape[2]), int(m.shape[3])) for m in maps)
        masks = padding_masks(shapes, sizes, device)
        padding = torch.cat([mask.flatten(1) for mask in masks], 1)
        ratios = valid_ratios(shapes, sizes, device)
        positions = self._positions(masks)
        tokens = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)
        level_references = cell_centres(shapes, ratios)[:, :, None] * ratios[:, None]
        for layer in self.layers:
            inputs = (tokens, positions, level_references, shapes, padding)
            if self.checkpoint_layers and torch.is_grad_enabled():
                tokens = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                tokens = layer(*inputs)
        return Memory(tokens, shapes, padding, ratios)

    def _positions(self, masks: Sequence[Tensor]) -> Tensor:
        """Return the encodings [B, S, d] of the cells and of their levels."""
        width = self.level_embeddings.shape[1]
        encodings = [
            map_positions(mask, width) + embedding
            for mask, embedding in zip(masks, self.level_embeddings, strict=True)
        ]
        return torch.cat([encoding.flatten(1, 2) for encoding in encodings], 1)


def level_strides(levels: int) -> list[int]:
    """Return the pixels per cell of each level."""
    return [FIRST_STRIDE * 2**level for level in range(levels)]


def padding_masks(
    shapes: Shapes, sizes: Sequence[tuple[int, int]], device: torch.device
) -> list[Tensor]:
    """Return [B, H, W] bool per level: cells that start outside their image."""
    limits = torch.tensor(sizes, device=device).view(-1, 2, 1, 1)
    masks = []
    for (height, width), stride in zip(shapes, level_strides(len(shapes)), strict=True):
        rows = torch.arange(height, device=device)[:, None] * stride >= limits[:, 0]
        columns = torch.arange(width, device=device) * stride >= limits[:, 1]
        masks.append(rows | columns)
    return masks


def valid_ratios(
    shapes: Shapes, sizes: Sequence[tuple[int, int]], device: torch.device
) -> Tensor:
    """Return [B, L, 2]: share of the width and of the height of each level that is
    image, in pixels rather than whole cells.

    So a point of the image is the same point on every level. Published: whole cells,
    which differ where images are small.
    """
    map_sizes = [
        (width * stride, height * stride)
        for (height, width), stride in zip(
            shapes, level_strides(len(shapes)), strict=True
        )
    ]
    image_sizes = torch.tensor(
        [(width, height) for height, width in sizes], dtype=torch.float32, device=device
    )
    return image_sizes[:, None] / image_sizes.new_tensor(map_sizes)


def cell_centres(shapes: Shapes, ratios: Tensor) -> Tensor:
    """Return [B, S, 2]: x, y of every cell's centre, 0..1 over the image (beyond 1 in
    the padding), for the ``valid_ratios`` of the batch.
    """
    centres = []
    for level, (height, width) in enumerate(shapes):
        y = (torch.arange(height, device=ratios.device) + 0.5) / height
        x = (torch.arange(width, device=ratios.device) + 0.5) / width
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)
        centres.append(grid[None] / ratios[:, level, None])
    return torch.cat(centres, 1)
