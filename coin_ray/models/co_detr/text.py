"""Deformable DETR on a detector's visual tower, whose classes may be text embeddings:
new names need no new weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coin_ray.config.co_detr import CoDetr
from coin_ray.models.co_detr.decoder import RARE, Decoded, Queries, linear_classifier
from coin_ray.models.co_detr.encoder import Memory
from coin_ray.models.co_detr.model import DeformableDetr
from coin_ray.models.faster_rcnn_clip.tower import Tower

SCALE = 10.0
"""Of cosines as logits, at the start."""


class TowerMaps(nn.Module):
    """A visual tower as the backbone of a DETR."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower, self.channels = tower, tower.map_channels

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """[B, 3, H, W] -> maps of strides 8, 16, 32."""
        return self.tower.maps(pixels)


class Embed(nn.Module):
    """[..., width] -> [..., size] of one, learned, length: what is compared to class
    embeddings.
    """

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, size)
        self.log_scale = nn.Parameter(torch.tensor(math.log(SCALE)))

    def forward(self, content: Tensor) -> Tensor:
        return F.normalize(self.project(content).float(), dim=-1) * self.log_scale.exp()


class TextDetr(DeformableDetr):
    """``prompts``: a module whose forward gives class embeddings [K+1, size],
    background last. ``named``: the decoder names classes by them.

    Otherwise it has linear classifiers, and the prompts only serve the auxiliary head.
    """

    def __init__(
        self,
        tower: Tower,
        prompts: nn.Module,
        classes: int,
        size: int,
        config: CoDetr,
        *,
        named: bool,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        new = (lambda width, _: Embed(width, size)) if named else linear_classifier
        super().__init__(TowerMaps(tower), classes, config, new, mean, std)
        self.prompts, self.named = prompts, named
        self.bias = nn.Parameter(torch.tensor(RARE)) if named else None

    @property
    def tower(self) -> Tower:
        return self.backbone.tower  # type: ignore[return-value]

    def class_embeddings(self) -> Tensor:
        """[K+1, D] unit length, background last."""
        embeddings: Tensor = self.prompts()
        return embeddings

    def decode(
        self, queries: Queries, memory: Memory, mask: Tensor | None = None
    ) -> Decoded:
        """As the decoder does, with class logits whatever its classifiers are."""
        decoded: Decoded = self.decoder(queries, memory, mask)
        if self.bias is None:
            return decoded
        names = self.class_embeddings()[: self.num_classes]
        return Decoded((decoded.logits @ names.T).float() + self.bias, decoded.boxes)
