"""What auxiliary heads look at: the encoder's levels as maps, one more below them, and
the anchors on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coin_ray.models.co_detr.encoder import Memory, padding_masks, strides
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
        """[B, S, d] of all levels, cell by cell."""
        return torch.cat([m.flatten(2).transpose(1, 2) for m in self.levels], 1)


class Pyramid(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = one_below(width)

    def forward(self, memory: Memory, sizes: tuple[Size, ...]) -> Maps:
        levels = memory.maps()
        levels.append(self.down(levels[-1]))
        return Maps(levels, strides(len(levels)), sizes)


def one_below(width: int) -> nn.Sequential:
    """A map of half the size."""
    return nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), group_norm(width))


@dataclass(frozen=True, slots=True, eq=False)
class Anchors:
    """``boxes`` [A, 4] xyxy pixels, the same for every image; ``levels`` [A];
    ``inside`` [B, A] bool: on a cell that is no padding.
    """

    boxes: Tensor
    levels: Tensor
    inside: Tensor


def square(stride: int) -> Tensor:
    """[1, 4]: the anchor of ATSS around the origin, 8 cells wide."""
    return torch.tensor([[-4.0, -4.0, 4.0, 4.0]]) * stride


def nine(stride: int) -> Tensor:
    """[9, 4]: the anchors of the RPN around the origin, 4 cells wide times 1, 2^1/3,
    2^2/3; height / width 0.5, 1, 2.
    """
    sides = 4 * stride * 2 ** (torch.arange(3) / 3)
    ratios = torch.tensor([0.5, 1.0, 2.0]).sqrt()
    half = (
        torch.stack(
            [(sides / ratios[:, None]).flatten(), (sides * ratios[:, None]).flatten()],
            1,
        )
        / 2
    )
    return torch.cat([-half, half], 1)


def lay_out(maps: Maps, around_origin: Sequence[Tensor]) -> Anchors:
    """Anchors [n, 4] of each level, moved to every cell: cell i lies at i * stride, its
    corner. Strides are fixed, whatever the image's size.
    """
    device = maps.levels[0].device
    boxes = [
        _on_cells(own.to(device), shape, stride)
        for own, shape, stride in zip(
            around_origin, maps.shapes, maps.strides, strict=True
        )
    ]
    levels = torch.cat(
        [torch.full((len(b),), level, device=device) for level, b in enumerate(boxes)]
    )
    outside = padding_masks(maps.shapes, maps.sizes, device)
    inside = torch.cat(
        [
            (~p).flatten(1).repeat_interleave(len(own), 1)
            for p, own in zip(outside, around_origin, strict=True)
        ],
        1,
    )
    return Anchors(torch.cat(boxes), levels, inside)


def _on_cells(around_origin: Tensor, shape: Size, stride: int) -> Tensor:
    height, width = shape
    y, x = (
        torch.arange(height, device=around_origin.device) * stride,
        torch.arange(width, device=around_origin.device) * stride,
    )
    corners = (
        torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1).repeat(1, 2)
    )
    return (corners[:, None] + around_origin).flatten(0, 1)


def flattened(levels: Sequence[Tensor], values: int) -> Tensor:
    """Outputs [B, n * values, H, W] of each level -> [B, A, values] float32, in the
    order of ``lay_out``.
    """
    parts = [
        m.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, values)) for m in levels
    ]
    return torch.cat(parts, 1).float()
