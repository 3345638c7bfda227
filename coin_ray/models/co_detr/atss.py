"""ATSS (arXiv 1912.02424) as an auxiliary head: one square anchor per cell; each object
selects its anchors by a threshold on the overlaps of its nearest candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_iou, generalized_box_iou_loss, sigmoid_focal_loss

from coin_ray import boxes as box_ops
from coin_ray.config.co_detr import CoDetr
from coin_ray.models.co_detr.agreement import deduplicate_detections
from coin_ray.models.co_detr.auxiliary import HeadOutputs, Positives
from coin_ray.models.co_detr.criterion import ALPHA, GAMMA, count_over_workers
from coin_ray.models.co_detr.decoder import PRIOR_LOGIT
from coin_ray.models.co_detr.model import append_background
from coin_ray.models.co_detr.neck import group_norm
from coin_ray.models.co_detr.pyramid import (
    Anchors,
    Maps,
    atss_anchor,
    flatten_levels,
    place_anchors,
)
from coin_ray.models.co_detr.targets import DetrTargets, is_covered
from coin_ray.structures import Detections

NO_OBJECT = -1
NMS_IOU = 0.6
"""IoU above which two detections of one class are duplicates."""
BORDER = 0.01
"""Pixels by which an anchor's centre must lie inside its object."""


