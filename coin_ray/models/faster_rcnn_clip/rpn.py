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
from coin_ray.models.base import Images, RpnOutputs

FIRST_BOXES = 2
"""Boxes for each proposal that NMS tries first."""


class RegionProposalNetwork(nn.Module):
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

    def forward(self, shared: Tensor, images: Images) -> RpnOutputs:
        hidden = self.conv(shared).relu()
        objectness = self.objectness(hidden).permute(0, 2, 3, 1).flatten(1).float()
        deltas = self.deltas(hidden).permute(0, 2, 3, 1)
        deltas = deltas.reshape(len(shared), -1, 4).float()
        image_list = ImageList(images.pixels, list(images.sizes))
        anchors = self.anchor_generator(image_list, [shared])[0]
        proposals = self._filter_proposals(
            anchors, objectness.detach(), deltas.detach(), images.sizes
        )
        return RpnOutputs(anchors, objectness, deltas, proposals)

    def _filter_proposals(
        self,
        anchors: Tensor,
        objectness: Tensor,
        deltas: Tensor,
        sizes: Sequence[tuple[int, int]],
    ) -> list[Tensor]:
        """Decode the best anchors of each image, remove tiny boxes, and apply NMS."""
        config = self.config
        limit = config.proposals_train if self.training else config.proposals_test
        default_weights = deltas.new_tensor(box_ops.DELTA_WEIGHTS)
        scale = deltas.new_tensor(config.anchor_weights) / default_weights
        best = objectness.topk(min(6 * limit, objectness.shape[1]), 1)
        rows = best.indices.flatten()
        best_deltas = deltas.gather(1, best.indices[..., None].expand(-1, -1, 4))
        decoded = box_ops.decode_boxes(best_deltas.view(-1, 4) / scale, anchors[rows])
        proposals = []
        for boxes, scores, size in zip(
            decoded.view(best_deltas.shape), best.values, sizes, strict=True
        ):
            boxes = clip_boxes_to_image(boxes, size)
            large = remove_small_boxes(boxes, 1.0)
            boxes, scores = boxes[large], scores[large]
            proposals.append(boxes[_best_by_nms(boxes, scores, config.rpn_nms, limit)])
        return proposals


def _best_by_nms(boxes: Tensor, scores: Tensor, iou_max: float, limit: int) -> Tensor:
    """Return the first ``limit`` rows that NMS keeps of ``boxes`` [N, 4], whose
    ``scores`` [N] fall.

    Whether a box is kept depends on those before it only, and time grows with the
    square of their number: mostly the first few are enough.
    """
    for count in (FIRST_BOXES * limit, len(boxes)):
        rows: Tensor = nms(boxes[:count], scores[:count], iou_max)
        if len(rows) >= limit or count >= len(boxes):
            break
    return rows[:limit]


def inside_image(anchors: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a mask [A] of the anchors [A, 4] whose centre lies in the image of ``size``
    (height, width), not in its padding.
    """
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2
    height, width = size
    is_inside = (centre[:, 0] < width) & (centre[:, 1] < height)
    return is_inside & torch.isfinite(centre).all(1)
