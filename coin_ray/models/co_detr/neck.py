"""The neck: projects backbone maps to the encoder's levels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


def group_norm(width: int) -> nn.GroupNorm:
    """Make a norm of 32 groups, or fewer where each would hold less than two channels."""
    groups = min(32, width // 2)
    return nn.GroupNorm(groups if width % groups == 0 else 1, width)


class Neck(nn.Module):
    """Input projection: a 1x1 convolution with group norm per backbone map, and strided
    3x3 ones for levels beyond.
    """

    def __init__(self, channels: Sequence[int], width: int, levels: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList([_projection(c, width, 1) for c in channels])
        extra_levels = levels - len(channels)
        extra_inputs = [channels[-1], *[width] * levels][:extra_levels]
        self.extra = nn.ModuleList([_projection(c, width, 3) for c in extra_inputs])

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Project maps [B, C, H, W] of the backbone to ``levels`` maps [B, width, H,
        W], each half as large as the one before.
        """
        projected = [project(m) for project, m in zip(self.lateral, maps, strict=True)]
        coarsest = maps[-1]
        for project in self.extra:
            coarsest = project(coarsest)
            projected.append(coarsest)
        return projected


def _projection(channels: int, width: int, kernel: int) -> nn.Sequential:
    stride = 1 if kernel == 1 else 2
    conv = nn.Conv2d(channels, width, kernel, stride=stride, padding=kernel // 2)
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return nn.Sequential(conv, group_norm(width))
