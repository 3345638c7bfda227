"""Visual towers as the two halves of a Faster R-CNN with a C4 backbone (paper section
3.2).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

BatchNorm = Literal["frozen", "live"]


class Tower(nn.Module, ABC):
    """``shared`` (G1, stride 16) computes the maps for the RPN and RoIAlign,
    ``regional`` (G2, mean pooled) the features of RoIs.

    The first layers, ``frozen``, are never trained and always in evaluation mode.
    """

    shared_channels: int
    regional_channels: int
    map_channels: tuple[int, int, int]
    frozen: Sequence[nn.Module] = ()

    def freeze(self, layers: Sequence[nn.Module]) -> None:
        self.frozen = layers
        for layer in layers:
            layer.requires_grad_(False)

    def train(self, mode: bool = True) -> Tower:
        super().train(mode)
        for layer in self.frozen:
            layer.eval()
        return self

    @abstractmethod
    def shared(self, pixels: Tensor) -> Tensor:
        """Map pixels [B, 3, H, W] to [B, shared_channels, H/16, W/16]."""

    @abstractmethod
    def regional(self, pooled: Tensor) -> Tensor:
        """Map RoIAligned maps [R, shared_channels, s, s] to [R, regional_channels]."""

    @abstractmethod
    def maps(self, pixels: Tensor) -> list[Tensor]:
        """Use the whole tower as a backbone: map pixels [B, 3, H, W] to maps [B, C, h,
        w] of strides 8, 16, 32 with ``map_channels``.
        """


class ClipTower(Tower):
    """CLIP's ModifiedResNet, copied: stem and stages 1-3 are shared, stage 4 is
    regional; stem and first stages are frozen.

    Attention pooling is left out: the detector has its own embedding layer.
    """

    def __init__(
        self, visual: nn.Module, batch_norm: BatchNorm, frozen_stages: int = 1
    ) -> None:
        super().__init__()
        tower: Any = copy.deepcopy(visual).requires_grad_(True)
        tower.attnpool = nn.Identity()
        if batch_norm == "frozen":
            freeze_batch_norm(tower)
        # twice as fast on CPU
        self.visual: Any = tower.to(memory_format=torch.channels_last)
        self.frozen_stages = frozen_stages
        trained = tuple(f"layer{i}" for i in range(frozen_stages + 1, 5))
        self.freeze(
            [m for name, m in tower.named_children() if not name.startswith(trained)]
        )
        self.shared_channels = int(tower.layer3[-1].conv3.out_channels)
        self.regional_channels = int(tower.layer4[-1].conv3.out_channels)
        self.map_channels = (
            self.shared_channels // 2,
            self.shared_channels,
            self.regional_channels,
        )

    def shared(self, pixels: Tensor) -> Tensor:
        stages = [self.visual.layer1, self.visual.layer2, self.visual.layer3]
        with torch.no_grad():
            maps = self._stem(pixels)
            for stage in stages[: self.frozen_stages]:
                maps = stage(maps)
        for stage in stages[self.frozen_stages :]:
            maps = stage(maps)
        return maps

    def maps(self, pixels: Tensor) -> list[Tensor]:
        with torch.no_grad():
            maps = self._stem(pixels)
        levels = []
        for number in range(1, 5):
            is_trained = number > self.frozen_stages
            with torch.set_grad_enabled(torch.is_grad_enabled() and is_trained):
                maps = getattr(self.visual, f"layer{number}")(maps)
            levels.append(maps)
        return levels[1:]

    def _stem(self, pixels: Tensor) -> Tensor:
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        maps: Tensor = self.visual.stem(pixels)
        return maps

    def regional(self, pooled: Tensor) -> Tensor:
        pooled = pooled.contiguous(memory_format=torch.channels_last)
        features: Tensor = self.visual.layer4(pooled)
        return features.mean((2, 3))


class MobileNetTower(Tower):
    """torchvision's MobileNetV2, copied: the blocks up to stride 16 are shared, the
    rest is regional; those up to stride 4 are frozen.
    """

    FROZEN, EIGHTH, SHARED = 4, 7, 14

    def __init__(self, network: nn.Module, batch_norm: BatchNorm) -> None:
        super().__init__()
        layers: Any = network.features
        blocks: nn.Sequential = copy.deepcopy(layers).requires_grad_(True)
        if batch_norm == "frozen":
            freeze_batch_norm(blocks)
        self.features = blocks.to(memory_format=torch.channels_last)
        self.freeze(list(blocks[: self.FROZEN]))
        self.shared_channels = int(blocks[self.SHARED - 1].out_channels)  # type: ignore[arg-type]
        self.regional_channels = int(blocks[-1].out_channels)  # type: ignore[arg-type]
        self.map_channels = (
            int(blocks[self.EIGHTH - 1].out_channels),  # type: ignore[arg-type]
            self.shared_channels,
            self.regional_channels,
        )

    def shared(self, pixels: Tensor) -> Tensor:
        maps = self._frozen_maps(pixels)
        return self.features[self.FROZEN : self.SHARED](maps)  # type: ignore[no-any-return]

    def maps(self, pixels: Tensor) -> list[Tensor]:
        eighth = self.features[self.FROZEN : self.EIGHTH](self._frozen_maps(pixels))
        sixteenth = self.features[self.EIGHTH : self.SHARED](eighth)
        thirty_second = self.features[self.SHARED :](sixteenth)
        return [eighth, sixteenth, thirty_second]

    @torch.no_grad()
    def _frozen_maps(self, pixels: Tensor) -> Tensor:
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        maps: Tensor = self.features[: self.FROZEN](pixels)
        return maps

    def regional(self, pooled: Tensor) -> Tensor:
        pooled = pooled.contiguous(memory_format=torch.channels_last)
        features: Tensor = self.features[self.SHARED :](pooled)
        return features.mean((2, 3))


class NormalisedConv2d(nn.Module):
    """A convolution fused with the batch norm of fixed statistics after it: the norm
    scales the weights, not the maps.

    Equal to one after the other, gradients included; on a CPU it saves a sixth of a
    training step.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.convolution = convolution
        self.out_channels = convolution.out_channels
        state = norm.state_dict()
        scale = state["weight"] * (state["running_var"] + norm.eps).rsqrt()
        shift = state["bias"] - state["running_mean"] * scale
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, maps: Tensor) -> Tensor:
        weight = self.convolution.weight * self.scale.view(-1, 1, 1, 1)
        normalised: Tensor = self.convolution._conv_forward(maps, weight, self.shift)
        return normalised


def freeze_batch_norm(module: nn.Module) -> None:
    """Fix the statistics and affine parameters of every batch norm in ``module``: each
    becomes part of the convolution before it.
    """
    previous_name, previous = "", module
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            assert isinstance(previous, nn.Conv2d), (
                f"batch norm {name} does not follow a convolution"
            )
            assert previous.bias is None, (
                f"convolution {previous_name} has a bias in front of a batch norm"
            )
            setattr(module, previous_name, NormalisedConv2d(previous, child))
            setattr(module, name, nn.Identity())
        else:
            freeze_batch_norm(child)
        previous_name, previous = name, child
