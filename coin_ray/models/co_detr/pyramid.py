"""Inputs of the auxiliary heads: the encoder's levels as maps, a coarser one after them,
and the anchors on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coin_ray.models.co_detr.encoder import Memory, level_strides, padding_masks
from coin_ray.models.co_detr.neck import group_norm
from coin_ray.models.co_detr.targets import Size


@dataclass(frozen=True, slots=True, eq=False)
class Maps:
    """``levels``: [B, d, H, W] per level, nothing detached; ``strides`` in pixels;
    ``sizes`` (height, width) of each image.
    """

    levels: list[Tensor]
    strides: list[int]
    sizes: tuple[Size, ...]

    @property
    def shapes(self) -> list[Size]:
        return [(int(m.shape[2]), int(m.shape[3])) for m in self.levels]

    def tokens(self) -> Tensor:
        """Return the cells [B, S, d] of all levels, concatenated."""
        return torch.cat([m.flatten(2).transpose(1, 2) for m in self.levels], 1)


class Pyramid(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = new_downsampling(width)

    def forward(self, memory: Memory, sizes: tuple[Size, ...]) -> Maps:
        levels = memory.maps()
        levels.append(self.down(levels[-1]))
        return Maps(levels, level_strides(len(levels)), sizes)


def new_downsampling(width: int) -> nn.Sequential:
    """Make layers that map [B, d, H, W] to [B, d, H/2, W/2]."""
    return nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), group_norm(width))


@dataclass(frozen=True, slots=True, eq=False)
class Anchors:
    """``boxes`` [A, 4] xyxy pixels, the same for every image; ``levels`` [A];
    ``inside`` [B, A] bool: on a cell that is no padding.
    """

    boxes: Tensor
    levels: Tensor
    inside: Tensor


def atss_anchor(stride: int) -> Tensor:
    """Return [1, 4]: the square anchor of ATSS around the origin, 8 cells wide."""
    return torch.tensor([[-4.0, -4.0, 4.0, 4.0]]) * stride


def rpn_anchors(stride: int) -> Tensor:
    """Return [9, 4]: the anchors of the RPN around the origin, 4 cells wide times 1,
    2^1/3, 2^2/3; height / width 0.5, 1, 2.
    """
    sides = 4 * stride * 2 ** (torch.arange(3) / 3)
    ratios = torch.tensor([0.5, 1.0, 2.0]).sqrt()
    widths = (sides / ratios[:, None]).flatten()
    heights = (sides * ratios[:, None]).flatten()
    half = torch.stack([widths, heights], 1) / 2
    return torch.cat([-half, half], 1)


def place_anchors(maps: Maps, level_anchors: Sequence[Tensor]) -> Anchors:
    """Move the anchors [n, 4] of each level, given around the origin, to every cell:
    cell i lies at i * stride, its corner. Strides are fixed, whatever the image's size.
    """
    device = maps.levels[0].device
    boxes = [
        _place_on_cells(anchors.to(device), shape, stride)
        for anchors, shape, stride in zip(
            level_anchors, maps.shapes, maps.strides, strict=True
        )
    ]
    levels = [
        torch.full((len(level_boxes),), level, device=device)
        for level, level_boxes in enumerate(boxes)
    ]
    masks = padding_masks(maps.shapes, maps.sizes, device)
    inside = [
        (~mask).flatten(1).repeat_interleave(len(anchors), 1)
        for mask, anchors in zip(masks, level_anchors, strict=True)
    ]
    return Anchors(torch.cat(boxes), torch.cat(levels), torch.cat(inside, 1))


def _place_on_cells(anchors: Tensor, shape: Size, stride: int) -> Tensor:
    height, width = shape
    y = torch.arange(height, device=anchors.device) * stride
    x = torch.arange(width, device=anchors.device) * stride
    cells = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)
    corners = cells.repeat(1, 2)
    return (corners[:, None] + anchors).flatten(0, 1)


def flatten_levels(levels: Sequence[Tensor], channels: int) -> Tensor:
    """Flatten outputs [B, n * channels, H, W] of each level to [B, A, channels]
    float32, in the order of ``place_anchors``.
    """
    rows = []
    for outputs in levels:
        cells = outputs.permute(0, 2, 3, 1).flatten(1)
        rows.append(cells.unflatten(1, (-1, channels)))
    return torch.cat(rows, 1).float()
