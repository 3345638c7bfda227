"""ATSS (arXiv 1912.02424) as an auxiliary head: one square anchor per cell, objects
choose theirs by the spread of overlaps.
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
from coin_ray.models.co_detr.agreement import without_doubles
from coin_ray.models.co_detr.auxiliary import Outcome, Positives
from coin_ray.models.co_detr.criterion import ALPHA, GAMMA, at_least_one
from coin_ray.models.co_detr.decoder import RARE
from coin_ray.models.co_detr.model import with_background
from coin_ray.models.co_detr.neck import group_norm
from coin_ray.models.co_detr.pyramid import Anchors, Maps, flattened, lay_out, square
from coin_ray.models.co_detr.targets import Targets, covered
from coin_ray.structures import Detections

NONE = -1
SUPPRESSED = 0.6
"""Overlap from which the head's own detections are doubles."""


class Atss(nn.Module):
    weights: ClassVar[dict[str, float]] = {"class": 1.0, "giou": 2.0, "centerness": 1.0}
    """Of each loss among the head's own."""

    def __init__(self, config: CoDetr, classes: int, levels: int | None = None) -> None:
        super().__init__()
        self.candidates, self.classes, self.detections = (
            config.atss_candidates,
            classes,
            config.detections,
        )
        self.class_tower, self.box_tower = _tower(config.width), _tower(config.width)
        self.classify = _conv(config.width, classes, RARE)
        self.regress = _conv(config.width, 4)
        self.centre = _conv(config.width, 1)
        self.scales = nn.Parameter(torch.ones(levels or config.levels + 1))

    def forward(
        self,
        maps: Maps,
        targets: Sequence[Targets],
        generator: torch.Generator | None = None,
    ) -> Outcome:
        anchors = lay_out(maps, [square(s) for s in maps.strides])
        assigned = assign(
            anchors.boxes,
            anchors.levels,
            anchors.inside,
            [t.boxes for t in targets],
            self.candidates,
        )
        return Outcome(
            self._losses(maps, anchors, assigned, targets),
            _positives(maps, anchors, assigned, targets),
        )

    @torch.no_grad()
    def predict(self, maps: Maps) -> list[Detections]:
        """What the head finds by itself: scores are class times centerness."""
        anchors = lay_out(maps, [square(s) for s in maps.strides])
        logits, deltas, centre = self._predict(maps)
        scores = logits.sigmoid() * centre.sigmoid() * anchors.inside[..., None]
        return [
            without_doubles(
                box_ops.decode_boxes(d, anchors.boxes)[:, None],
                s,
                with_background(s),
                size,
                SUPPRESSED,
                self.detections,
            )
            for d, s, size in zip(deltas, scores, maps.sizes, strict=True)
        ]

    def _losses(
        self,
        maps: Maps,
        anchors: Anchors,
        assigned: Sequence[Tensor],
        targets: Sequence[Targets],
    ) -> dict[str, Tensor]:
        logits, deltas, centre = self._predict(maps)
        labels = torch.stack(
            [
                _labels(a, t.labels, self.classes)
                for a, t in zip(assigned, targets, strict=True)
            ]
        )
        image, row = (labels < self.classes).nonzero(as_tuple=True)
        truth = torch.cat(
            [t.boxes[a[a != NONE]] for a, t in zip(assigned, targets, strict=True)]
        )
        weights = (
            torch.stack(
                [
                    _weights(a, t, anchors.boxes)
                    for a, t in zip(assigned, targets, strict=True)
                ]
            )
            * anchors.inside
        )
        share = weights[image, row]
        chosen = anchors.boxes[row]
        wanted = centerness(chosen, truth)
        found = box_ops.decode_boxes(deltas[image, row], chosen)
        one_hot = F.one_hot(labels, self.classes + 1)[..., :-1].to(logits)
        focal = sigmoid_focal_loss(logits, one_hot, ALPHA, GAMMA) * weights[..., None]
        entropy = F.binary_cross_entropy_with_logits(
            centre[image, row, 0], wanted, reduction="none"
        )
        count = at_least_one((labels < self.classes).sum(1).clamp(min=1).sum())
        return {
            "class": focal.sum() / count,
            "giou": (
                (generalized_box_iou_loss(found, truth) * wanted * share).sum()
                / at_least_one(wanted.sum())
            ),
            "centerness": (entropy * share).sum() / count,
        }

    def _predict(self, maps: Maps) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [B, A, C], deltas [B, A, 4], centerness logits [B, A, 1]."""
        boxes = [self.box_tower(m) for m in maps.levels]
        logits = flattened(
            [self.classify(self.class_tower(m)) for m in maps.levels], self.classes
        )
        deltas = flattened(
            [self.regress(b) * s for b, s in zip(boxes, self.scales, strict=True)], 4
        )
        return logits, deltas, flattened([self.centre(b) for b in boxes], 1)


@torch.no_grad()
def assign(
    anchors: Tensor,
    levels: Tensor,
    inside: Tensor,
    boxes: Sequence[Tensor],
    candidates: int,
) -> list[Tensor]:
    """[A] per image: the object each anchor stands for, or NONE.

    An object's candidates are the ``candidates`` anchors of each level whose centres
    are closest to its own, among those ``inside`` [B, A] its image. Of them it takes
    those that overlap it at least by mean + standard deviation of all candidates'
    overlaps and have their centre in it. An anchor that several objects take goes to
    the one it overlaps most. All images are done at once: their anchors are the same.
    """
    objects = torch.cat(list(boxes))
    counts = [len(own) for own in boxes]
    nothing = torch.full((len(anchors),), NONE, device=anchors.device)
    if not len(objects):
        return [nothing] * len(boxes)
    image = torch.repeat_interleave(torch.tensor(counts, device=anchors.device))
    chosen, usable = _closest(anchors, levels, inside[image], objects, candidates)
    iou = box_iou(objects, anchors).gather(1, chosen)
    taken = (
        usable
        & (iou >= _limit(iou, usable))
        & _centre_in(anchors[chosen], objects[:, None])
    )
    overlaps = anchors.new_full((len(objects), len(anchors)), -1.0)
    overlaps.scatter_(1, chosen, torch.where(taken, iou, -1.0))
    return [_owners(own) if len(own) else nothing for own in overlaps.split(counts)]


def _limit(iou: Tensor, usable: Tensor) -> Tensor:
    """[N, 1]: mean + standard deviation (of the sample) of each row's usable overlaps
    [N, M].
    """
    count = usable.sum(1, keepdim=True).clamp(min=1)
    mean = (iou * usable).sum(1, keepdim=True) / count
    variance = (((iou - mean) * usable) ** 2).sum(1, keepdim=True) / (count - 1).clamp(
        min=1
    )
    return mean + variance.sqrt()


def _owners(overlaps: Tensor) -> Tensor:
    best, owner = overlaps.max(0)
    return torch.where(best >= 0, owner, NONE)


def centerness(anchors: Tensor, boxes: Tensor) -> Tensor:
    """[P]: 1 where the anchor's centre is the box's, towards 0 at its border (FCOS,
    arXiv 1904.01355, eq. 3).
    """
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    before, after = centres - boxes[:, :2], boxes[:, 2:] - centres
    return (
        (torch.minimum(before, after) / torch.maximum(before, after))
        .clamp(min=0)
        .prod(1)
        .sqrt()
    )


def _closest(
    anchors: Tensor, levels: Tensor, inside: Tensor, boxes: Tensor, candidates: int
) -> tuple[Tensor, Tensor]:
    """[N, M] rows of the anchors among which each box chooses, ``inside`` [N, A] of its
    image; where a level has too few, the rest is not usable.
    """
    distance = torch.cdist(
        (boxes[:, :2] + boxes[:, 2:]) / 2, (anchors[:, :2] + anchors[:, 2:]) / 2
    ).masked_fill(~inside, torch.inf)
    rows, usable, start = [], [], 0
    for count in torch.bincount(levels).tolist():
        nearest = distance[:, start : start + count].topk(
            min(candidates, count), 1, largest=False
        )
        rows.append(nearest.indices + start)
        usable.append(nearest.values.isfinite())
        start += count
    return torch.cat(rows, 1), torch.cat(usable, 1)


def _centre_in(anchors: Tensor, boxes: Tensor) -> Tensor:
    centres = (anchors[..., :2] + anchors[..., 2:]) / 2
    return (
        torch.minimum(centres - boxes[..., :2], boxes[..., 2:] - centres) > 0.01
    ).all(-1)


def _labels(assigned: Tensor, labels: Tensor, background: int) -> Tensor:
    extended = torch.cat([labels, labels.new_full((1,), background)])
    return extended[assigned]


def _weights(assigned: Tensor, targets: Targets, anchors: Tensor) -> Tensor:
    """[A]: of the object, 1 for background, 0 for background in an ignored region."""
    background = (~covered(anchors, targets.left_out)).float()
    extended = torch.cat([targets.certainty, targets.certainty.new_zeros(1)])
    return torch.where(assigned == NONE, background, extended[assigned])


def _positives(
    maps: Maps, anchors: Anchors, assigned: Sequence[Tensor], targets: Sequence[Targets]
) -> list[Positives]:
    found = []
    for tokens, own, target in zip(maps.tokens(), assigned, targets, strict=True):
        rows = (own != NONE).nonzero()[:, 0]
        objects = own[rows]
        certainty = target.certainty[objects]
        found.append(
            Positives(
                anchors.boxes[rows],
                target.boxes[objects],
                target.labels[objects],
                tokens[rows],
                certainty,
            )
        )
    return found


def _tower(width: int) -> nn.Sequential:
    return nn.Sequential(_conv(width, width), group_norm(width), nn.ReLU())


def _conv(channels: int, out: int, bias: float = 0.0) -> nn.Conv2d:
    conv = nn.Conv2d(channels, out, 3, padding=1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.constant_(conv.bias, bias)  # type: ignore[arg-type]
    return conv
