"""The CLIP detector and the target detector: Faster R-CNN on a visual tower with a text
head (paper section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms, clip_boxes_to_image

from coin_ray import boxes as box_ops
from coin_ray.config import Detector
from coin_ray.models.base import Images, RegionOutputs, RpnOutputs
from coin_ray.models.faster_rcnn_clip.backbone import (
    BackboneModel,
    new_embeddings,
    new_tower,
)
from coin_ray.models.faster_rcnn_clip.pooling import pool_regions
from coin_ray.models.faster_rcnn_clip.rpn import RegionProposalNetwork
from coin_ray.models.faster_rcnn_clip.tower import Tower
from coin_ray.structures import Detections

STRIDE = 16


class Transformation(nn.Module):
    """The paper's Trans: a three-layer MLP [R, C] -> [R, C] between pooled RoI features
    and the two output layers.
    """

    def __init__(self, channels: int, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        hidden = channels // 2
        self.layers = nn.Sequential(
            nn.Linear(channels, hidden),
            nn.LeakyReLU(),
            nn.Linear(hidden, hidden),
            nn.LeakyReLU(),
            nn.Linear(hidden, channels),
        )
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        transformed: Tensor = self.layers(x)
        return x + transformed if self.residual else transformed


class EmbeddingHead(nn.Module):
    """Maps pooled features [R, C] to embeddings, class logits (cosine to class
    embeddings / tau) and class-agnostic box deltas.
    """

    def __init__(self, channels: int, embedding_size: int, config: Detector) -> None:
        super().__init__()
        self.temperature = config.temperature
        self.transformation = Transformation(channels, config.residual_transformation)
        self.embed = nn.Linear(channels, embedding_size)
        self.box = nn.Linear(channels, 4)
        nn.init.normal_(self.embed.weight, std=0.01)
        nn.init.normal_(self.box.weight, std=0.001)
        for layer in (self.embed, self.box):
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor, class_embeddings: Tensor) -> RegionOutputs:
        transformed = self.transformation(pooled)
        embedded = F.normalize(self.embed(transformed), dim=-1)
        logits = embedded @ class_embeddings.T / self.temperature
        deltas = self.box(transformed)
        return RegionOutputs(pooled, embedded, logits, deltas, class_embeddings)


class ClipDetector(nn.Module):
    """Faster R-CNN whose classes are embeddings: of learned prompts in training, fixed
    ones after export.

    ``prompts``: a module whose forward gives [K+1, D], background last.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        tower: Tower,
        prompts: nn.Module,
        num_classes: int,
        embedding_size: int,
        config: Detector,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.tower = tower
        self.rpn = RegionProposalNetwork(tower.shared_channels, config)
        self.head = EmbeddingHead(tower.regional_channels, embedding_size, config)
        self.prompts = prompts
        self.background = nn.Parameter(
            torch.zeros(embedding_size), requires_grad=config.background == "learned"
        )
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        self.cached_embeddings: Tensor | None = None

    def train(self, mode: bool = True) -> ClipDetector:
        super().train(mode)
        self.cached_embeddings = None
        return self

    def class_embeddings(self) -> Tensor:
        """Return class embeddings [K+1, D], unit length, background last; computed once
        while evaluating.
        """
        if self.cached_embeddings is not None:
            return self.cached_embeddings
        embeddings: Tensor = self.prompts()
        if self.config.background == "learned":
            background = F.normalize(embeddings[-1] + self.background, dim=0)
            embeddings = torch.cat([embeddings[:-1], background[None]])
        if not self.training:
            self.cached_embeddings = embeddings.detach()
        return embeddings

    def prepare(
        self, images: Sequence[Tensor], at_least: tuple[int, int] = (0, 0)
    ) -> Images:
        """Normalise uint8 images [3, H, W] of any sizes into one batch, padded to a
        multiple of 32 that holds all of them and ``at_least`` (H, W).
        """
        sizes = tuple((int(i.shape[1]), int(i.shape[2])) for i in images)
        height = _round_up(max(at_least[0], *(h for h, _ in sizes)), 32)
        width = _round_up(max(at_least[1], *(w for _, w in sizes)), 32)
        pixels = self.mean.new_zeros(len(images), 3, height, width)
        for padded, image in zip(pixels, images, strict=True):
            inside = padded[:, : image.shape[1], : image.shape[2]]
            inside.copy_(image).div_(255).sub_(self.mean).div_(self.std)
        return Images(pixels, sizes)

    def propose(self, images: Images) -> tuple[Tensor, RpnOutputs]:
        """Return shared features [B, C3, H/16, W/16], and proposals."""
        shared = self.tower.shared(images.pixels)
        return shared, self.rpn(shared, images)

    def describe(self, shared: Tensor, boxes: Sequence[Tensor]) -> RegionOutputs:
        side = self.config.roi_size
        pooled = pool_regions(shared, boxes, side, STRIDE, self.config.roi_samples)
        features = self.tower.regional(pooled)
        regions: RegionOutputs = self.head(features, self.class_embeddings())
        return regions.float()

    @torch.no_grad()
    def predict(self, images: Images) -> list[Detections]:
        shared, rpn = self.propose(images)
        regions = self.describe(shared, rpn.boxes)
        counts = [len(boxes) for boxes in rpn.boxes]
        probabilities = regions.logits.float().softmax(-1).split(counts)
        deltas = regions.deltas.float().split(counts)
        detections = []
        for image, proposals in enumerate(rpn.boxes):
            boxes = box_ops.decode_boxes(deltas[image], proposals)
            size = images.sizes[image]
            detections.append(
                postprocess_detections(boxes, probabilities[image], size, self.config)
            )
        return detections


def postprocess_detections(
    boxes: Tensor, probabilities: Tensor, size: tuple[int, int], config: Detector
) -> Detections:
    """Return a detection for each foreground class above ``score_min`` in
    ``probabilities`` [R, K+1] of each box [R, 4], after class-wise NMS, best first.

    One box may carry several classes. Boxes are clipped to an image of ``size``
    (height, width).
    """
    boxes = clip_boxes_to_image(boxes, size)
    is_candidate = probabilities[:, :-1] > config.score_min
    regions, labels = is_candidate.nonzero(as_tuple=True)
    scores = probabilities[regions, labels]
    rows = batched_nms(boxes[regions], scores, labels, config.nms)[: config.detections]
    regions = regions[rows]
    return Detections(
        boxes[regions], scores[rows], labels[rows], probabilities[regions]
    )


def build_detector(
    backbone: BackboneModel, classes: Sequence[str], config: Detector, *, seed: int
) -> ClipDetector:
    """Build a detector with the backbone's visual weights and class embeddings;
    everything else is drawn from ``seed``.
    """
    torch.manual_seed(seed)
    prompts = new_embeddings(backbone, classes, config)
    tower = new_tower(backbone, config)
    return ClipDetector(
        tower,
        prompts,
        len(classes),
        backbone.embedding_size,
        config,
        backbone.mean,
        backbone.std,
    )


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
