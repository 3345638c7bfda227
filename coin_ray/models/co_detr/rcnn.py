"""Faster R-CNN as an auxiliary head: region proposals on all levels of the pyramid, and
a second stage of two layers on the features pooled there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import (
    batched_nms,
    box_iou,
    clip_boxes_to_image,
    generalized_box_iou_loss,
    remove_small_boxes,
    roi_align,
)

from coin_ray import boxes as box_ops
from coin_ray.config.co_detr import CoDetr
from coin_ray.models.base import RpnOutputs
from coin_ray.models.co_detr.agreement import deduplicate_detections
from coin_ray.models.co_detr.auxiliary import HeadOutputs, Positives, sample_balanced
from coin_ray.models.co_detr.criterion import count_over_workers
from coin_ray.models.co_detr.pyramid import (
    Anchors,
    Maps,
    flatten_levels,
    place_anchors,
    rpn_anchors,
)
from coin_ray.models.co_detr.targets import DetrTargets, Size, is_covered
from coin_ray.structures import Detections

POSITIVE, NEGATIVE, LOW_QUALITY = 0.7, 0.3, 0.3
"""An anchor is an object from the first overlap on and background below the second; an
object's best anchor is assigned to it from the third on."""
REGION_POSITIVE = NMS_IOU = 0.5
UNUSED, BACKGROUND = -2, -1


class Rcnn(nn.Module):
    weights: ClassVar[dict[str, float]] = {
        "proposal_class": 1.0,
        "proposal_l1": 1.0,
        "class": 1.0,
        "giou": 10.0,
    }
    """Weight of each loss in the sum of this head's losses."""

    def __init__(self, config: CoDetr, classes: int) -> None:
        super().__init__()
        self.config = config
        self.proposals = RegionProposals(config)
        self.regions = RegionHead(config, classes)

    def forward(
        self,
        maps: Maps,
        targets: Sequence[DetrTargets],
        generator: torch.Generator | None = None,
    ) -> HeadOutputs:
        """Return the losses and the positive proposals of a batch; ``generator`` draws
        the sampled anchors and regions.
        """
        losses, proposals = self.proposals(maps, targets, generator)
        regions = [
            sample_regions(boxes, image_targets, self.config, generator)
            for boxes, image_targets in zip(proposals, targets, strict=True)
        ]
        pooled = self._pool(maps, [image_regions.boxes for image_regions in regions])
        losses = losses | self.regions.losses(pooled, regions, targets)
        return HeadOutputs(losses, _positives(pooled, regions, targets))

    @torch.no_grad()
    def predict(self, maps: Maps) -> list[Detections]:
        """Return this head's own detections: proposals, classified and refined by the
        second stage.
        """
        proposals = self.proposals.propose(maps).boxes
        counts = [len(boxes) for boxes in proposals]
        logits, deltas = self.regions(self._pool(maps, proposals))
        per_image = zip(
            proposals,
            logits.softmax(1).split(counts),
            deltas.split(counts),
            maps.sizes,
            strict=True,
        )
        return [
            deduplicate_detections(
                _decode_all(boxes, image_deltas),
                probs[:, :-1],
                probs,
                size,
                NMS_IOU,
                self.config.detections,
            )
            for boxes, probs, image_deltas, size in per_image
        ]

    def _pool(self, maps: Maps, boxes: Sequence[Tensor]) -> Tensor:
        return pool_levels(maps, boxes, self.config.roi_size, self.config.roi_sampling)


def _decode_all(boxes: Tensor, deltas: Tensor) -> Tensor:
    """Decode deltas [P, n, 4] of boxes [P, 4] to boxes [P, n, 4]."""
    columns = deltas.shape[1]
    repeated = boxes.repeat_interleave(columns, 0)
    decoded = box_ops.decode_boxes(deltas.flatten(0, 1), repeated)
    per_box: Tensor = decoded.unflatten(0, (-1, columns))
    return per_box


