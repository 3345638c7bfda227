"""A ModifiedResNet for inference alone: batch norms folded into the convolutions, and
attention pooling for the only query whose output is used.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

CONVOLVED_TOGETHER = 32
"""Images of 64 pixels a side: the maps of more leave a CPU's cache."""


class FusedResNet(nn.Module):
    """Computes what open_clip's ``visual`` computes in evaluation, but for rounding
    (1e-6 of the largest feature), in about half the time on a CPU.
    """

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        fused = copy.deepcopy(visual).eval()
        _fold_batch_norms(fused)
        _merge_shortcuts(fused)
        self.visual = fused.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the features [N, D] of normalised pixels [N, 3, H, W].

        The images go through the convolutions in equal parts of at most 32, whose maps
        stay in a cache, and are pooled together: so its weights are read once.
        """
        visual: Any = self.visual
        parts = pixels.chunk(-(-len(pixels) // CONVOLVED_TOGETHER))
        maps = torch.cat([self._convolve(part) for part in parts])
        return attention_pool(visual.attnpool, maps)

    def _convolve(self, pixels: Tensor) -> Tensor:
        """Return the last maps [N, C, h, w] of normalised pixels [N, 3, H, W]."""
        visual: Any = self.visual
        maps: Tensor = visual.stem(pixels.contiguous(memory_format=torch.channels_last))
        for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            maps = stage(maps)
        return maps


def _fold_batch_norms(module: nn.Module) -> None:
    """Fold each batch norm into the convolution that comes right before it."""
    previous_name, previous = "", module
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d) and isinstance(previous, nn.Conv2d):
            setattr(module, previous_name, fuse_conv_bn_eval(previous, child))
            setattr(module, name, nn.Identity())
        else:
            _fold_batch_norms(child)
        previous_name, previous = name, child


class MergedBottleneck(nn.Module):
    """Computes what a bottleneck with a convolution in its shortcut computes, once batch
    norms are folded: its last convolution and the shortcut's, both of 1 x 1, are one over
    the channels of both.
    """

    def __init__(self, bottleneck: Any) -> None:
        super().__init__()
        shortcut_pool, shortcut, _ = bottleneck.downsample
        last = bottleneck.conv3
        self.first = nn.Sequential(
            bottleneck.conv1,
            bottleneck.act1,
            bottleneck.conv2,
            bottleneck.act2,
            bottleneck.avgpool,
        )
        is_pooled = shortcut_pool.kernel_size != 1
        self.shortcut_pool = shortcut_pool if is_pooled else nn.Identity()
        self.merged = nn.Conv2d(
            last.in_channels + shortcut.in_channels, last.out_channels, 1
        )
        weights = torch.cat([last.weight, shortcut.weight], 1)
        self.merged.weight = nn.Parameter(weights, requires_grad=False)
        biases = last.bias + shortcut.bias
        self.merged.bias = nn.Parameter(biases, requires_grad=False)
        self.activation = bottleneck.act3

    def forward(self, maps: Tensor) -> Tensor:
        """Return the block's maps [N, C', h', w'] of its input [N, C, h, w]."""
        both = torch.cat([self.first(maps), self.shortcut_pool(maps)], 1)
        return self.activation(self.merged(both))  # type: ignore[no-any-return]


def _merge_shortcuts(visual: Any) -> None:
    """Replace the bottlenecks that have a convolution in their shortcut."""
    for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        for number, bottleneck in enumerate(stage):
            if bottleneck.downsample is not None:
                stage[number] = MergedBottleneck(bottleneck)


def attention_pool(pool: Any, maps: Tensor) -> Tensor:
    """Compute open_clip's AttentionPool2d ``pool`` of ``maps`` [R, C, s, s] -> [R, D],
    for the only query whose output is used: the mean cell.

    Keys and values are never formed: their projections are applied to the query and to
    the attended mean instead, so a region costs 4 C^2 multiplications instead of 4 (s^2
    + 1) C^2. What adds the same to all scores the softmax cancels: the keys' bias, and
    the mean token, which is subtracted because the differences of large scores would
    be rounded.
    """
    cells = maps.flatten(2).transpose(1, 2)
    tokens = torch.cat([cells.mean(1, keepdim=True), cells], 1)
    tokens = tokens + pool.positional_embedding
    key_weight = pool.k_proj.weight.unflatten(0, (pool.num_heads, -1))
    value_weight = pool.v_proj.weight.unflatten(0, (pool.num_heads, -1))
    query = pool.q_proj(tokens[:, 0]).unflatten(1, (pool.num_heads, -1))
    query = (query / key_weight.shape[1] ** 0.5).transpose(0, 1)
    # batched over heads [H, R, C], which einsum would do with more copies
    mapped_query = torch.bmm(query, key_weight).transpose(0, 1)
    differences = tokens - tokens[:, :1]
    scores = mapped_query @ differences.transpose(1, 2)
    mean_tokens = (scores.softmax(-1) @ tokens).transpose(0, 1)
    attended = torch.bmm(mean_tokens, value_weight.transpose(1, 2))
    attended = attended.transpose(0, 1).flatten(1)
    return pool.c_proj(attended + pool.v_proj.bias)  # type: ignore[no-any-return]
