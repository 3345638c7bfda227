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
from coin_ray.models.co_detr.positions import inverse_sigmoid

ClassifierFactory = Callable[[int, int], nn.Module]
PRIOR_LOGIT = -math.log(99)
"""Initial bias of class logits: every score starts at 0.01."""


@dataclass(frozen=True, slots=True, eq=False)
class Queries:
    """Inputs of the decoder: ``content`` and ``positions`` [B, Q, d], ``references``
    [B, Q, 4].
    """

    content: Tensor
    positions: Tensor
    references: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class DecoderOutputs:
    """Class ``logits`` [L, B, Q, C] and ``boxes`` [L, B, Q, 4] of every layer."""

    logits: Tensor
    boxes: Tensor

    def select_queries(self, start: int, stop: int) -> DecoderOutputs:
        """Select the outputs of queries ``start`` to ``stop``."""
        return DecoderOutputs(
            self.logits[:, :, start:stop], self.boxes[:, :, start:stop]
        )


def new_linear_classifier(width: int, classes: int) -> nn.Module:
    """Make a layer [..., width] -> [..., classes] whose scores start at 0.01."""
    layer = nn.Linear(width, classes)
    nn.init.constant_(layer.bias, PRIOR_LOGIT)
    return layer


def new_box_branch(width: int) -> nn.Module:
    """Make a three-layer MLP [..., width] -> [..., 4] that starts at zero."""
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
        """Return the content [B, Q, d] after self-attention, attention to the maps and
        the feed-forward network. ``references`` [B, Q, L, 4].
        """
        attended = self.self_attention(content, positions, mask)
        content = self.self_attention_norm(content + attended)
        attended = self.attention(
            content + positions,
            references,
            memory.tokens,
            memory.shapes,
            memory.padding,
        )
        content = self.attention_norm(content + attended)
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
        new_classifier: ClassifierFactory = new_linear_classifier,
    ) -> None:
        super().__init__()
        self.look_forward_twice = config.look_forward_twice
        count = config.decoder_layers
        self.layers = nn.ModuleList([DecoderLayer(config) for _ in range(count)])
        self.classify = nn.ModuleList(
            [new_classifier(config.width, classes) for _ in range(count)]
        )
        self.regress = nn.ModuleList(
            [new_box_branch(config.width) for _ in range(count)]
        )

    def forward(
        self, queries: Queries, memory: Memory, mask: Tensor | None = None
    ) -> DecoderOutputs:
        """Decode ``queries``; ``mask`` [B, Q, Q] bool: row may attend to column.
        References that enter a layer carry no gradient.
        """
        content, references = queries.content, queries.references.detach()
        previous = references
        ratios = torch.cat([memory.valid_ratios, memory.valid_ratios], -1)[:, None]
        logits, boxes = [], []
        for layer, classify, regress in zip(
            self.layers, self.classify, self.regress, strict=True
        ):
            level_references = references[:, :, None] * ratios
            content = layer(content, queries.positions, level_references, memory, mask)
            delta = regress(content).float()
            logits.append(classify(content).float())
            boxes.append((delta + inverse_sigmoid(previous)).sigmoid())
            refined = (delta + inverse_sigmoid(references)).sigmoid()
            references = refined.detach()
            previous = refined if self.look_forward_twice else references
        return DecoderOutputs(torch.stack(logits), torch.stack(boxes))