class RegionProposals(nn.Module):
    def __init__(self, config: CoDetr) -> None:
        super().__init__()
        self.config = config
        self.conv = nn.Conv2d(config.width, config.width, 3, padding=1)
        self.objectness = nn.Conv2d(config.width, 9, 1)
        self.deltas = nn.Conv2d(config.width, 36, 1)
        for layer in (self.conv, self.objectness, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(
        self,
        maps: Maps,
        targets: Sequence[DetrTargets],
        generator: torch.Generator | None = None,
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Return the losses, and proposals [P, 4] (xyxy pixels, no gradient) of each
        image.
        """
        anchors, outputs = self._predict(maps)
        losses = self._losses(
            anchors, outputs.objectness, outputs.deltas, targets, generator
        )
        return losses, outputs.boxes

    def propose(self, maps: Maps) -> RpnOutputs:
        """Return the same proposals without a loss."""
        return self._predict(maps)[1]

    def _predict(self, maps: Maps) -> tuple[Anchors, RpnOutputs]:
        hidden = [self.conv(m).relu() for m in maps.levels]
        objectness = flatten_levels([self.objectness(h) for h in hidden], 1)[..., 0]
        deltas = flatten_levels([self.deltas(h) for h in hidden], 4)
        anchors = place_anchors(maps, [rpn_anchors(s) for s in maps.strides])
        # decode_boxes divides by these; this head's deltas are not scaled
        delta_weights = deltas.new_tensor(box_ops.DELTA_WEIGHTS)
        proposals = []
        for image, size in enumerate(maps.sizes):
            image_deltas = deltas[image].detach() * delta_weights
            outside = ~anchors.inside[image]
            boxes = box_ops.decode_boxes(image_deltas, anchors.boxes)
            scores = objectness[image].detach().masked_fill(outside, -torch.inf)
            proposals.append(self._filter(boxes, scores, anchors.levels, size))
        return anchors, RpnOutputs(anchors.boxes, objectness, deltas, proposals)

    def _losses(
        self,
        anchors: Anchors,
        objectness: Tensor,
        deltas: Tensor,
        targets: Sequence[DetrTargets],
        generator: torch.Generator | None,
    ) -> dict[str, Tensor]:
        entropy, distance = objectness.new_zeros(()), objectness.new_zeros(())
        count = 0
        delta_weights = deltas.new_tensor(box_ops.DELTA_WEIGHTS)
        for image, target in enumerate(targets):
            objects = assign_anchors(
                anchors.boxes, anchors.inside[image], target.boxes, target.ignored_boxes
            )
            positive, negative = sample_balanced(
                (objects >= 0).nonzero()[:, 0],
                (objects == BACKGROUND).nonzero()[:, 0],
                self.config.rpn_samples,
                0.5,
                generator,
            )
            logits = objectness[image, torch.cat([positive, negative])]
            rows = torch.arange(len(logits), device=logits.device)
            is_object = (rows < len(positive)).to(logits)
            matched = objects[positive]
            positive_weights = target.object_weights[matched]
            negative_weights = torch.ones_like(negative, dtype=positive_weights.dtype)
            weights = torch.cat([positive_weights, negative_weights])
            entropy = entropy + F.binary_cross_entropy_with_logits(
                logits, is_object, weights, reduction="sum"
            )
            scaled_deltas = box_ops.encode_boxes(
                target.boxes[matched], anchors.boxes[positive]
            )
            errors = (deltas[image, positive] - scaled_deltas / delta_weights).abs()
            distance = distance + (errors * positive_weights[:, None]).sum()
            count += len(logits)
        total = count_over_workers(torch.tensor(count, device=objectness.device))
        return {"proposal_class": entropy / total, "proposal_l1": distance / total}

    def _filter(
        self, boxes: Tensor, scores: Tensor, levels: Tensor, size: Size
    ) -> Tensor:
        """Return the best boxes of each level after NMS within it; of these the best
        of all levels.
        """
        best = []
        for level in range(int(levels[-1]) + 1):
            level_rows = (levels == level).nonzero()[:, 0]
            count = min(self.config.proposals_per_level, len(level_rows))
            best.append(level_rows[scores[level_rows].topk(count).indices])
        rows = torch.cat(best)
        rows = rows[scores[rows].isfinite()]
        boxes = clip_boxes_to_image(boxes[rows], size)
        scores, levels = scores[rows], levels[rows]
        large = remove_small_boxes(boxes, 1e-3)
        order = batched_nms(
            boxes[large], scores[large], levels[large], self.config.rpn_nms
        )
        return boxes[large[order][: self.config.proposals]]


@torch.no_grad()
def assign_anchors(
    anchors: Tensor, inside: Tensor, boxes: Tensor, ignored: Tensor
) -> Tensor:
    """Return [A]: the object assigned to each anchor, BACKGROUND, or UNUSED (in
    between, in an ``ignored`` region, or not ``inside``).
    """
    is_ignored = is_covered(anchors, ignored)
    if not len(boxes):
        return torch.where(inside & ~is_ignored, BACKGROUND, UNUSED)
    overlaps = box_iou(boxes, anchors).masked_fill(~inside, -1.0)
    best, best_object = overlaps.max(0)
    below = torch.where(best < NEGATIVE, BACKGROUND, UNUSED)
    objects = torch.where(best >= POSITIVE, best_object, below)
    highest = overlaps.max(1, keepdim=True).values
    is_best_anchor = (overlaps == highest) & (highest >= LOW_QUALITY)
    numbers = torch.arange(len(boxes), device=boxes.device)[:, None]
    last_object = torch.where(is_best_anchor, numbers, UNUSED).max(0).values
    objects = torch.where(last_object >= 0, last_object, objects)
    objects = torch.where((objects == BACKGROUND) & is_ignored, UNUSED, objects)
    return torch.where(inside, objects, UNUSED)


@dataclass(frozen=True, slots=True, eq=False)
class SampledRegions:
    """Sampled proposals ``boxes`` [R, 4] of one image, those on objects first, and
    ``objects`` [P]: the object of each of these.
    """

    boxes: Tensor
    objects: Tensor

    @property
    def background_count(self) -> int:
        return len(self.boxes) - len(self.objects)


@torch.no_grad()
def sample_regions(
    proposals: Tensor,
    targets: DetrTargets,
    config: CoDetr,
    generator: torch.Generator | None,
) -> SampledRegions:
    """Sample among proposals and the objects' own boxes: positive where they overlap an
    object by half, background elsewhere.
    """
    boxes = torch.cat([targets.boxes, proposals])
    if len(targets.boxes):
        best, best_object = box_iou(targets.boxes, boxes).max(0)
    else:
        best = boxes.new_zeros(len(boxes))
        best_object = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    is_ignored = is_covered(boxes, targets.ignored_boxes)
    is_background = (best < REGION_POSITIVE) & ~is_ignored
    positive, negative = sample_balanced(
        (best >= REGION_POSITIVE).nonzero()[:, 0],
        is_background.nonzero()[:, 0],
        config.roi_samples,
        config.roi_positive,
        generator,
    )
    return SampledRegions(boxes[torch.cat([positive, negative])], best_object[positive])


def pool_levels(
    maps: Maps, boxes: Sequence[Tensor], side: int, sampling: int
) -> Tensor:
    """Pool RoI features [R, d, side, side] of boxes [N, 4] per image, concatenated; the
    coarsest map is not used.

    A box is pooled from the level on which it is 14 to 28 cells wide (FPN, arXiv
    1612.03144, eq. 1).
    """
    images = [
        torch.full((len(image_boxes),), image, device=image_boxes.device)
        for image, image_boxes in enumerate(boxes)
    ]
    image_column = torch.cat(images)[:, None].float()
    rois = torch.cat([image_column, torch.cat(list(boxes))], 1)
    level_count = len(maps.levels) - 1
    levels = pooling_level(rois[:, 1:], maps.strides[0], level_count)
    pooled_levels, rows = [], []
    for level in range(level_count):
        level_rows = (levels == level).nonzero()[:, 0]
        rows.append(level_rows)
        pooled_levels.append(
            roi_align(
                maps.levels[level].float(),
                rois[level_rows],
                side,
                1 / maps.strides[level],
                sampling or -1,
                aligned=True,
            )
        )
    pooled: Tensor = torch.cat(pooled_levels)[torch.cat(rows).argsort()]
    return pooled


def pooling_level(boxes: Tensor, first_stride: int, levels: int) -> Tensor:
    """Return [R]: floor(log2(sqrt(area) / (14 * first stride))), clamped to 0..levels -
    1.
    """
    side = (boxes[:, 2:] - boxes[:, :2]).prod(1).clamp(min=1e-6).sqrt()
    return (side / (14 * first_stride)).log2().floor().clamp(0, levels - 1).long()


class RegionHead(nn.Module):
    """Maps pooled features to class logits [R, C+1], background last, and box deltas."""

    def __init__(self, config: CoDetr, classes: int) -> None:
        super().__init__()
        self.classes, self.agnostic = classes, config.roi_boxes == "agnostic"
        inputs, hidden = config.width * config.roi_size**2, config.roi_width
        self.layers = nn.Sequential(
            nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
        )
        self.classify = nn.Linear(hidden, classes + 1)
        self.regress = nn.Linear(hidden, 4 if self.agnostic else 4 * classes)
        for layer in (self.layers[0], self.layers[2]):
            nn.init.xavier_uniform_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        for layer, std in ((self.classify, 0.01), (self.regress, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [R, C+1] and deltas [R, C or 1, 4]."""
        hidden = self.layers(pooled.flatten(1))
        deltas = self.regress(hidden).float().unflatten(1, (-1, 4))
        return self.classify(hidden).float(), deltas

    def losses(
        self,
        pooled: Tensor,
        regions: Sequence[SampledRegions],
        targets: Sequence[DetrTargets],
    ) -> dict[str, Tensor]:
        """Return ``class`` and ``giou``, unweighted, over all sampled regions."""
        logits, deltas = self(pooled)
        pairs = list(zip(regions, targets, strict=True))
        labels = torch.cat(
            [_region_labels(r, t.labels, self.classes) for r, t in pairs]
        )
        weights = torch.cat([_region_weights(r, t) for r, t in pairs])
        truth = torch.cat([t.boxes[r.objects] for r, t in pairs])
        boxes = torch.cat([r.boxes for r in regions])
        rows = (labels < self.classes).nonzero()[:, 0]
        columns = 0 if self.agnostic else labels[rows]
        predicted = box_ops.decode_boxes(deltas[rows, columns], boxes[rows])
        count = count_over_workers(torch.tensor(len(labels), device=logits.device))
        entropy = F.cross_entropy(logits, labels, reduction="none")
        giou = generalized_box_iou_loss(predicted, truth)
        return {
            "class": (entropy * weights).sum() / count,
            "giou": (giou * weights[rows]).sum() / count,
        }


def _region_labels(regions: SampledRegions, labels: Tensor, background: int) -> Tensor:
    background_labels = labels.new_full((regions.background_count,), background)
    return torch.cat([labels[regions.objects], background_labels])


def _region_weights(regions: SampledRegions, targets: DetrTargets) -> Tensor:
    ones = torch.ones(regions.background_count, device=regions.boxes.device)
    return torch.cat([targets.object_weights[regions.objects], ones])


def _positives(
    pooled: Tensor, regions: Sequence[SampledRegions], targets: Sequence[DetrTargets]
) -> list[Positives]:
    means = pooled.mean((2, 3)).split([len(r.boxes) for r in regions])
    positives = []
    for image_regions, target, features in zip(regions, targets, means, strict=True):
        objects = image_regions.objects
        count = len(objects)
        positives.append(
            Positives(
                image_regions.boxes[:count],
                target.boxes[objects],
                target.labels[objects],
                features[:count],
                target.object_weights[objects],
            )
        )
    return positives
