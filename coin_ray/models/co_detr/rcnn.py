"""Faster R-CNN as an auxiliary head: region proposals on all levels of the pyramid, and
two layers on what is pooled there.
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
from coin_ray.models.co_detr.agreement import without_doubles
from coin_ray.models.co_detr.auxiliary import Outcome, Positives, draw_balanced
from coin_ray.models.co_detr.criterion import at_least_one
from coin_ray.models.co_detr.pyramid import Anchors, Maps, flattened, lay_out, nine
from coin_ray.models.co_detr.targets import Size, Targets, covered
from coin_ray.structures import Detections

POSITIVE, NEGATIVE, LOW_QUALITY = 0.7, 0.3, 0.3
"""Overlaps from and below which an anchor is an object or background, and from which an
object's best anchor stands for it."""
REGION_POSITIVE = SUPPRESSED = 0.5
UNUSED, BACKGROUND = -2, -1


class Rcnn(nn.Module):
    weights: ClassVar[dict[str, float]] = {
        "proposal_class": 1.0,
        "proposal_l1": 1.0,
        "class": 1.0,
        "giou": 10.0,
    }
    """Of each loss among the head's own."""

    def __init__(self, config: CoDetr, classes: int) -> None:
        super().__init__()
        self.config = config
        self.proposals = RegionProposals(config)
        self.regions = RegionHead(config, classes)

    def forward(
        self,
        maps: Maps,
        targets: Sequence[Targets],
        generator: torch.Generator | None = None,
    ) -> Outcome:
        losses, proposals = self.proposals(maps, targets, generator)
        sampled = [
            sample_regions(p, t, self.config, generator)
            for p, t in zip(proposals, targets, strict=True)
        ]
        pooled = pool(
            maps,
            [s.boxes for s in sampled],
            self.config.roi_size,
            self.config.roi_sampling,
        )
        losses = losses | self.regions.losses(pooled, sampled, targets)
        return Outcome(losses, _positives(pooled, sampled, targets))

    @torch.no_grad()
    def predict(self, maps: Maps) -> list[Detections]:
        """What the head finds by itself: proposals, named and moved by the second
        stage.
        """
        proposals = self.proposals.propose(maps).boxes
        counts = [len(boxes) for boxes in proposals]
        logits, deltas = self.regions(
            pool(maps, proposals, self.config.roi_size, self.config.roi_sampling)
        )
        found = zip(
            proposals,
            logits.softmax(1).split(counts),
            deltas.split(counts),
            maps.sizes,
            strict=True,
        )
        return [
            without_doubles(
                _moved(boxes, own),
                vectors[:, :-1],
                vectors,
                size,
                SUPPRESSED,
                self.config.detections,
            )
            for boxes, vectors, own, size in found
        ]


