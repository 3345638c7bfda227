"""Which anchors and RoIs learn from what: assignment and sampling against a separation
(paper section 3.4; coin_ray.fusion.separate).

Everything is drawn from a generator of the image's own, so it does not matter which
worker holds the image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from coin_ray.config import Detector
from coin_ray.models.faster_rcnn_clip.rpn import inside
from coin_ray.parallel import all_sum_later
from coin_ray.structures import Separation

RPN_POSITIVE, RPN_NEGATIVE = 0.7, 0.3
POSITIVE_IOU = 0.5


@dataclass(frozen=True, slots=True, eq=False)
class AnchorTargets:
    """Rows of the anchors that learn: ``sampled`` [S] with ``is_object`` [S];
    ``positive`` [P] with ``boxes`` [P, 4]; ``private`` [Q] with the ``private_probs``
    [Q, K+1] of the teacher that saw their box.
    """

    sampled: Tensor
    is_object: Tensor
    positive: Tensor
    boxes: Tensor
    private: Tensor
    private_probs: Tensor

    def to(self, device: torch.device) -> AnchorTargets:
        parts = (
            self.sampled,
            self.is_object,
            self.positive,
            self.boxes,
            self.private,
            self.private_probs,
        )
        return AnchorTargets(*(t.to(device) for t in parts))


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
            *(
                t.to(device)
                for t in (
                    self.proposals,
                    self.consistent,
                    self.inconsistent,
                    self.boxes,
                )
            )
        )

    @property
    def positives(self) -> int:
        return len(self.consistent) + len(self.inconsistent)


@dataclass(frozen=True, slots=True)
class Totals:
    """What losses are divided by: anchors and RoIs of *all* workers.

    ``regions``: sampled RoIs, those on private boxes aside; ``labelled``: of them those
    with a label, on consistent pairs and background.
    """

    anchors: float
    private_anchors: float
    regions: float
    labelled: float
    consistent: float
    inconsistent: float
    private: float

    @classmethod
    def counted(
        cls,
        anchors: Sequence[AnchorTargets],
        targets: Sequence[RegionTargets],
        private: int,
    ) -> Callable[[], Totals]:
        """From this worker's targets, in one message that is on its way until what is
        returned is called.
        """
        consistent, inconsistent = (
            sum(len(getattr(t, kind)) for t in targets)
            for kind in ("consistent", "inconsistent")
        )
        regions = sum(len(t.proposals) for t in targets)
        own = {
            "anchors": sum(len(t.sampled) for t in anchors),
            "private_anchors": sum(len(t.private) for t in anchors),
            "regions": regions,
            "labelled": regions - inconsistent,
            "consistent": consistent,
            "inconsistent": inconsistent,
            "private": private,
        }
        total = all_sum_later(torch.tensor([float(n) for n in own.values()]))
        return lambda: cls(**dict(zip(own, total().tolist(), strict=True)))


def anchor_targets(
    anchors: Tensor,
    size: tuple[int, int],
    separation: Separation,
    config: Detector,
    generator: torch.Generator,
) -> AnchorTargets:
    """Matched pairs of either kind are objects; anchors on private boxes are neither
    object nor background but distilled.
    """
    objects = torch.cat([separation.consistent.boxes, separation.inconsistent.boxes])
    candidates = torch.cat([objects, separation.private.boxes])
    matched = torch.full((len(anchors),), Matcher.BELOW_LOW_THRESHOLD)
    if len(candidates):
        overlap = box_iou(candidates, anchors)
        matched = Matcher(RPN_POSITIVE, RPN_NEGATIVE, allow_low_quality_matches=True)(
            overlap
        )
        # a box that meets no anchor has its best match in all of them
        matched[overlap.amax(0) <= 0] = Matcher.BELOW_LOW_THRESHOLD
    matched[~inside(anchors, size)] = Matcher.BETWEEN_THRESHOLDS
    positive = ((matched >= 0) & (matched < len(objects))).nonzero()[:, 0]
    negative = (matched == Matcher.BELOW_LOW_THRESHOLD).nonzero()[:, 0]
    private = (matched >= len(objects)).nonzero()[:, 0]
    if (
        config.unseen_images == "ignored"
        and not len(candidates)
        and not separation.reviewed
    ):
        negative = negative[:0]
    positive = _draw(positive, config.rpn_batch // 2, generator)
    negative = _draw(negative, config.rpn_batch - len(positive), generator)
    return AnchorTargets(
        sampled=torch.cat([positive, negative]),
        is_object=torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]),
        positive=positive,
        boxes=candidates[matched[positive]],
        private=private,
        private_probs=separation.private.probs[matched[private] - len(objects)],
    )


def region_targets(
    proposals: Tensor,
    separation: Separation,
    config: Detector,
    generator: torch.Generator,
) -> RegionTargets:
    """Proposals, with the pairs' boxes added, matched at IoU .5; those on private boxes
    are ignored; pairs share the positive quota.
    """
    consistent, inconsistent = (
        separation.consistent.boxes,
        separation.inconsistent.boxes,
    )
    pairs = torch.cat([consistent, inconsistent])
    proposals = torch.cat([proposals, pairs])
    candidates = torch.cat([pairs, separation.private.boxes])
    overlap, best = (
        box_iou(proposals, candidates).max(1)
        if len(candidates)
        else (torch.zeros(len(proposals)), None)
    )
    on_object = overlap >= POSITIVE_IOU
    match = (
        torch.where(on_object, best, -1)
        if best is not None
        else torch.full((len(proposals),), -1)
    )
    positive = _draw(
        ((match >= 0) & (match < len(pairs))).nonzero()[:, 0],
        int(config.roi_batch * config.roi_positive),
        generator,
    )
    background = _draw(
        (match < 0).nonzero()[:, 0], config.roi_batch - len(positive), generator
    )
    first = positive[match[positive] < len(consistent)]
    second = positive[match[positive] >= len(consistent)]
    return RegionTargets(
        proposals=proposals[torch.cat([first, second, background])],
        consistent=match[first],
        inconsistent=match[second] - len(consistent),
        boxes=pairs[match[torch.cat([first, second])]],
    )


def _draw(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return (
        rows
        if len(rows) <= count
        else rows[torch.randperm(len(rows), generator=generator)[:count]]
    )
