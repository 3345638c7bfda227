"""Region proposals on one stride-16 map. Anchors, head and proposal filtering are
torchvision's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import clip_boxes_to_image, nms, remove_small_boxes

from coin_ray import boxes as box_ops
from coin_ray.config import Detector
from coin_ray.models.base import Images, Proposed


class RegionProposals(nn.Module):
    def __init__(self, channels: int, config: Detector) -> None:
        super().__init__()
        self.config = config
        self.anchor_generator = AnchorGenerator(
            (config.anchor_sizes,), (config.anchor_ratios,)
        )
        count = self.anchor_generator.num_anchors_per_location()[0]
        self.conv = nn.Conv2d(channels, config.rpn_width, 3, padding=1)
        self.objectness = nn.Conv2d(config.rpn_width, count, 1)
        self.deltas = nn.Conv2d(config.rpn_width, 4 * count, 1)
        for layer in (self.conv, self.objectness, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, shared: Tensor, images: Images) -> Proposed:
        hidden = self.conv(shared).relu()
        objectness = self.objectness(hidden).permute(0, 2, 3, 1).flatten(1).float()
        deltas = (
            self.deltas(hidden).permute(0, 2, 3, 1).reshape(len(shared), -1, 4).float()
        )
        anchors = self.anchor_generator(
            ImageList(images.pixels, list(images.sizes)), [shared]
        )[0]
        return Proposed(
            anchors,
            objectness,
            deltas,
            self._filter(anchors, objectness.detach(), deltas.detach(), images.sizes),
        )

    def _filter(
        self,
        anchors: Tensor,
        objectness: Tensor,
        deltas: Tensor,
        sizes: Sequence[tuple[int, int]],
    ) -> list[Tensor]:
        limit = (
            self.config.proposals_train if self.training else self.config.proposals_test
        )
        scale = deltas.new_tensor(self.config.anchor_weights) / deltas.new_tensor(
            box_ops.DELTA_WEIGHTS
        )
        kept = []
        for scores, moves, size in zip(objectness, deltas, sizes, strict=True):
            best = scores.topk(min(6 * limit, len(scores))).indices
            candidates = clip_boxes_to_image(
                box_ops.decode(moves[best] / scale, anchors[best]), size
            )
            large = remove_small_boxes(candidates, 1.0)
            chosen = large[
                nms(candidates[large], scores[best][large], self.config.rpn_nms)[:limit]
            ]
            kept.append(candidates[chosen])
        return kept


def inside(anchors: Tensor, size: tuple[int, int]) -> Tensor:
    """Anchors [A, 4] whose centre lies in the image, not in its padding: [A] bool."""
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2
    return (
        (centre[:, 0] < size[1])
        & (centre[:, 1] < size[0])
        & torch.isfinite(centre).all(1)
    )