def _moved(boxes: Tensor, deltas: Tensor) -> Tensor:
    """Boxes [P, 4] by deltas [P, n, 4] -> [P, n, 4]."""
    each = deltas.shape[1]
    moved: Tensor = box_ops.decode_boxes(
        deltas.flatten(0, 1), boxes.repeat_interleave(each, 0)
    ).unflatten(0, (-1, each))
    return moved


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
        targets: Sequence[Targets],
        generator: torch.Generator | None = None,
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Losses, and proposals [P, 4] (xyxy pixels, no gradient) of each image."""
        anchors, found = self._proposed(maps)
        return (
            self._losses(anchors, found.objectness, found.deltas, targets, generator),
            found.boxes,
        )

    def propose(self, maps: Maps) -> RpnOutputs:
        """The same proposals without a loss."""
        return self._proposed(maps)[1]

    def _proposed(self, maps: Maps) -> tuple[Anchors, RpnOutputs]:
        hidden = [self.conv(m).relu() for m in maps.levels]
        objectness = flattened([self.objectness(h) for h in hidden], 1)[..., 0]
        deltas = flattened([self.deltas(h) for h in hidden], 4)
        anchors = lay_out(maps, [nine(s) for s in maps.strides])
        weights = deltas.new_tensor(box_ops.DELTA_WEIGHTS)
        proposals = [
            self._filter(
                box_ops.decode_boxes(d * weights, anchors.boxes),
                scores.masked_fill(~inside, -torch.inf),
                anchors.levels,
                size,
            )
            for d, scores, inside, size in zip(
                deltas.detach(),
                objectness.detach(),
                anchors.inside,
                maps.sizes,
                strict=True,
            )
        ]
        return anchors, RpnOutputs(anchors.boxes, objectness, deltas, proposals)

    def _losses(
        self,
        anchors: Anchors,
        objectness: Tensor,
        deltas: Tensor,
        targets: Sequence[Targets],
        generator: torch.Generator | None,
    ) -> dict[str, Tensor]:
        entropy, distance, count = objectness.new_zeros(()), objectness.new_zeros(()), 0
        for image, (inside, target) in enumerate(
            zip(anchors.inside, targets, strict=True)
        ):
            assigned = assign_anchors(
                anchors.boxes, inside, target.boxes, target.left_out
            )
            groups = (
                (assigned >= 0).nonzero()[:, 0],
                (assigned == BACKGROUND).nonzero()[:, 0],
            )
            positive, negative = draw_balanced(
                *groups, self.config.rpn_samples, 0.5, generator
            )
            logits = objectness[image, torch.cat([positive, negative])]
            is_object = (
                torch.arange(len(logits), device=logits.device) < len(positive)
            ).to(logits)
            share = target.certainty[assigned[positive]]
            weights = torch.cat([share, torch.ones_like(negative, dtype=share.dtype)])
            entropy = entropy + F.binary_cross_entropy_with_logits(
                logits, is_object, weights, reduction="sum"
            )
            wanted = box_ops.encode_boxes(
                target.boxes[assigned[positive]], anchors.boxes[positive]
            ) / deltas.new_tensor(box_ops.DELTA_WEIGHTS)
            distance = (
                distance
                + ((deltas[image, positive] - wanted).abs() * share[:, None]).sum()
            )
            count += len(logits)
        total = at_least_one(torch.tensor(count, device=objectness.device))
        return {"proposal_class": entropy / total, "proposal_l1": distance / total}

    def _filter(
        self, boxes: Tensor, scores: Tensor, levels: Tensor, size: Size
    ) -> Tensor:
        """The best of each level, without near doubles in it; then the best of all
        levels.
        """
        best = []
        for level in range(int(levels[-1]) + 1):
            rows = (levels == level).nonzero()[:, 0]
            best.append(
                rows[
                    scores[rows]
                    .topk(min(self.config.proposals_per_level, len(rows)))
                    .indices
                ]
            )
        rows = torch.cat(best)
        rows = rows[scores[rows].isfinite()]
        boxes, scores, levels = (
            clip_boxes_to_image(boxes[rows], size),
            scores[rows],
            levels[rows],
        )
        large = remove_small_boxes(boxes, 1e-3)
        kept = large[
            batched_nms(boxes[large], scores[large], levels[large], self.config.rpn_nms)
        ]
        return boxes[kept[: self.config.proposals]]


@torch.no_grad()
def assign_anchors(
    anchors: Tensor, inside: Tensor, boxes: Tensor, ignored: Tensor
) -> Tensor:
    """[A]: the object each anchor stands for, BACKGROUND, or UNUSED (in between, in an
    ``ignored`` region, or not ``inside``).
    """
    if not len(boxes):
        return torch.where(inside & ~covered(anchors, ignored), BACKGROUND, UNUSED)
    overlaps = box_iou(boxes, anchors).masked_fill(~inside, -1.0)
    best, owner = overlaps.max(0)
    assigned = torch.where(
        best >= POSITIVE, owner, torch.where(best < NEGATIVE, BACKGROUND, UNUSED)
    )
    highest = overlaps.max(1, keepdim=True).values
    own = torch.where(
        (overlaps == highest) & (highest >= LOW_QUALITY),
        torch.arange(len(boxes), device=boxes.device)[:, None],
        UNUSED,
    )
    last = own.max(0).values
    assigned = torch.where(last >= 0, last, assigned)
    assigned = torch.where(
        (assigned == BACKGROUND) & covered(anchors, ignored), UNUSED, assigned
    )
    return torch.where(inside, assigned, UNUSED)


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """Of one image: proposals ``boxes`` [R, 4], those that stand for objects first, and
    ``objects`` [P]: which object each of these stands for.
    """

    boxes: Tensor
    objects: Tensor


@torch.no_grad()
def sample_regions(
    proposals: Tensor,
    targets: Targets,
    config: CoDetr,
    generator: torch.Generator | None,
) -> Sampled:
    """Proposals and the objects themselves: objects where they overlap one by half,
    background elsewhere.
    """
    boxes = torch.cat([targets.boxes, proposals])
    if not len(targets.boxes):
        best, owner = (
            boxes.new_zeros(len(boxes)),
            torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device),
        )
    else:
        best, owner = box_iou(targets.boxes, boxes).max(0)
    background = (best < REGION_POSITIVE) & ~covered(boxes, targets.left_out)
    groups = (best >= REGION_POSITIVE).nonzero()[:, 0], background.nonzero()[:, 0]
    positive, negative = draw_balanced(
        *groups, config.roi_samples, config.roi_positive, generator
    )
    return Sampled(boxes[torch.cat([positive, negative])], owner[positive])


def pool(maps: Maps, boxes: Sequence[Tensor], side: int, sampling: int) -> Tensor:
    """RoI features [R, d, side, side] of boxes [N, 4] per image, behind one another;
    the coarsest map is left out.

    A box is pooled from the level on which it is 14 to 28 cells wide (FPN, arXiv
    1612.03144, eq. 1).
    """
    image = torch.cat(
        [torch.full((len(b),), i, device=b.device) for i, b in enumerate(boxes)]
    )
    rois = torch.cat([image[:, None].float(), torch.cat(list(boxes))], 1)
    usable = len(maps.levels) - 1
    level = pooling_level(rois[:, 1:], maps.strides[0], usable)
    parts, rows = [], []
    for number in range(usable):
        own = (level == number).nonzero()[:, 0]
        rows.append(own)
        features = maps.levels[number].float()
        parts.append(
            roi_align(
                features,
                rois[own],
                side,
                1 / maps.strides[number],
                sampling or -1,
                aligned=True,
            )
        )
    pooled: Tensor = torch.cat(parts)[torch.cat(rows).argsort()]
    return pooled


def pooling_level(boxes: Tensor, first_stride: int, levels: int) -> Tensor:
    """[R]: floor(log2(sqrt(area) / (14 * first stride))), held in 0..levels - 1."""
    side = (boxes[:, 2:] - boxes[:, :2]).prod(1).clamp(min=1e-6).sqrt()
    return (side / (14 * first_stride)).log2().floor().clamp(0, levels - 1).long()


class RegionHead(nn.Module):
    """Pooled features -> class logits [R, C+1], background last, and box deltas."""

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
        """Logits [R, C+1] and deltas [R, C or 1, 4]."""
        hidden = self.layers(pooled.flatten(1))
        return self.classify(hidden).float(), self.regress(hidden).float().unflatten(
            1, (-1, 4)
        )

    def losses(
        self, pooled: Tensor, sampled: Sequence[Sampled], targets: Sequence[Targets]
    ) -> dict[str, Tensor]:
        logits, deltas = self(pooled)
        labels = torch.cat(
            [
                _region_labels(s, t.labels, self.classes)
                for s, t in zip(sampled, targets, strict=True)
            ]
        )
        rows = (labels < self.classes).nonzero()[:, 0]
        truth = torch.cat(
            [t.boxes[s.objects] for s, t in zip(sampled, targets, strict=True)]
        )
        own = deltas[rows, 0 if self.agnostic else labels[rows]]
        found = box_ops.decode_boxes(own, torch.cat([s.boxes for s in sampled])[rows])
        count = at_least_one(torch.tensor(len(labels), device=logits.device))
        weights = torch.cat(
            [_region_weights(s, t) for s, t in zip(sampled, targets, strict=True)]
        )
        return {
            "class": (
                (F.cross_entropy(logits, labels, reduction="none") * weights).sum()
                / count
            ),
            "giou": (
                (generalized_box_iou_loss(found, truth) * weights[rows]).sum() / count
            ),
        }


def _region_labels(sampled: Sampled, labels: Tensor, background: int) -> Tensor:
    rest = labels.new_full((len(sampled.boxes) - len(sampled.objects),), background)
    return torch.cat([labels[sampled.objects], rest])


def _region_weights(sampled: Sampled, targets: Targets) -> Tensor:
    rest = torch.ones(
        len(sampled.boxes) - len(sampled.objects), device=sampled.boxes.device
    )
    return torch.cat([targets.certainty[sampled.objects], rest])


def _positives(
    pooled: Tensor, sampled: Sequence[Sampled], targets: Sequence[Targets]
) -> list[Positives]:
    means = pooled.mean((2, 3)).split([len(s.boxes) for s in sampled])
    return [
        Positives(
            s.boxes[: len(s.objects)],
            t.boxes[s.objects],
            t.labels[s.objects],
            features[: len(s.objects)],
            t.certainty[s.objects],
        )
        for s, t, features in zip(sampled, targets, means, strict=True)
    ]
