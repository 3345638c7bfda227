"""A small backbone. Every backbone is a module with ``channels`` whose forward gives one
map for each of the strides 8, 16, 32.
"""

from __future__ import annotations

from torch import Tensor, nn


class TinyBackbone(nn.Module):
    """Five strided convolutions with group norm, for small images and tests; trained
    from scratch.
    """

    def __init__(self, channels: tuple[int, int, int] = (48, 64, 96)) -> None:
        super().__init__()
        self.channels = channels
        first, second, third = channels
        stride_8 = nn.Sequential(_block(3, 16), _block(16, 32), _block(32, first))
        stride_16, stride_32 = _block(first, second), _block(second, third)
        self.stages = nn.ModuleList([stride_8, stride_16, stride_32])

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Map [B, 3, H, W] to maps [B, C, H/s, W/s] of the strides s = 8, 16, 32."""
        maps = [pixels]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps[1:]


def _block(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, 2, 1, bias=False), nn.GroupNorm(8, out), nn.ReLU()
    )
