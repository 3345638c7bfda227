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
        proposals = []
        for scores, image_deltas, size in zip(objectness, deltas, sizes, strict=True):
            best = scores.topk(min(6 * limit, len(scores))).indices
            boxes = box_ops.decode_boxes(image_deltas[best] / scale, anchors[best])
            boxes = clip_boxes_to_image(boxes, size)
            large = remove_small_boxes(boxes, 1.0)
            rows = nms(boxes[large], scores[best][large], config.rpn_nms)[:limit]
            proposals.append(boxes[large[rows]])
        return proposals


def inside_image(anchors: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a mask [A] of the anchors [A, 4] whose centre lies in the image of ``size``
    (height, width), not in its padding.
    """
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2
    height, width = size
    is_inside = (centre[:, 0] < width) & (centre[:, 1] < height)
    return is_inside & torch.isfinite(centre).all(1)