class Atss(nn.Module):
    weights: ClassVar[dict[str, float]] = {"class": 1.0, "giou": 2.0, "centerness": 1.0}
    """Weight of each loss in the sum of this head's losses."""

    def __init__(self, config: CoDetr, classes: int, levels: int | None = None) -> None:
        super().__init__()
        self.candidates = config.atss_candidates
        self.classes = classes
        self.detections = config.detections
        self.class_tower, self.box_tower = _tower(config.width), _tower(config.width)
        self.classify = _conv(config.width, classes, PRIOR_LOGIT)
        self.regress = _conv(config.width, 4)
        self.centre = _conv(config.width, 1)
        self.scales = nn.Parameter(torch.ones(levels or config.levels + 1))

    def forward(
        self,
        maps: Maps,
        targets: Sequence[DetrTargets],
        generator: torch.Generator | None = None,
    ) -> HeadOutputs:
        """Return the losses and the positive anchors of a batch; ``generator`` is
        unused, as nothing is sampled.
        """
        anchors = _place_square_anchors(maps)
        objects = assign_objects(
            anchors.boxes,
            anchors.levels,
            anchors.inside,
            [t.boxes for t in targets],
            self.candidates,
        )
        losses = self._losses(maps, anchors, objects, targets)
        return HeadOutputs(losses, _positives(maps, anchors, objects, targets))

    @torch.no_grad()
    def predict(self, maps: Maps) -> list[Detections]:
        """Return this head's own detections; scores are class times centerness."""
        anchors = _place_square_anchors(maps)
        logits, deltas, centerness_logits = self._predict(maps)
        scores = logits.sigmoid() * centerness_logits.sigmoid()
        scores = scores * anchors.inside[..., None]
        detections = []
        for image, size in enumerate(maps.sizes):
            boxes = box_ops.decode_boxes(deltas[image], anchors.boxes)
            detections.append(
                deduplicate_detections(
                    boxes[:, None],
                    scores[image],
                    append_background(scores[image]),
                    size,
                    NMS_IOU,
                    self.detections,
                )
            )
        return detections

    def _losses(
        self,
        maps: Maps,
        anchors: Anchors,
        objects: Sequence[Tensor],
        targets: Sequence[DetrTargets],
    ) -> dict[str, Tensor]:
        """Return the unweighted losses; ``objects`` [A] per image, as of
        ``assign_objects``.
        """
        logits, deltas, centerness_logits = self._predict(maps)
        pairs = list(zip(objects, targets, strict=True))
        labels = torch.stack(
            [_anchor_labels(rows, t.labels, self.classes) for rows, t in pairs]
        )
        weights = torch.stack(
            [_anchor_weights(rows, t, anchors.boxes) for rows, t in pairs]
        )
        weights = weights * anchors.inside
        truth = torch.cat([t.boxes[rows[rows != NO_OBJECT]] for rows, t in pairs])
        image, row = (labels < self.classes).nonzero(as_tuple=True)
        positive_weights = weights[image, row]
        positive_anchors = anchors.boxes[row]
        target_centerness = centerness(positive_anchors, truth)
        predicted = box_ops.decode_boxes(deltas[image, row], positive_anchors)
        one_hot = F.one_hot(labels, self.classes + 1)[..., :-1].to(logits)
        focal = sigmoid_focal_loss(logits, one_hot, ALPHA, GAMMA) * weights[..., None]
        giou = generalized_box_iou_loss(predicted, truth)
        entropy = F.binary_cross_entropy_with_logits(
            centerness_logits[image, row, 0], target_centerness, reduction="none"
        )
        positives_per_image = (labels < self.classes).sum(1)
        count = count_over_workers(positives_per_image.clamp(min=1).sum())
        centerness_sum = count_over_workers(target_centerness.sum())
        weighted_giou = giou * target_centerness * positive_weights
        return {
            "class": focal.sum() / count,
            "giou": weighted_giou.sum() / centerness_sum,
            "centerness": (entropy * positive_weights).sum() / count,
        }

    def _predict(self, maps: Maps) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits [B, A, C], deltas [B, A, 4], centerness logits [B, A, 1]."""
        box_features = [self.box_tower(m) for m in maps.levels]
        logits = [self.classify(self.class_tower(m)) for m in maps.levels]
        deltas = [
            self.regress(features) * scale
            for features, scale in zip(box_features, self.scales, strict=True)
        ]
        centerness_logits = [self.centre(features) for features in box_features]
        return (
            flatten_levels(logits, self.classes),
            flatten_levels(deltas, 4),
            flatten_levels(centerness_logits, 1),
        )


def _place_square_anchors(maps: Maps) -> Anchors:
    return place_anchors(maps, [atss_anchor(stride) for stride in maps.strides])


@torch.no_grad()
def assign_objects(
    anchors: Tensor,
    levels: Tensor,
    inside: Tensor,
    boxes: Sequence[Tensor],
    candidates: int,
) -> list[Tensor]:
    """Return [A] per image: the object assigned to each anchor, or NO_OBJECT.

    An object's candidates are the ``candidates`` anchors of each level whose centres
    are closest to its own, among those ``inside`` [B, A] its image. Of them it takes
    those that overlap it at least by mean + standard deviation of all candidates'
    overlaps and have their centre in it. An anchor that several objects take goes to
    the one it overlaps most. All images are done at once: their anchors are the same.
    """
    all_boxes = torch.cat(list(boxes))
    counts = [len(image_boxes) for image_boxes in boxes]
    unassigned = torch.full((len(anchors),), NO_OBJECT, device=anchors.device)
    if not len(all_boxes):
        return [unassigned] * len(boxes)
    image = torch.repeat_interleave(torch.tensor(counts, device=anchors.device))
    nearest, usable = _nearest_anchors(
        anchors, levels, inside[image], all_boxes, candidates
    )
    iou = box_iou(all_boxes, anchors).gather(1, nearest)
    above_threshold = iou >= _overlap_threshold(iou, usable)
    has_centre_inside = _centre_in(anchors[nearest], all_boxes[:, None])
    is_positive = usable & above_threshold & has_centre_inside
    overlaps = anchors.new_full((len(all_boxes), len(anchors)), -1.0)
    overlaps.scatter_(1, nearest, torch.where(is_positive, iou, -1.0))
    return [
        _object_of_most_overlap(image_overlaps) if len(image_overlaps) else unassigned
        for image_overlaps in overlaps.split(counts)
    ]


def _overlap_threshold(iou: Tensor, usable: Tensor) -> Tensor:
    """Return [N, 1]: mean + standard deviation (of the sample) of each row's usable
    overlaps [N, M].
    """
    count = usable.sum(1, keepdim=True).clamp(min=1)
    mean = (iou * usable).sum(1, keepdim=True) / count
    squares = (((iou - mean) * usable) ** 2).sum(1, keepdim=True)
    variance = squares / (count - 1).clamp(min=1)
    return mean + variance.sqrt()


def _object_of_most_overlap(overlaps: Tensor) -> Tensor:
    """Return [A]: the row of ``overlaps`` [N, A] with the largest overlap, or
    NO_OBJECT where none is positive for the anchor (-1).
    """
    best, row = overlaps.max(0)
    return torch.where(best >= 0, row, NO_OBJECT)


def centerness(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Return [P]: 1 where the anchor's centre is the box's, towards 0 at its border
    (FCOS, arXiv 1904.01355, eq. 3).
    """
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    to_left_top = centres - boxes[:, :2]
    to_right_bottom = boxes[:, 2:] - centres
    nearer = torch.minimum(to_left_top, to_right_bottom)
    farther = torch.maximum(to_left_top, to_right_bottom)
    return (nearer / farther).clamp(min=0).prod(1).sqrt()


