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
from coin_ray.models.base import Images, Proposed, Regions
from coin_ray.models.faster_rcnn_clip.backbone import (
    Backbone,
    new_embeddings,
    new_tower,
)
from coin_ray.models.faster_rcnn_clip.pooling import pool_regions
from coin_ray.models.faster_rcnn_clip.rpn import RegionProposals
from coin_ray.models.faster_rcnn_clip.tower import Tower
from coin_ray.structures import Detections

STRIDE = 16


class Transformation(nn.Module):
    """The paper's Trans: a three-layer MLP [R, C] -> [R, C] between pooled RoI features
    and the two output layers.
    """

    def __init__(self, channels: int, residual: bool) -> None:
        super().__init__()
        hidden, self.residual = channels // 2, residual
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
        moved: Tensor = self.layers(x)
        return x + moved if self.residual else moved


class RegionHead(nn.Module):
    """Pooled features [R, C] -> embedding, class logits = cosine to class embeddings /
    tau, class-agnostic box deltas.
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

    def forward(self, pooled: Tensor, class_embeddings: Tensor) -> Regions:
        transformed = self.transformation(pooled)
        embedded = F.normalize(self.embed(transformed), dim=-1)
        return Regions(
            pooled,
            embedded,
            embedded @ class_embeddings.T / self.temperature,
            self.box(transformed),
            class_embeddings,
        )


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
        self.config, self.num_classes = config, num_classes
        self.tower = tower
        self.rpn = RegionProposals(self.tower.shared_channels, config)
        self.head = RegionHead(self.tower.regional_channels, embedding_size, config)
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
        """[K+1, D] unit length, background last; computed once while evaluating."""
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
        """uint8 images [3, H, W] of any sizes -> one normalised batch, padded to a
        multiple of 32 that holds all and ``at_least`` (H, W).
        """
        height = -(-max(at_least[0], *(i.shape[1] for i in images)) // 32) * 32
        width = -(-max(at_least[1], *(i.shape[2] for i in images)) // 32) * 32
        pixels = self.mean.new_zeros(len(images), 3, height, width)
        for row, image in zip(pixels, images, strict=True):
            row[:, : image.shape[1], : image.shape[2]] = (
                image.to(self.mean.device).float() / 255 - self.mean
            ) / self.std
        return Images(pixels, tuple((int(i.shape[1]), int(i.shape[2])) for i in images))

    def propose(self, images: Images) -> tuple[Tensor, Proposed]:
        """Shared features [B, C3, H/16, W/16] and proposals."""
        shared = self.tower.shared(images.pixels)
        return shared, self.rpn(shared, images)

    def describe(self, shared: Tensor, boxes: Sequence[Tensor]) -> Regions:
        side = self.config.roi_size
        pooled = pool_regions(shared, boxes, side, STRIDE, self.config.roi_samples)
        regions: Regions = self.head(
            self.tower.regional(pooled), self.class_embeddings()
        )
        return regions.float()

    @torch.no_grad()
    def predict(self, images: Images) -> list[Detections]:
        shared, proposed = self.propose(images)
        regions = self.describe(shared, proposed.boxes)
        counts = [len(b) for b in proposed.boxes]
        probabilities = regions.logits.float().softmax(-1).split(counts)
        deltas = regions.deltas.float().split(counts)
        return [
            every_name(box_ops.decode(d, b), p, size, self.config)
            for d, b, p, size in zip(
                deltas, proposed.boxes, probabilities, images.sizes, strict=True
            )
        ]


def every_name(
    boxes: Tensor, probabilities: Tensor, size: tuple[int, int], config: Detector
) -> Detections:
    """Every foreground class above ``score_min`` of every box [R, 4] in
    ``probabilities`` [R, K+1], class-wise NMS, best first.

    One box may carry several classes. Boxes are cut at the border of an image of
    ``size`` (height, width).
    """
    boxes = clip_boxes_to_image(boxes, size)
    region, label = (probabilities[:, :-1] > config.score_min).nonzero(as_tuple=True)
    scores = probabilities[region, label]
    kept = batched_nms(boxes[region], scores, label, config.nms)[: config.detections]
    return Detections(
        boxes[region[kept]], scores[kept], label[kept], probabilities[region[kept]]
    )


def build_detector(
    backbone: Backbone, classes: Sequence[str], config: Detector, *, seed: int
) -> ClipDetector:
    """A fresh detector: the backbone's visual weights and class embeddings, everything
    else drawn from ``seed``.
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
