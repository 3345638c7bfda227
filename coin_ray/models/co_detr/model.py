"""The detector that is exported: Deformable DETR, two-stage, with box refinement. It
does not depend on auxiliary heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from coin_ray.config.co_detr import CoDetr
from coin_ray.errors import InputError
from coin_ray.models.base import Images
from coin_ray.models.co_detr.decoder import (
    ClassifierFactory,
    Decoder,
    DecoderOutputs,
    Queries,
    new_linear_classifier,
)
from coin_ray.models.co_detr.encoder import Encoder, Memory
from coin_ray.models.co_detr.neck import Neck
from coin_ray.models.co_detr.targets import Size, denormalise
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
        new_classifier: ClassifierFactory = new_linear_classifier,
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
        """Normalise uint8 images [3, H, W] of any sizes into one batch, padded to a
        multiple of 32 that holds all of them and ``at_least`` (H, W).
        """
        sizes = tuple((int(i.shape[1]), int(i.shape[2])) for i in images)
        height = _round_up(max(at_least[0], *(size[0] for size in sizes)))
        width = _round_up(max(at_least[1], *(size[1] for size in sizes)))
        batch = self.mean.new_zeros(len(images), 3, height, width)
        for padded, image in zip(batch, images, strict=True):
            scaled = image.to(self.mean.device).float() / 255
            normalised = (scaled - self.mean) / self.std
            padded[:, : image.shape[1], : image.shape[2]] = normalised
        return Images(batch, sizes)

    def encode(self, images: Images) -> Memory:
        maps = self.neck(self.backbone(images.pixels))
        memory: Memory = self.encoder(maps, images.sizes)
        return memory

    def decode(
        self, queries: Queries, memory: Memory, mask: Tensor | None = None
    ) -> DecoderOutputs:
        decoded: DecoderOutputs = self.decoder(queries, memory, mask)
        return decoded

    def forward(self, images: Images) -> DecoderOutputs:
        memory = self.encode(images)
        return self.decode(self.two_stage(memory).queries, memory)

    @torch.no_grad()
    def predict(self, images: Images) -> list[Detections]:
        """Return the best (query, class) pairs of the last layer, without suppression.
        One query may give detections of several classes.
        """
        return self.predict_from_memory(self.encode(images), images.sizes)

    @torch.no_grad()
    def predict_from_memory(
        self, memory: Memory, sizes: Sequence[Size]
    ) -> list[Detections]:
        """Return what ``predict`` does, for images that are already encoded."""
        decoded = self.decode(self.two_stage(memory).queries, memory)
        scores = decoded.logits[-1].sigmoid()
        limit, score_min = self.config.detections, self.config.score_min
        return [
            top_detections(image_scores, image_boxes, size, limit, score_min)
            for image_scores, image_boxes, size in zip(
                scores, decoded.boxes[-1], sizes, strict=True
            )
        ]


def _round_up(pixels: int) -> int:
    return -(-pixels // PADDED_TO) * PADDED_TO


def top_detections(
    scores: Tensor, boxes: Tensor, size: Size, limit: int, score_min: float
) -> Detections:
    """Return the best ``limit`` (query, class) pairs above ``score_min``: ``scores``
    [Q, K], ``boxes`` [Q, 4] (cxcywh in 0..1).
    """
    flat_scores = scores.flatten()
    best_scores, pairs = flat_scores.topk(min(limit, len(flat_scores)))
    pairs = pairs[best_scores > score_min]
    queries, labels = pairs // scores.shape[1], pairs % scores.shape[1]
    return Detections(
        denormalise(boxes[queries], size),
        flat_scores[pairs],
        labels,
        append_background(scores[queries]),
    )


def append_background(scores: Tensor) -> Tensor:
    """Return independent scores [N, K] as class probabilities [N, K+1] whose rows sum
    to 1: background has what the classes leave.
    """
    total = scores.sum(1, keepdim=True)
    classes = scores / total.clamp(min=1)
    background = (1 - total).clamp(min=0)
    return torch.cat([classes, background], 1)


def load_detector_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Set every weight of ``model``. Raises InputError that names the first mismatch,
    as with a checkpoint of other classes.
    """
    expected = {name: list(w.shape) for name, w in model.state_dict().items()}
    actual = {name: list(w.shape) for name, w in weights.items()}
    mismatches = sorted(
        name
        for name in expected.keys() | actual.keys()
        if expected.get(name) != actual.get(name)
    )
    if mismatches:
        name = mismatches[0]
        others = f" (and {len(mismatches) - 1} more)" if len(mismatches) > 1 else ""
        raise InputError(
            f"the weights do not match this detector: expected {name} of shape"
            f" {expected.get(name, 'absent')}, got {actual.get(name, 'absent')}{others}."
            " Give the classes and the settings they were trained with"
        )
    model.load_state_dict(weights)
