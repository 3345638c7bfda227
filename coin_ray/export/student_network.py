"""The network of a student that was a detector before, as exporters take it."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from coin_ray.models.students.base import DetectorStudent
from coin_ray.models.students.yolox_network import ConvNorm


class StudentNetwork(nn.Module):
    """pixels [B, 3, h, w] in the student's input format -> boxes [B, A, 4], scores
    [B, A, K].
    """

    def __init__(self, student: DetectorStudent) -> None:
        super().__init__()
        self.student = student

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self.student.detect_tensors(pixels)


@torch.no_grad()
def export_copy(student: DetectorStudent) -> DetectorStudent:
    """Return a copy of the student on the CPU without gradients, batch norms folded into
    the convolutions before them.
    """
    copied = copy.deepcopy(student)
    copied.to(torch.device("cpu"))
    copied.eval()
    copied.requires_grad_(False)
    for module in copied.modules():
        if isinstance(module, ConvNorm):
            _fold_norm(module)
    return copied


def _fold_norm(layer: ConvNorm) -> None:
    norm = layer.bn
    mean, variance = cast("Tensor", norm.running_mean), cast("Tensor", norm.running_var)
    weight, bias = fuse_conv_bn_weights(
        layer.conv.weight, None, mean, variance, norm.eps, norm.weight, norm.bias
    )
    layer.conv.weight, layer.conv.bias = weight, bias
    layer.bn = nn.Identity()  # type: ignore[assignment]
