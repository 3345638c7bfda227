"""An auxiliary head that describes given boxes on the feature maps of a student. It
exists in training only, as in collaborative training (Co-DETR, Zong et al. 2023, section
3.2): its losses reach the student's maps, and the student is delivered without it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coin_ray import boxes as box_ops
from coin_ray.config import Detector
from coin_ray.models.base import RegionOutputs
from coin_ray.models.faster_rcnn_clip.model import EmbeddingHead
from coin_ray.models.faster_rcnn_clip.pooling import pool_regions
from coin_ray.models.students.base import PyramidMaps, PyramidStudent

EMBEDDING_SIZE = 64
POOLED_SIDE, POOLED_SAMPLES = 4, 2


class AuxiliaryRegionHead(nn.Module):
    """Pools a box from every map of a student, and gives it an embedding, class logits
    and box deltas. Classes are embeddings of its own, at first at right angles.
    """

    def __init__(self, student: PyramidStudent, config: Detector) -> None:
        super().__init__()
        self.strides = student.map_strides
        self.head = EmbeddingHead(sum(student.map_channels), EMBEDDING_SIZE, config)
        classes = torch.empty(student.num_classes + 1, EMBEDDING_SIZE)
        self.classes = nn.Parameter(nn.init.orthogonal_(classes))

    def class_embeddings(self) -> Tensor:
        """Return class embeddings [K+1, D], unit length, background last."""
        return F.normalize(self.classes, dim=-1)

    def forward(
        self, extracted: PyramidMaps, images: Sequence[Tensor], boxes: Sequence[Tensor]
    ) -> RegionOutputs:
        """Describe boxes [R, 4] of each image, in pixels of ``images`` [3, H, W]."""
        in_input = [
            box_ops.scale_boxes(
                image_boxes, size[1] / image.shape[2], size[0] / image.shape[1]
            )
            for image_boxes, image, size in zip(
                boxes, images, extracted.sizes, strict=True
            )
        ]
        pooled = [
            pool_regions(
                maps.float(), in_input, POOLED_SIDE, stride, POOLED_SAMPLES
            ).mean((2, 3))
            for maps, stride in zip(extracted.maps, self.strides, strict=True)
        ]
        regions: RegionOutputs = self.head(
            torch.cat(pooled, 1), self.class_embeddings()
        )
        return regions.float()
