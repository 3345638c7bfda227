"""CLIP's visual tower as the two halves of a Faster R-CNN with a C4 backbone (paper section 3.2)."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d


class ClipTower(nn.Module):
    """``shared`` (G1: stem and stages 1-3, stride 16) feeds the RPN and RoIAlign; ``regional`` (G2: stage 4, mean pooled) describes RoIs.

    Stem and stage 1 are frozen. Attention pooling is left out: the detector has its own embedding layer.
    """

    def __init__(self, visual: nn.Module, batch_norm: Literal["frozen", "live"]) -> None:
        super().__init__()
        tower = copy.deepcopy(visual).requires_grad_(True)
        tower.attnpool = nn.Identity()
        if batch_norm == "frozen":
            freeze_batch_norm(tower)
        self.visual = tower.to(memory_format=torch.channels_last)  # twice as fast on CPU
        self.frozen = [m for name, m in tower.named_children() if not name.startswith(("layer2", "layer3", "layer4"))]
        for module in self.frozen:
            module.requires_grad_(False)
        self.shared_channels = int(tower.layer3[-1].conv3.out_channels)  # type: ignore[union-attr,index,arg-type]
        self.regional_channels = int(tower.layer4[-1].conv3.out_channels)  # type: ignore[union-attr,index,arg-type]

    def train(self, mode: bool = True) -> ClipTower:
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def shared(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, C3, H/16, W/16]."""
        visual = self.visual
        with torch.no_grad():
            early = visual.layer1(visual.stem(pixels.contiguous(memory_format=torch.channels_last)))  # type: ignore[operator]
        return visual.layer3(visual.layer2(early))  # type: ignore[operator,no-any-return]

    def regional(self, pooled: Tensor) -> Tensor:
        """RoIAligned maps [R, C3, s, s] -> [R, C4]."""
        return self.visual.layer4(pooled.contiguous(memory_format=torch.channels_last)).mean((2, 3))  # type: ignore[operator,no-any-return]


def freeze_batch_norm(module: nn.Module) -> None:
    """Replace every BatchNorm2d below by one with fixed statistics and affine parameters."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, child.eps)
            frozen.load_state_dict({k: v for k, v in child.state_dict().items() if k != "num_batches_tracked"})
            setattr(module, name, frozen)
        else:
            freeze_batch_norm(child)
