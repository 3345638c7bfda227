"""Deformable decoder with iterative box refinement. Boxes are cxcywh in 0..1 of the
image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coin_ray.config.co_detr import CoDetr
from coin_ray.models.co_detr.attention import (
    DeformableAttention,
    FeedForward,
    SelfAttention,
)
from coin_ray.models.co_detr.encoder import Memory
from coin_ray.models.co_detr.positions import logit

NewClassifier = Callable[[int, int], nn.Module]
RARE = -math.log(99)
"""Bias of class logits at the start: every score is 0.01."""


@dataclass(frozen=True, slots=True, eq=False)
class Queries:
    """What the decoder starts from: ``content`` and ``positions`` [B, Q, d],
    ``references`` [B, Q, 4].
    """

    content: Tensor
    positions: Tensor
    references: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """Of every layer: class ``logits`` [L, B, Q, C] and ``boxes`` [L, B, Q, 4]."""

    logits: Tensor
    boxes: Tensor

    def columns(self, start: int, stop: int) -> Decoded:
        """Only queries ``start`` to ``stop``."""
        return Decoded(self.logits[:, :, start:stop], self.boxes[:, :, start:stop])


def linear_classifier(width: int, classes: int) -> nn.Module:
    """[..., width] -> [..., classes] logits that start at a score of 0.01."""
    layer = nn.Linear(width, classes)
    nn.init.constant_(layer.bias, RARE)
    return layer


def box_branch(width: int) -> nn.Module:
    """Three-layer MLP [..., width] -> [..., 4], zero at the start."""
    layers = nn.Sequential(
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 4),
    )
    nn.init.zeros_(layers[4].weight)  # type: ignore[arg-type]
    nn.init.zeros_(layers[4].bias)  # type: ignore[arg-type]
    return layers


class DecoderLayer(nn.Module):
    def __init__(self, config: CoDetr) -> None:
        super().__init__()
        self.self_attention = SelfAttention(config.width, config.heads)
        self.self_attention_norm = nn.LayerNorm(config.width)
        self.attention = DeformableAttention(
            config.width, config.heads, config.levels, config.points
        )
        self.attention_norm = nn.LayerNorm(config.width)
        self.feedforward = FeedForward(config.width, config.feedforward)
        self.feedforward_norm = nn.LayerNorm(config.width)

    def forward(
        self,
        content: Tensor,
        positions: Tensor,
        references: Tensor,
        memory: Memory,
        mask: Tensor | None,
    ) -> Tensor:
        content = self.self_attention_norm(
            content + self.self_attention(content, positions, mask)
        )
        seen = self.attention(
            content + positions,
            references,
            memory.tokens,
            memory.shapes,
            memory.padding,
        )
        content = self.attention_norm(content + seen)
        decoded: Tensor = self.feedforward_norm(content + self.feedforward(content))
        return decoded


class Decoder(nn.Module):
    """``classify``: one classifier per layer, made by ``new_classifier``; ``regress``:
    one box branch per layer.
    """

    def __init__(
        self,
        config: CoDetr,
        classes: int,
        new_classifier: NewClassifier = linear_classifier,
    ) -> None:
        super().__init__()
        self.look_forward_twice = config.look_forward_twice
        self.layers = nn.ModuleList(
            [DecoderLayer(config) for _ in range(config.decoder_layers)]
        )
        self.classify = nn.ModuleList(
            [
                new_classifier(config.width, classes)
                for _ in range(config.decoder_layers)
            ]
        )
        self.regress = nn.ModuleList(
            [box_branch(config.width) for _ in range(config.decoder_layers)]
        )

    def forward(
        self, queries: Queries, memory: Memory, mask: Tensor | None = None
    ) -> Decoded:
        """``mask`` [B, Q, Q] bool: row may attend to column. References that enter a
        layer carry no gradient.
        """
        content, references = queries.content, queries.references.detach()
        before = references
        valid = torch.cat([memory.valid, memory.valid], -1)[:, None]
        logits, boxes = [], []
        for layer, classify, regress in zip(
            self.layers, self.classify, self.regress, strict=True
        ):
            content = layer(
                content, queries.positions, references[:, :, None] * valid, memory, mask
            )
            delta = regress(content).float()
            logits.append(classify(content).float())
            boxes.append((delta + logit(before)).sigmoid())
            refined = (delta + logit(references)).sigmoid()
            references = refined.detach()
            before = refined if self.look_forward_twice else references
        return Decoded(torch.stack(logits), torch.stack(boxes))
