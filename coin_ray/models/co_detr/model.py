"""The detector that is shipped: Deformable DETR, two-stage, with box refinement. It
knows nothing of auxiliary heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from coin_ray.config.co_detr import CoDetr
from coin_ray.errors import InputError
from coin_ray.models.base import Images
from coin_ray.models.co_detr.decoder import (
    Decoded,
    Decoder,
    NewClassifier,
    Queries,
    linear_classifier,
)
from coin_ray.models.co_detr.encoder import Encoder, Memory
from coin_ray.models.co_detr.neck import Neck
from coin_ray.models.co_detr.targets import Size, pixels
from coin_ray.models.co_detr.two_stage import TwoStage
from coin_ray.structures import Detections

PADDED_TO = 32
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DeformableDetr(nn.Module):
    """``backbone``: a module with ``channels`` whose forward gives one map for each of
    the strides 8, 16, 32.

    ``new_classifier`` makes the classifier of each decoder layer, ``(width, classes) ->
    module``.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        classes: int,
        config: CoDetr,
        new_classifier: NewClassifier = linear_classifier,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.config, self.num_classes = config, classes
        self.backbone = backbone
        self.neck = Neck(backbone.channels, config.width, config.levels)  # type: ignore[arg-type]
        self.encoder = Encoder(config)
        self.two_stage = TwoStage(config)
        self.decoder = Decoder(config, classes, new_classifier)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def prepare(self, images: Sequence[Tensor], at_least: Size = (0, 0)) -> Images:
        """uint8 images [3, H, W] of any sizes -> one normalised batch, padded to a
        multiple of 32 that holds all and ``at_least`` (H, W).
        """
        height, width = (
            -(-max(at_least[side], *(i.shape[side + 1] for i in images)) // PADDED_TO)
            * PADDED_TO
            for side in (0, 1)
        )
        batch = self.mean.new_zeros(len(images), 3, height, width)
        for row, image in zip(batch, images, strict=True):
            row[:, : image.shape[1], : image.shape[2]] = (
                image.to(self.mean.device).float() / 255 - self.mean
            ) / self.std
        return Images(batch, tuple((int(i.shape[1]), int(i.shape[2])) for i in images))

    def encode(self, images: Images) -> Memory:
        memory: Memory = self.encoder(
            self.neck(self.backbone(images.pixels)), images.sizes
        )
        return memory

    def decode(
        self, queries: Queries, memory: Memory, mask: Tensor | None = None
    ) -> Decoded:
        decoded: Decoded = self.decoder(queries, memory, mask)
        return decoded

    def forward(self, images: Images) -> Decoded:
        memory = self.encode(images)
        return self.decode(self.two_stage(memory).queries, memory)

    @torch.no_grad()
    def predict(self, images: Images) -> list[Detections]:
        """Of the last layer, the best (query, class) pairs; no suppression. One query
        may stand for several classes.
        """
        return self.detections(self.encode(images), images.sizes)

    @torch.no_grad()
    def detections(self, memory: Memory, sizes: Sequence[Size]) -> list[Detections]:
        """``predict`` of what the encoder made of the images."""
        decoded = self.decode(self.two_stage(memory).queries, memory)
        scores, limit, least = (
            decoded.logits[-1].sigmoid(),
            self.config.detections,
            self.config.score_min,
        )
        return [
            best_pairs(s, b, size, limit, least)
            for s, b, size in zip(scores, decoded.boxes[-1], sizes, strict=True)
        ]


def best_pairs(
    scores: Tensor, boxes: Tensor, size: Size, limit: int, least: float
) -> Detections:
    """The best ``limit`` (query, class) pairs above ``least``: ``scores`` [Q, K],
    ``boxes`` [Q, 4] (cxcywh in 0..1).
    """
    flat = scores.flatten()
    best, chosen = flat.topk(min(limit, len(flat)))
    chosen = chosen[best > least]
    query, label = chosen // scores.shape[1], chosen % scores.shape[1]
    return Detections(
        pixels(boxes[query], size), flat[chosen], label, with_background(scores[query])
    )


def with_background(scores: Tensor) -> Tensor:
    """Independent scores [N, K] as class vectors [N, K+1] whose rows sum to 1:
    background takes what the classes leave.
    """
    total = scores.sum(1, keepdim=True)
    return torch.cat([scores / total.clamp(min=1), (1 - total).clamp(min=0)], 1)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Set every weight of ``model``. Raises InputError that names what doesn't fit, as
    with a checkpoint of other classes.
    """
    own, given = (
        {name: list(value.shape) for name, value in side.items()}
        for side in (model.state_dict(), weights)
    )
    wrong = sorted(
        name for name in own.keys() | given.keys() if own.get(name) != given.get(name)
    )
    if wrong:
        name, others = (
            wrong[0],
            (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""),
        )
        raise InputError(
            f"weights don't fit this detector: {name} should be"
            f" {own.get(name, 'absent')} and is {given.get(name, 'absent')}{others}."
            " Give the classes and the settings they were trained with"
        )
    model.load_state_dict(weights)
