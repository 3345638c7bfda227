"""Deformable DETR on a detector's visual tower, whose classes may be text embeddings:
new class names need no new weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coin_ray.config.co_detr import CoDetr
from coin_ray.models.co_detr.decoder import (
    PRIOR_LOGIT,
    ClassifierFactory,
    DecoderOutputs,
    Queries,
    new_linear_classifier,
)
from coin_ray.models.co_detr.encoder import Memory
from coin_ray.models.co_detr.model import DeformableDetr
from coin_ray.models.faster_rcnn_clip.tower import Tower

INITIAL_SCALE = 10.0
"""Factor from cosines to logits at the start of training."""


class TowerMaps(nn.Module):
    """A visual tower as the backbone of a DETR."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower, self.channels = tower, tower.map_channels

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Map [B, 3, H, W] to maps of the strides 8, 16, 32."""
        return self.tower.maps(pixels)


class QueryEmbedding(nn.Module):
    """Maps queries [..., width] to vectors [..., size] of one learned length, which are
    compared to class embeddings.
    """

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, size)
        self.log_scale = nn.Parameter(torch.tensor(math.log(INITIAL_SCALE)))

    def forward(self, content: Tensor) -> Tensor:
        unit_vectors = F.normalize(self.project(content).float(), dim=-1)
        return unit_vectors * self.log_scale.exp()


class TextDetr(DeformableDetr):
    """``prompts``: a module whose forward gives class embeddings [K+1, size],
    background last. ``has_text_classes``: the decoder classifies by them.

    Otherwise it has linear classifiers, and only the auxiliary head uses the prompts.
    """

    def __init__(
        self,
        tower: Tower,
        prompts: nn.Module,
        classes: int,
        size: int,
        config: CoDetr,
        *,
        has_text_classes: bool,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        def new_query_embedding(width: int, _: int) -> nn.Module:
            return QueryEmbedding(width, size)

        new_classifier: ClassifierFactory = (
            new_query_embedding if has_text_classes else new_linear_classifier
        )
        super().__init__(TowerMaps(tower), classes, config, new_classifier, mean, std)
        self.prompts, self.has_text_classes = prompts, has_text_classes
        initial_bias = torch.tensor(PRIOR_LOGIT)
        self.bias = nn.Parameter(initial_bias) if has_text_classes else None

    @property
    def tower(self) -> Tower:
        return self.backbone.tower  # type: ignore[return-value]

    def class_embeddings(self) -> Tensor:
        """Return class embeddings [K+1, D], unit length, background last."""
        embeddings: Tensor = self.prompts()
        return embeddings

    def decode(
        self, queries: Queries, memory: Memory, mask: Tensor | None = None
    ) -> DecoderOutputs:
        """Decode ``queries`` to class logits, whatever the classifiers are."""
        decoded: DecoderOutputs = self.decoder(queries, memory, mask)
        if self.bias is None:
            return decoded
        class_vectors = self.class_embeddings()[: self.num_classes]
        logits = (decoded.logits @ class_vectors.T).float() + self.bias
        return DecoderOutputs(logits, decoded.boxes)
