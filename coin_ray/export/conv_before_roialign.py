"""The 1x1 convolution after RoIAlign, computed before it: both are linear, so their
order does not matter.

A map has fewer cells than the bins of all regions together. The shortcut of the same
block averages bins two by two, which is RoIAlign with half as many bins a side and
twice the samples in each.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from coin_ray.config import Detector
from coin_ray.export.networks import Describe, Propose
from coin_ray.models.faster_rcnn_clip.model import STRIDE
from coin_ray.models.faster_rcnn_clip.tower import ClipTower, Tower

HALVED = 2
"""Stride of the first block after RoIAlign."""


def can_move_conv(tower: Tower, config: Detector) -> bool:
    """Return whether the order can be changed with the same result (norms folded, a
    fixed number of samples in each bin, an even number of bins) and saves work.
    """
    same_result = (
        isinstance(tower, ClipTower)
        and config.batch_norm == "frozen"
        and config.roi_samples > 0
        and config.roi_size % HALVED == 0
    )
    bins = config.proposals_test * config.roi_size**2
    cells = config.short_side * config.long_side // STRIDE**2
    return same_result and bins >= cells


class ProposeWithConv(nn.Module):
    """``Propose`` that also returns, before the features, the maps that enter the first
    regional block: [B, C', h, w], bias not yet added.
    """

    weight: Tensor

    def __init__(self, propose: Propose, describe: Describe) -> None:
        super().__init__()
        self.propose = propose
        conv = _regional_blocks(describe)[0].conv1
        self.register_buffer("weight", conv.weight.detach().clone())

    def forward(
        self, pixels: Tensor, limits: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        features, objectness, boxes = self.propose(pixels, limits)
        return F.conv2d(features, self.weight), features, objectness, boxes

    def pooled_shapes(self, side: int) -> list[tuple[int, int]]:
        """Return channels and bins a side of both maps, pooled, where the model pools
        into ``side``.
        """
        return [(self.weight.shape[0], side), (self.weight.shape[1], side // HALVED)]


class DescribeAfterConv(nn.Module):
    """entered [R, C', s, s], halved [R, C, s/2, s/2], proposals [R, 4], limits [4] ->
    what ``Describe`` returns for the pooled features.
    """

    bias: Tensor

    def __init__(self, describe: Describe) -> None:
        super().__init__()
        blocks = _regional_blocks(describe)
        block = blocks[0]
        self.describe = describe
        self.convolution, self.pool, self.project = (
            block.conv2,
            block.avgpool,
            block.conv3,
        )
        self.shortcut, self.later = block.downsample[1], blocks[1:]
        bias = block.conv1.bias.detach().clone().view(1, -1, 1, 1)
        self.register_buffer("bias", bias)

    def forward(
        self, entered: Tensor, halved: Tensor, proposals: Tensor, limits: Tensor
    ) -> tuple[Tensor, Tensor]:
        hidden = self.convolution((entered + self.bias).relu()).relu()
        maps = (self.project(self.pool(hidden)) + self.shortcut(halved)).relu()
        region_features = self.later(maps).mean((2, 3))
        return self.describe.classify(region_features, proposals, limits)


def _regional_blocks(describe: Describe) -> Any:
    """Return CLIP's stage 4: open_clip's blocks in a row."""
    tower: Any = describe.tower
    return tower.visual.layer4
