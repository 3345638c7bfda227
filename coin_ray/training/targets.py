"""Assignment and sampling of anchors and RoIs against a separation (paper section 3.4;
coin_ray.fusion.separate).

Each image has its own random generator, so the draws do not depend on which worker
holds the image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from coin_ray.config import Detector
from coin_ray.models.faster_rcnn_clip.rpn import inside_image
from coin_ray.parallel import start_all_sum
from coin_ray.structures import Separation

RPN_POSITIVE, RPN_NEGATIVE = 0.7, 0.3
POSITIVE_IOU = 0.5


@dataclass(frozen=True, slots=True, eq=False)
class AnchorTargets:
    """Rows of the anchors that learn: ``sampled`` [S] with ``is_object`` [S];
    ``positive`` [P] with ``boxes`` [P, 4]; ``private`` [Q] with the ``private_probs``
    [Q, K+1] of the teacher that detected their box.
    """

    sampled: Tensor
    is_object: Tensor
    positive: Tensor
    boxes: Tensor
    private: Tensor
    private_probs: Tensor

    def to(self, device: torch.device) -> AnchorTargets:
        return AnchorTargets(
            self.sampled.to(device),
            self.is_object.to(device),
            self.positive.to(device),
            self.boxes.to(device),
            self.private.to(device),
            self.private_probs.to(device),
        )


@dataclass(frozen=True, slots=True, eq=False)
class RegionTargets:
    """Sampled RoIs ``proposals`` [S, 4]: first those on consistent pairs, then on
    inconsistent pairs, then background.

    ``consistent`` and ``inconsistent`` [.] are rows of the separation's pairs;
    ``boxes`` [P, 4] the pairs' boxes of both in that order.
    """

    proposals: Tensor
    consistent: Tensor
    inconsistent: Tensor
    boxes: Tensor

    def to(self, device: torch.device) -> RegionTargets:
        return RegionTargets(
            self.proposals.to(device),
            self.consistent.to(device),
            self.inconsistent.to(device),
            self.boxes.to(device),
        )

    @property
    def positives(self) -> int:
        return len(self.consistent) + len(self.inconsistent)


@dataclass(frozen=True, slots=True)
class Totals:
    """Denominators of the losses: numbers of anchors and RoIs over *all* workers.

    ``regions``: sampled RoIs without those on private boxes; ``labelled``: those of
    them with a label, on consistent pairs and background.
    """

    anchors: float
    private_anchors: float
    regions: float
    labelled: float
    consistent: float
    inconsistent: float
    private: float

    @classmethod
    def start_count(
        cls,
        anchors: Sequence[AnchorTargets],
        targets: Sequence[RegionTargets],
        private: int,
    ) -> Callable[[], Totals]:
        """Send this worker's counts in one message, without waiting for the others. The
        returned function waits and returns the totals.
        """
        consistent = sum(len(t.consistent) for t in targets)
        inconsistent = sum(len(t.inconsistent) for t in targets)
        regions = sum(len(t.proposals) for t in targets)
        local_counts = {
            "anchors": sum(len(t.sampled) for t in anchors),
            "private_anchors": sum(len(t.private) for t in anchors),
            "regions": regions,
            "labelled": regions - inconsistent,
            "consistent": consistent,
            "inconsistent": inconsistent,
            "private": private,
        }
        wait_for_sum = start_all_sum(
            torch.tensor([float(n) for n in local_counts.values()])
        )

        def wait_for_totals() -> Totals:
            global_counts = wait_for_sum().tolist()
            return cls(**dict(zip(local_counts, global_counts, strict=True)))

        return wait_for_totals


def anchor_targets(
    anchors: Tensor,
    size: tuple[int, int],
    separation: Separation,
    config: Detector,
    generator: torch.Generator,
) -> AnchorTargets:
    """Assign and sample anchors. Pairs of either kind are objects; anchors on private
    boxes are neither object nor background but distilled.
    """
    objects = torch.cat([separation.consistent.boxes, separation.inconsistent.boxes])
    candidates = torch.cat([objects, separation.private.boxes])
    matches = _match_anchors(anchors, candidates)
    matches[~inside_image(anchors, size)] = Matcher.BETWEEN_THRESHOLDS
    positive = ((matches >= 0) & (matches < len(objects))).nonzero()[:, 0]
    negative = (matches == Matcher.BELOW_LOW_THRESHOLD).nonzero()[:, 0]
    private = (matches >= len(objects)).nonzero()[:, 0]
    is_unseen = not len(candidates) and not separation.reviewed
    if config.unseen_images == "ignored" and is_unseen:
        negative = negative[:0]
    positive = _draw_rows(positive, config.rpn_batch // 2, generator)
    negative = _draw_rows(negative, config.rpn_batch - len(positive), generator)
    return AnchorTargets(
        sampled=torch.cat([positive, negative]),
        is_object=torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]),
        positive=positive,
        boxes=candidates[matches[positive]],
        private=private,
        private_probs=separation.private.probs[matches[private] - len(objects)],
    )


def _match_anchors(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Return the row of ``boxes`` that each anchor matches, or torchvision's codes."""
    if not len(boxes):
        return torch.full((len(anchors),), Matcher.BELOW_LOW_THRESHOLD)
    overlap = box_iou(boxes, anchors)
    matcher = Matcher(RPN_POSITIVE, RPN_NEGATIVE, allow_low_quality_matches=True)
    matches: Tensor = matcher(overlap)
    # a box that overlaps no anchor has its best match in all of them
    matches[overlap.amax(0) <= 0] = Matcher.BELOW_LOW_THRESHOLD
    return matches


def region_targets(
    proposals: Tensor,
    separation: Separation,
    config: Detector,
    generator: torch.Generator,
) -> RegionTargets:
    """Match proposals, with the pairs' boxes added, at IoU .5 and sample them. Proposals
    on private boxes are ignored; pairs of both kinds share the positive quota.
    """
    consistent_boxes = separation.consistent.boxes
    pair_boxes = torch.cat([consistent_boxes, separation.inconsistent.boxes])
    proposals = torch.cat([proposals, pair_boxes])
    candidates = torch.cat([pair_boxes, separation.private.boxes])
    matches = torch.full((len(proposals),), -1)
    if len(candidates):
        overlap, best = box_iou(proposals, candidates).max(1)
        matches = torch.where(overlap >= POSITIVE_IOU, best, -1)

    on_pair = ((matches >= 0) & (matches < len(pair_boxes))).nonzero()[:, 0]
    positive_limit = int(config.roi_batch * config.roi_positive)
    positive = _draw_rows(on_pair, positive_limit, generator)
    on_nothing = (matches < 0).nonzero()[:, 0]
    background = _draw_rows(on_nothing, config.roi_batch - len(positive), generator)

    is_consistent = matches[positive] < len(consistent_boxes)
    consistent, inconsistent = positive[is_consistent], positive[~is_consistent]
    return RegionTargets(
        proposals=proposals[torch.cat([consistent, inconsistent, background])],
        consistent=matches[consistent],
        inconsistent=matches[inconsistent] - len(consistent_boxes),
        boxes=pair_boxes[matches[torch.cat([consistent, inconsistent])]],
    )


def _draw_rows(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw at most ``count`` of ``rows``."""
    if len(rows) <= count:
        return rows
    return rows[torch.randperm(len(rows), generator=generator)[:count]]
