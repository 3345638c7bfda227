"""The two halves of a detector as networks of tensors alone: what is between them is
written once for ONNX and once for TorchScript.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from coin_ray import boxes as box_ops
from coin_ray.models.faster_rcnn_clip.model import STRIDE, ClipDetector
from coin_ray.models.faster_rcnn_clip.tower import NormalisedConv2d

PAD = 32
"""Inputs of the network are padded to multiples of this."""


def cell_shifts(features: Tensor, stride: int) -> Tensor:
    """Return the upper left corner (x, y, x, y) of each cell in pixels [h, w, 4]."""
    y = torch.arange(features.shape[2], dtype=torch.float32) * stride
    x = torch.arange(features.shape[3], dtype=torch.float32) * stride
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([columns, rows, columns, rows], -1)


class Propose(nn.Module):
    """pixels [B, 3, H, W] normalised, limits [4] (w, h, w, h) of the resized image
    inside -> features [B, C, h, w], objectness [B, A], boxes [B, A, 4].

    ``cell_shifts`` of the features and their stride: where each cell begins.
    """

    cell_anchors: Tensor
    scale: Tensor

    def __init__(self, detector: ClipDetector) -> None:
        super().__init__()
        self.tower, self.rpn = detector.tower, detector.rpn
        self.cell_shifts: Callable[[Tensor, int], Tensor] = cell_shifts
        anchors = detector.rpn.anchor_generator.cell_anchors[0]
        self.register_buffer("cell_anchors", anchors.detach().clone().round())
        anchor_weights = torch.tensor(detector.config.anchor_weights)
        delta_weights = torch.tensor(box_ops.DELTA_WEIGHTS)
        self.register_buffer("scale", anchor_weights / delta_weights)

    def forward(self, pixels: Tensor, limits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.tower.shared(pixels)
        batch = features.shape[0]
        hidden = self.rpn.conv(features).relu()
        objectness = self.rpn.objectness(hidden).permute(0, 2, 3, 1).flatten(1)
        deltas = self.rpn.deltas(hidden).permute(0, 2, 3, 1).reshape(batch, -1, 4)
        shifts = self.cell_shifts(features, STRIDE)
        cell_boxes = (shifts[:, :, None] + self.cell_anchors).reshape(1, -1, 4)
        anchors = cell_boxes.expand(batch, -1, -1)
        boxes = box_ops.decode_boxes(
            (deltas / self.scale).reshape(-1, 4), anchors.reshape(-1, 4)
        )
        return features, objectness, _clip_boxes(boxes, limits).reshape(batch, -1, 4)


class Describe(nn.Module):
    """pooled [R, C, s, s], proposals [R, 4], limits [4] -> probs [R, K+1], background
    last, and boxes [R, 4].
    """

    embeddings: Tensor

    def __init__(self, detector: ClipDetector, embeddings: Tensor) -> None:
        super().__init__()
        self.tower, self.head = detector.tower, detector.head
        self.register_buffer("embeddings", embeddings)

    def forward(
        self, pooled: Tensor, proposals: Tensor, limits: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.classify(self.tower.regional(pooled), proposals, limits)

    def classify(
        self, region_features: Tensor, proposals: Tensor, limits: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return probs and boxes for ``region_features`` [R, regional_channels], the
        tower's output for the pooled regions.
        """
        regions = self.head(region_features, self.embeddings)
        probs = regions.logits.softmax(-1)
        boxes = box_ops.decode_boxes(regions.deltas, proposals)
        return probs, _clip_boxes(boxes, limits)


def _clip_boxes(boxes: Tensor, limits: Tensor) -> Tensor:
    return torch.minimum(boxes.clamp(min=0), limits)


@torch.no_grad()
def split_detector(detector: ClipDetector) -> tuple[Propose, Describe]:
    """Return both halves of a copy of ``detector`` on the CPU, class embeddings cached
    and norms folded into the convolutions before them.
    """
    copied = copy.deepcopy(detector).cpu().eval()
    embeddings = detector.eval().class_embeddings().detach().cpu().clone()
    _fold_norms(copied)
    copied.requires_grad_(False)
    return Propose(copied).eval(), Describe(copied, embeddings).eval()


def _fold_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, NormalisedConv2d):
            setattr(module, name, _fold_norm(child))
        else:
            _fold_norms(child)


def _fold_norm(layer: NormalisedConv2d) -> nn.Conv2d:
    folded = copy.deepcopy(layer.convolution)
    folded.weight.data = folded.weight.data * layer.scale.view(-1, 1, 1, 1)
    folded.bias = nn.Parameter(layer.shift.clone())
    return folded
