"""Visual towers: modules with ``channels`` that give one map for each of the strides 8,
16, 32.
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
        self.stages = nn.ModuleList(
            [
                nn.Sequential(_block(3, 16), _block(16, 32), _block(32, first)),
                _block(first, second),
                _block(second, third),
            ]
        )

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """[B, 3, H, W] -> [B, C, H/8, W/8], [B, C', H/16, W/16], [B, C'', H/32, W/32]."""
        maps = [pixels]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps[1:]


def _block(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, 2, 1, bias=False), nn.GroupNorm(8, out), nn.ReLU()
    )
