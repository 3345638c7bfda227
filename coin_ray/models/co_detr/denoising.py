"""Contrastive denoising queries (DINO, arXiv 2203.03605, section 3.3), as Co-DINO
trains with: objects with little and with much noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert

from coin_ray.config.co_detr import CoDetr
from coin_ray.models.co_detr.criterion import QueryTargets
from coin_ray.models.co_detr.decoder import Queries
from coin_ray.models.co_detr.positions import EPSILON
from coin_ray.models.co_detr.queries import QueryGroup
from coin_ray.models.co_detr.targets import DetrTargets, Size
from coin_ray.models.co_detr.two_stage import BoxEmbedding


class Denoising(nn.Module):
    """Makes one group of queries whose parts each hold every object twice: with little
    noise, to be detected, and with more, as background.
    """

    def __init__(self, config: CoDetr, classes: int) -> None:
        super().__init__()
        self.config, self.classes = config, classes
        self.labels = nn.Embedding(classes, config.width)

    def forward(
        self,
        targets: Sequence[DetrTargets],
        sizes: Sequence[Size],
        embedding: BoxEmbedding,
        generator: torch.Generator | None = None,
    ) -> QueryGroup:
        """Make the queries; ``embedding``: the decoder's own, for the positions. A
        batch without objects gives a group of length 0.
        """
        most_objects = max(len(t.labels) for t in targets)
        parts = max(1, self.config.denoising // max(most_objects, 1))
        labels = _pad([t.labels for t in targets])
        is_real = _pad([torch.ones_like(t.labels, dtype=torch.bool) for t in targets])
        boxes = _pad(
            [t.normalised_boxes(size) for t, size in zip(targets, sizes, strict=True)]
        )
        weights = _pad([t.object_weights for t in targets])
        repeats = 2 * parts
        is_odd = torch.arange(repeats, device=boxes.device) % 2 == 1
        is_background = is_odd.repeat_interleave(most_objects)
        labels = labels.repeat(1, repeats)
        is_real = is_real.repeat(1, repeats)
        weights = weights.repeat(1, repeats)
        boxes = boxes.repeat(1, repeats, 1)
        references = self._add_box_noise(boxes, is_background, generator)
        content = self.labels(self._add_label_noise(labels, generator))
        classes = torch.where(is_background | ~is_real, self.classes, labels)
        queries = Queries(content, embedding(references)[0], references)
        query_targets = QueryTargets(classes, boxes, is_real, weights)
        return QueryGroup(queries, query_targets, parts)

    def _add_label_noise(
        self, labels: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Replace a share ``denoising_labels`` / 2 of ``labels`` by random classes."""
        draws = torch.rand(labels.shape, generator=generator)
        is_replaced = draws < self.config.denoising_labels / 2
        others = torch.randint(self.classes, labels.shape, generator=generator)
        return torch.where(
            is_replaced.to(labels.device), others.to(labels.device), labels
        )

    def _add_box_noise(
        self, boxes: Tensor, is_background: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Move each corner of boxes [B, Q, 4] (cxcywh in 0..1) by U(0, 1) half sides,
        or U(1, 2) where ``is_background`` [Q]; opposite corners that pass each other
        are swapped.
        """
        draws = torch.rand(boxes.shape, generator=generator).to(boxes)
        distance = draws + is_background[:, None]
        sign = torch.randint(2, boxes.shape, generator=generator).to(boxes) * 2 - 1
        half_sides = boxes[..., 2:].repeat(1, 1, 2) / 2
        noise = sign * distance * half_sides * self.config.denoising_boxes
        corners = (box_convert(boxes, "cxcywh", "xyxy") + noise).clamp(0, 1)
        first, second = corners[..., :2], corners[..., 2:]
        left_top = torch.minimum(first, second)
        right_bottom = torch.maximum(first, second)
        ordered = torch.cat([left_top, right_bottom], -1)
        noisy: Tensor = box_convert(ordered, "xyxy", "cxcywh")
        return noisy.clamp(EPSILON, 1 - EPSILON)


def _pad(rows: Sequence[Tensor]) -> Tensor:
    return pad_sequence(list(rows), batch_first=True)
