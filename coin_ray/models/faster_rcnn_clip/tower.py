"""Visual towers as the two halves of a Faster R-CNN with a C4 backbone (paper section
3.2).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

BatchNorm = Literal["frozen", "live"]


class Tower(nn.Module, ABC):
    """``shared`` (G1, stride 16) feeds the RPN and RoIAlign, ``regional`` (G2, mean
    pooled) describes RoIs.

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
        """[B, 3, H, W] -> [B, shared_channels, H/16, W/16]."""

    @abstractmethod
    def regional(self, pooled: Tensor) -> Tensor:
        """RoIAligned maps [R, shared_channels, s, s] -> [R, regional_channels]."""

    @abstractmethod
    def maps(self, pixels: Tensor) -> list[Tensor]:
        """[B, 3, H, W] -> maps [B, C, h, w] of strides 8, 16, 32 with ``map_channels``:
        the whole tower as a backbone.
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
        tower = copy.deepcopy(visual).requires_grad_(True)
        tower.attnpool = nn.Identity()
        if batch_norm == "frozen":
            freeze_batch_norm(tower)
        # twice as fast on CPU
        self.visual = tower.to(memory_format=torch.channels_last)
        self.frozen_stages = frozen_stages
        learning = tuple(f"layer{i}" for i in range(frozen_stages + 1, 5))
        self.freeze(
            [m for name, m in tower.named_children() if not name.startswith(learning)]
        )
        self.shared_channels = int(tower.layer3[-1].conv3.out_channels)  # type: ignore[union-attr,index,arg-type]
        self.regional_channels = int(tower.layer4[-1].conv3.out_channels)  # type: ignore[union-attr,index,arg-type]
        self.map_channels = (
            self.shared_channels // 2,
            self.shared_channels,
            self.regional_channels,
        )

    def shared(self, pixels: Tensor) -> Tensor:
        visual = self.visual
        stages: list[nn.Module] = [visual.layer1, visual.layer2, visual.layer3]  # type: ignore[list-item]
        with torch.no_grad():
            maps: Tensor = visual.stem(
                pixels.contiguous(memory_format=torch.channels_last)
            )  # type: ignore[operator]
            for stage in stages[: self.frozen_stages]:
                maps = stage(maps)
        for stage in stages[self.frozen_stages :]:
            maps = stage(maps)
        return maps

    def maps(self, pixels: Tensor) -> list[Tensor]:
        with torch.no_grad():
            found: Tensor = self.visual.stem(
                pixels.contiguous(memory_format=torch.channels_last)
            )  # type: ignore[operator]
        levels = []
        for number in range(1, 5):
            with torch.set_grad_enabled(
                torch.is_grad_enabled() and number > self.frozen_stages
            ):
                found = getattr(self.visual, f"layer{number}")(found)
            levels.append(found)
        return levels[1:]

    def regional(self, pooled: Tensor) -> Tensor:
        pooled = pooled.contiguous(memory_format=torch.channels_last)
        embedded: Tensor = self.visual.layer4(pooled)  # type: ignore[operator]
        return embedded.mean((2, 3))


class MobileNetTower(Tower):
    """torchvision's MobileNetV2, copied: the blocks up to stride 16 are shared, the
    rest is regional; those up to stride 4 are frozen.
    """

    FROZEN, EIGHTH, SHARED = 4, 7, 14

    def __init__(self, network: nn.Module, batch_norm: BatchNorm) -> None:
        super().__init__()
        blocks: nn.Sequential = copy.deepcopy(network.features).requires_grad_(True)  # type: ignore[assignment]
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
        with torch.no_grad():
            early = self.features[: self.FROZEN](
                pixels.contiguous(memory_format=torch.channels_last)
            )
        return self.features[self.FROZEN : self.SHARED](early)  # type: ignore[no-any-return]

    def maps(self, pixels: Tensor) -> list[Tensor]:
        with torch.no_grad():
            early = self.features[: self.FROZEN](
                pixels.contiguous(memory_format=torch.channels_last)
            )
        levels = [self.features[self.FROZEN : self.EIGHTH](early)]
        levels.append(self.features[self.EIGHTH : self.SHARED](levels[0]))
        return [*levels, self.features[self.SHARED :](levels[1])]

    def regional(self, pooled: Tensor) -> Tensor:
        pooled = pooled.contiguous(memory_format=torch.channels_last)
        embedded: Tensor = self.features[self.SHARED :](pooled)
        return embedded.mean((2, 3))


class NormalisedConv2d(nn.Module):
    """A convolution and the batch norm with fixed statistics behind it in one: the norm
    scales the weights, not the maps.

    Equal to both behind one another, gradients included; on a CPU it saves a sixth of a
    training step.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.convolution, self.out_channels = convolution, convolution.out_channels
        state: dict[str, Tensor] = dict(norm.named_parameters()) | dict(
            norm.named_buffers()
        )
        scale = state["weight"].detach() * (state["running_var"] + norm.eps).rsqrt()
        self.register_buffer("scale", scale)
        self.register_buffer(
            "shift", state["bias"].detach() - state["running_mean"] * scale
        )

    def forward(self, maps: Tensor) -> Tensor:
        weight = self.convolution.weight * self.scale.view(-1, 1, 1, 1)
        normalised: Tensor = self.convolution._conv_forward(maps, weight, self.shift)
        return normalised


def freeze_batch_norm(module: nn.Module) -> None:
    """Give every batch norm below fixed statistics and affine parameters: each becomes
    part of the convolution before it.
    """
    before, convolution = "", module
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            assert isinstance(convolution, nn.Conv2d), (
                f"batch norm {name} does not follow a convolution"
            )
            assert convolution.bias is None, (
                f"convolution {before} has a bias in front of a batch norm"
            )
            setattr(module, before, NormalisedConv2d(convolution, child))
            setattr(module, name, nn.Identity())
        else:
            freeze_batch_norm(child)
        before, convolution = name, child
