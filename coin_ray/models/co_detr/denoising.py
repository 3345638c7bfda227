"""Contrastive denoising queries (DINO, arXiv 2203.03605, section 3.3), as Co-DINO
trains with: objects with noise, near and not so near.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert

from coin_ray.config.co_detr import CoDetr
from coin_ray.models.co_detr.criterion import Assigned
from coin_ray.models.co_detr.decoder import Queries
from coin_ray.models.co_detr.positions import EPSILON
from coin_ray.models.co_detr.queries import Group
from coin_ray.models.co_detr.targets import Size, Targets
from coin_ray.models.co_detr.two_stage import BoxEmbedding


class Denoising(nn.Module):
    """Makes one group of queries whose parts each hold every object twice: with little
    noise, to be found, and with more, as background.
    """

    def __init__(self, config: CoDetr, classes: int) -> None:
        super().__init__()
        self.config, self.classes = config, classes
        self.labels = nn.Embedding(classes, config.width)

    def forward(
        self,
        targets: Sequence[Targets],
        sizes: Sequence[Size],
        embedding: BoxEmbedding,
        generator: torch.Generator | None = None,
    ) -> Group:
        """``embedding``: the decoder's own, for the positions. A batch without objects
        gives a group of length 0.
        """
        most = max(len(t.labels) for t in targets)
        parts = max(1, self.config.denoising // max(most, 1))
        labels, real = (
            _padded([t.labels for t in targets]),
            _padded([torch.ones_like(t.labels, dtype=torch.bool) for t in targets]),
        )
        boxes = _padded(
            [t.normalised(size) for t, size in zip(targets, sizes, strict=True)]
        )
        weights = _padded([t.certainty for t in targets])
        repeats = 2 * parts
        far = (torch.arange(repeats, device=boxes.device) % 2 == 1).repeat_interleave(
            most
        )
        labels, real, weights = (t.repeat(1, repeats) for t in (labels, real, weights))
        boxes = boxes.repeat(1, repeats, 1)
        references = self._moved(boxes, far, generator)
        content = self.labels(self._renamed(labels, generator))
        classes = torch.where(far | ~real, self.classes, labels)
        queries = Queries(content, embedding(references)[0], references)
        return Group(queries, Assigned(classes, boxes, real, weights), parts)

    def _renamed(self, labels: Tensor, generator: torch.Generator | None) -> Tensor:
        drawn = (
            torch.rand(labels.shape, generator=generator)
            < self.config.denoising_labels / 2
        )
        others = torch.randint(self.classes, labels.shape, generator=generator)
        return torch.where(drawn.to(labels.device), others.to(labels.device), labels)

    def _moved(
        self, boxes: Tensor, far: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Boxes [B, Q, 4] (cxcywh in 0..1) with each corner moved by U(0, 1) half
        sides, or U(1, 2) where ``far`` [Q]; still boxes.
        """
        share = torch.rand(boxes.shape, generator=generator).to(boxes) + far[:, None]
        sign = torch.randint(2, boxes.shape, generator=generator).to(boxes) * 2 - 1
        half = boxes[..., 2:].repeat(1, 1, 2) / 2
        corners = (
            box_convert(boxes, "cxcywh", "xyxy")
            + sign * share * half * self.config.denoising_boxes
        ).clamp(0, 1)
        first, second = corners[..., :2], corners[..., 2:]
        ordered = torch.cat(
            [torch.minimum(first, second), torch.maximum(first, second)], -1
        )
        moved: Tensor = box_convert(ordered, "xyxy", "cxcywh")
        return moved.clamp(EPSILON, 1 - EPSILON)


def _padded(rows: Sequence[Tensor]) -> Tensor:
    return pad_sequence(list(rows), batch_first=True)