def _nearest_anchors(
    anchors: Tensor, levels: Tensor, inside: Tensor, boxes: Tensor, candidates: int
) -> tuple[Tensor, Tensor]:
    """Return the rows [N, M] of each box's candidate anchors, among those ``inside``
    [N, A] its image, and which [N, M] are usable: a level may have too few.
    """
    box_centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    anchor_centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    distance = torch.cdist(box_centres, anchor_centres).masked_fill(~inside, torch.inf)
    rows, usable, start = [], [], 0
    for count in torch.bincount(levels).tolist():
        level_distance = distance[:, start : start + count]
        nearest = level_distance.topk(min(candidates, count), 1, largest=False)
        rows.append(nearest.indices + start)
        usable.append(nearest.values.isfinite())
        start += count
    return torch.cat(rows, 1), torch.cat(usable, 1)


def _centre_in(anchors: Tensor, boxes: Tensor) -> Tensor:
    centres = (anchors[..., :2] + anchors[..., 2:]) / 2
    margin = torch.minimum(centres - boxes[..., :2], boxes[..., 2:] - centres)
    return (margin > BORDER).all(-1)


def _anchor_labels(objects: Tensor, labels: Tensor, background: int) -> Tensor:
    # NO_OBJECT is -1 and so selects the appended background
    extended = torch.cat([labels, labels.new_full((1,), background)])
    return extended[objects]


def _anchor_weights(objects: Tensor, targets: DetrTargets, anchors: Tensor) -> Tensor:
    """Return loss weights [A]: the object's, 1 for background, 0 for background in an
    ignored region.
    """
    background = (~is_covered(anchors, targets.ignored_boxes)).float()
    weights = targets.object_weights
    extended = torch.cat([weights, weights.new_zeros(1)])
    return torch.where(objects == NO_OBJECT, background, extended[objects])


def _positives(
    maps: Maps,
    anchors: Anchors,
    objects: Sequence[Tensor],
    targets: Sequence[DetrTargets],
) -> list[Positives]:
    positives = []
    for tokens, anchor_objects, target in zip(
        maps.tokens(), objects, targets, strict=True
    ):
        rows = (anchor_objects != NO_OBJECT).nonzero()[:, 0]
        matched = anchor_objects[rows]
        positives.append(
            Positives(
                anchors.boxes[rows],
                target.boxes[matched],
                target.labels[matched],
                tokens[rows],
                target.object_weights[matched],
            )
        )
    return positives


def _tower(width: int) -> nn.Sequential:
    return nn.Sequential(_conv(width, width), group_norm(width), nn.ReLU())


def _conv(channels: int, out: int, bias: float = 0.0) -> nn.Conv2d:
    conv = nn.Conv2d(channels, out, 3, padding=1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.constant_(conv.bias, bias)  # type: ignore[arg-type]
    return conv
