"""The network of YOLOX (Ge et al. 2021, arXiv 2107.08430): a CSPDarknet, a PAFPN and a
decoupled head without anchors.

Its weights have the names and shapes of the official release (Apache-2.0), so its files
load unchanged; layers run in the order of the official export, which ONNX files are
read by.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

STRIDES = (8, 16, 32)
PRIOR = 0.01
"""Initial probability of an object, and of each class."""
NORM_EPSILON, NORM_MOMENTUM = 1e-3, 0.03
POOLING_SIDES = (5, 9, 13)


@dataclass(frozen=True)
class YoloxSize:
    """Depth and width relative to YOLOX-L, whether 3 x 3 convolutions are depthwise, and
    the side of the square that images are made to fit.
    """

    depth: float
    width: float
    depthwise: bool
    side: int


YOLOX_SIZES = {
    "yolox-nano": YoloxSize(0.33, 0.25, True, 416),
    "yolox-tiny": YoloxSize(0.33, 0.375, False, 416),
    "yolox-s": YoloxSize(0.33, 0.5, False, 640),
    "yolox-m": YoloxSize(0.67, 0.75, False, 640),
    "yolox-l": YoloxSize(1.0, 1.0, False, 640),
    "yolox-x": YoloxSize(1.33, 1.25, False, 640),
}
"""The released models by name."""


class ConvNorm(nn.Module):
    """Convolution, batch norm, SiLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        padding = kernel // 2
        self.conv = nn.Conv2d(
            inputs, outputs, kernel, stride, padding, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(outputs, NORM_EPSILON, NORM_MOMENTUM)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        activated: Tensor = self.act(self.bn(self.conv(x)))
        return activated


class SeparableConv(nn.Module):
    """Depthwise, then pointwise convolution."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.dconv = ConvNorm(inputs, inputs, kernel, stride, groups=inputs)
        self.pconv = ConvNorm(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.pconv(self.dconv(x))
        return mixed


def conv3x3(inputs: int, outputs: int, depthwise: bool, stride: int = 1) -> nn.Module:
    kind = SeparableConv if depthwise else ConvNorm
    return kind(inputs, outputs, 3, stride)


class Bottleneck(nn.Module):
    def __init__(self, channels: int, shortcut: bool, depthwise: bool) -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels, channels, 1)
        self.conv2 = conv3x3(channels, channels, depthwise)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.conv2(self.conv1(x))
        return changed + x if self.shortcut else changed


class CspLayer(nn.Module):
    """Half of the channels pass through bottlenecks, the other half around them."""

    def __init__(
        self, inputs: int, outputs: int, count: int, shortcut: bool, depthwise: bool
    ) -> None:
        super().__init__()
        half = outputs // 2
        self.conv1 = ConvNorm(inputs, half, 1)
        self.conv2 = ConvNorm(inputs, half, 1)
        self.conv3 = ConvNorm(2 * half, outputs, 1)
        bottlenecks = [Bottleneck(half, shortcut, depthwise) for _ in range(count)]
        self.m = nn.Sequential(*bottlenecks)

    def forward(self, x: Tensor) -> Tensor:
        first = self.conv1(x)
        second = self.conv2(x)
        joined: Tensor = self.conv3(torch.cat([self.m(first), second], 1))
        return joined


class PoolingPyramid(nn.Module):
    """Maximum over windows of several sizes, concatenated with the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = ConvNorm(channels, half, 1)
        self.m = nn.ModuleList(
            nn.MaxPool2d(side, 1, side // 2) for side in POOLING_SIDES
        )
        self.conv2 = ConvNorm(half * (1 + len(POOLING_SIDES)), channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        pooled = [pool(x) for pool in self.m]
        mixed: Tensor = self.conv2(torch.cat([x, *pooled], 1))
        return mixed


class Focus(nn.Module):
    """The four pixels of each 2 x 2 square as channels, then a convolution."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.conv = ConvNorm(12, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        even_rows, odd_rows = x[..., ::2, :], x[..., 1::2, :]
        left = [even_rows[..., ::2], odd_rows[..., ::2]]
        right = [even_rows[..., 1::2], odd_rows[..., 1::2]]
        features: Tensor = self.conv(torch.cat([*left, *right], 1))
        return features


class CspDarknet(nn.Module):
    """pixels [B, 3, H, W] -> maps of stride 8, 16 and 32."""

    def __init__(self, size: YoloxSize) -> None:
        super().__init__()
        base, depthwise = int(size.width * 64), size.depthwise
        count = max(round(size.depth * 3), 1)
        self.stem = Focus(base)
        self.dark2 = self._stage(base, count, depthwise)
        self.dark3 = self._stage(base * 2, count * 3, depthwise)
        self.dark4 = self._stage(base * 4, count * 3, depthwise)
        top = base * 16
        self.dark5 = nn.Sequential(
            conv3x3(base * 8, top, depthwise, stride=2),
            PoolingPyramid(top),
            CspLayer(top, top, count, False, depthwise),
        )

    @staticmethod
    def _stage(inputs: int, count: int, depthwise: bool) -> nn.Sequential:
        outputs = inputs * 2
        return nn.Sequential(
            conv3x3(inputs, outputs, depthwise, stride=2),
            CspLayer(outputs, outputs, count, True, depthwise),
        )

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        stride8 = self.dark3(self.dark2(self.stem(pixels)))
        stride16 = self.dark4(stride8)
        return stride8, stride16, self.dark5(stride16)


class Pafpn(nn.Module):
    """The backbone with a feature pyramid, first from coarse to fine, then back."""

    def __init__(self, size: YoloxSize) -> None:
        super().__init__()
        fine, middle, coarse = (int(c * size.width) for c in (256, 512, 1024))
        depthwise, count = size.depthwise, round(3 * size.depth)
        self.backbone = CspDarknet(size)
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.lateral_conv0 = ConvNorm(coarse, middle, 1)
        self.C3_p4 = CspLayer(2 * middle, middle, count, False, depthwise)
        self.reduce_conv1 = ConvNorm(middle, fine, 1)
        self.C3_p3 = CspLayer(2 * fine, fine, count, False, depthwise)
        self.bu_conv2 = conv3x3(fine, fine, depthwise, stride=2)
        self.C3_n3 = CspLayer(2 * fine, middle, count, False, depthwise)
        self.bu_conv1 = conv3x3(middle, middle, depthwise, stride=2)
        self.C3_n4 = CspLayer(2 * middle, coarse, count, False, depthwise)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        stride8, stride16, stride32 = self.backbone(pixels)
        top = self.lateral_conv0(stride32)
        merged = self.C3_p4(torch.cat([self.upsample(top), stride16], 1))
        middle = self.reduce_conv1(merged)
        fine = self.C3_p3(torch.cat([self.upsample(middle), stride8], 1))
        down = torch.cat([self.bu_conv2(fine), middle], 1)
        middle = self.C3_n3(down)
        down = torch.cat([self.bu_conv1(middle), top], 1)
        return [fine, middle, self.C3_n4(down)]


class DecoupledHead(nn.Module):
    """Separate branches for the class, and for box and objectness, at each stride."""

    def __init__(self, num_classes: int, size: YoloxSize) -> None:
        super().__init__()
        self.num_classes = num_classes
        channels = tuple(int(c * size.width) for c in (256, 512, 1024))
        self.map_channels = channels
        hidden, depthwise = int(256 * size.width), size.depthwise
        self.stems = nn.ModuleList(ConvNorm(c, hidden, 1) for c in channels)
        branches = [self._branch(hidden, depthwise) for _ in range(2 * len(channels))]
        self.cls_convs = nn.ModuleList(branches[: len(channels)])
        self.reg_convs = nn.ModuleList(branches[len(channels) :])
        self.cls_preds = self._predictors(hidden, num_classes)
        self.reg_preds = self._predictors(hidden, 4)
        self.obj_preds = self._predictors(hidden, 1)
        for predictor in (*self.cls_preds, *self.obj_preds):
            assert isinstance(predictor, nn.Conv2d)
            assert predictor.bias is not None
            nn.init.constant_(predictor.bias, -math.log((1 - PRIOR) / PRIOR))

    @staticmethod
    def _branch(hidden: int, depthwise: bool) -> nn.Sequential:
        convolutions = [conv3x3(hidden, hidden, depthwise) for _ in range(2)]
        return nn.Sequential(*convolutions)

    @staticmethod
    def _predictors(hidden: int, outputs: int) -> nn.ModuleList:
        return nn.ModuleList(nn.Conv2d(hidden, outputs, 1) for _ in STRIDES)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Return [B, A, 5 + K]: box offsets, objectness and class logits of each cell,
        finest map first.
        """
        outputs = []
        for level, features in enumerate(maps):
            stem = self.stems[level](features)
            classes = self.cls_preds[level](self.cls_convs[level](stem))
            regression = self.reg_convs[level](stem)
            boxes = self.reg_preds[level](regression)
            objectness = self.obj_preds[level](regression)
            outputs.append(torch.cat([boxes, objectness, classes], 1).flatten(2))
        return torch.cat(outputs, 2).transpose(1, 2)


class YoloxNetwork(nn.Module):
    """pixels [B, 3, H, W] float BGR 0..255, sides multiples of 32 -> [B, A, 5 + K], as
    ``DecoupledHead``.
    """

    def __init__(self, num_classes: int, size: YoloxSize) -> None:
        super().__init__()
        self.backbone = Pafpn(size)
        self.head = DecoupledHead(num_classes, size)

    def forward(self, pixels: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.backbone(pixels))
        return outputs


def cell_grid(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cells' column and row [A, 2] and stride [A] for an input [B, 3, h, w],
    in the order of the network's outputs, as float32 on its device.
    """
    height, width = pixels.shape[2], pixels.shape[3]
    cells, strides = [], []
    for stride in STRIDES:
        rows = torch.arange(height // stride, dtype=torch.float32, device=pixels.device)
        columns = torch.arange(
            width // stride, dtype=torch.float32, device=pixels.device
        )
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        level = torch.stack([x, y], -1).reshape(-1, 2)
        cells.append(level)
        strides.append(torch.full_like(level[:, 0], stride))
    return torch.cat(cells), torch.cat(strides)


def decode_boxes_cxcywh(offsets: Tensor, cells: Tensor, strides: Tensor) -> Tensor:
    """Return boxes [..., A, 4] as centre and size in pixels, of offsets [..., A, 4]."""
    centres = (offsets[..., :2] + cells) * strides[:, None]
    sizes = offsets[..., 2:4].exp() * strides[:, None]
    return torch.cat([centres, sizes], -1)
