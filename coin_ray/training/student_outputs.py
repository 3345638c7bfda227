"""Outputs of one forward pass of a student, with the targets that the losses compare
them to, and those losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from coin_ray.config import Detector
from coin_ray.losses import distillation, supervised
from coin_ray.models.base import Images, RegionOutputs, RpnOutputs, TwoStageStudent
from coin_ray.parallel import all_max, all_sum
from coin_ray.structures import Detections, Pairs, Separation
from coin_ray.training.targets import (
    AnchorTargets,
    RegionTargets,
    Totals,
    anchor_targets,
    region_targets,
)

Losses = dict[str, Tensor]
FusePairs = Callable[[Tensor, Pairs], tuple[Tensor, float]]
"""Fuses, by CKG or a rule, both opinions on inconsistent pairs with embeddings [R, D]:
returns vectors [R, K+1] and the confidence threshold for a vector to teach."""


@dataclass(frozen=True, slots=True, eq=False)
class RegionKnowledge:
    """Described RoIs of a batch, those of all images concatenated, and what both
    teachers say of them.

    ``consistent_rows`` [A], ``inconsistent_rows`` [B], ``background_rows`` [G]: rows of
    ``regions``; ``consistent``, ``inconsistent``: the pairs of the first two, row by
    row.
    """

    regions: RegionOutputs
    consistent_rows: Tensor
    inconsistent_rows: Tensor
    background_rows: Tensor
    consistent: Pairs
    inconsistent: Pairs
    totals: Totals

    @property
    def class_count(self) -> int:
        """K + 1, background included."""
        return self.regions.logits.shape[1]

    @property
    def labels(self) -> Tensor:
        """Labels [A + G] of the RoIs on consistent pairs and on background."""
        background = torch.full_like(self.background_rows, self.class_count - 1)
        return torch.cat([self.consistent.cloud.labels, background])

    @property
    def labelled_rows(self) -> Tensor:
        """Rows [A + G] of ``regions`` with a label."""
        return torch.cat([self.consistent_rows, self.background_rows])

    def inconsistent_losses(self, fuse_pairs: FusePairs, *, per_region: bool) -> Losses:
        """Compare RoIs on inconsistent pairs with the fusion of both opinions;
        ``per_region``: the mean is over RoIs, not over elements.
        """
        rows = self.inconsistent_rows
        fused, threshold = fuse_pairs(self.regions.embedded[rows], self.inconsistent)
        if per_region:
            count = self.totals.labelled
        else:
            confident = distillation.is_confident(fused, threshold).sum()
            count = float(all_sum(confident)) * self.class_count
        loss = distillation.inconsistent_regions(
            self.regions.logits[rows], fused, threshold, count
        )
        return {"inconsistent": loss}


@dataclass(frozen=True, slots=True, eq=False)
class StudentOutputs(RegionKnowledge):
    """Anchors and sampled RoIs of a batch with their targets.

    ``private_rows`` [Q]: rows of ``regions`` on private boxes; ``private``: their
    detections by the only teacher that has them. ``boxes`` [A + B, 4]: of the pairs.
    """

    rpn: RpnOutputs
    anchor_targets: list[AnchorTargets]
    region_targets: list[RegionTargets]
    proposals: Tensor
    boxes: Tensor
    private_rows: Tensor
    private: Detections

    def supervised_losses(self, config: Detector) -> Losses:
        """Compare with consistent knowledge as ground truth, and with the boxes of
        inconsistent pairs (their class is undecided).
        """
        pair_rows = torch.cat([self.consistent_rows, self.inconsistent_rows])
        return self._anchor_losses(config) | {
            "consistent": supervised.region_class(
                self.regions.logits[self.labelled_rows],
                self.labels,
                config.background_weight,
                self.totals.labelled,
            ),
            "boxes": supervised.region_boxes(
                self.regions.deltas[pair_rows],
                self.proposals[pair_rows],
                self.boxes,
                self.totals.regions,
                config.box_loss,
            ),
        }

    def _anchor_losses(self, config: Detector) -> Losses:
        targets = self.anchor_targets
        objectness = _select_rows(self.rpn.objectness, [t.sampled for t in targets])
        is_object = torch.cat([t.is_object for t in targets]).to(objectness)
        deltas = _select_rows(self.rpn.deltas, [t.positive for t in targets])
        anchors = torch.cat([self.rpn.anchors[t.positive] for t in targets])
        boxes = torch.cat([t.boxes for t in targets])
        return {
            "anchor_objectness": supervised.anchor_objectness(
                objectness, is_object, self.totals.anchors
            ),
            "anchor_boxes": supervised.anchor_boxes(
                deltas, anchors, boxes, self.totals.anchors, config.anchor_weights
            ),
        }

    def private_losses(self) -> Losses:
        """Compare RoIs and anchors on private boxes with the opinion of the only teacher
        that detected them.
        """
        targets = self.anchor_targets
        objectness = _select_rows(self.rpn.objectness, [t.private for t in targets])
        anchor_probs = torch.cat([t.private_probs for t in targets])
        return {
            "private_regions": distillation.private_regions(
                self.regions.logits[self.private_rows],
                self.private.probs,
                self.totals.private * self.class_count,
            ),
            "private_anchors": distillation.private_anchors(
                objectness, anchor_probs, self.totals.private_anchors * 2
            ),
        }


class StudentForward(Protocol):
    """A function like ``forward_student``, for one kind of student."""

    def __call__(
        self,
        student: Any,
        images: Sequence[Tensor],
        size: tuple[int, int],
        separations: Sequence[Separation],
        generators: Sequence[torch.Generator],
    ) -> StudentOutputs: ...


def forward_student(
    student: TwoStageStudent,
    images: Sequence[Tensor],
    size: tuple[int, int],
    separations: Sequence[Separation],
    generators: Sequence[torch.Generator],
) -> StudentOutputs:
    """Forward the student on ``images`` (uint8 [3, H, W]), padded to ``size``, and
    sample anchors and RoIs against their separations (same frame).

    Boxes are assigned on the CPU, where the separations are; the samples go to the
    student's device.
    """
    batch = student.prepare(images, size)
    shared, rpn = student.propose(batch)
    return sample_anchors_and_regions(
        student, batch, shared, rpn, separations, generators
    )


def sample_anchors_and_regions(
    student: TwoStageStudent,
    batch: Images,
    shared: Any,
    rpn: RpnOutputs,
    separations: Sequence[Separation],
    generators: Sequence[torch.Generator],
) -> StudentOutputs:
    """Sample anchors and RoIs of a batch from the student's proposals, and forward the
    RoIs.
    """
    device = batch.pixels.device
    sampled_anchors = _sample_anchors(
        student.config, rpn, batch, separations, generators
    )
    sampled_regions = [
        region_targets(boxes.cpu(), separation, student.config, generator).to(device)
        for boxes, separation, generator in zip(
            rpn.boxes, separations, generators, strict=True
        )
    ]
    separations = [s.to(device) for s in separations]
    private = Detections.cat([s.private for s in separations])
    rois: list[Tensor] = []
    consistent: list[Pairs] = []
    inconsistent: list[Pairs] = []
    for target, separation in zip(sampled_regions, separations, strict=True):
        rois.append(torch.cat([target.proposals, separation.private.boxes]))
        consistent.append(separation.consistent[target.consistent])
        inconsistent.append(separation.inconsistent[target.inconsistent])
    wait_for_totals = Totals.start_count(sampled_anchors, sampled_regions, len(private))
    regions = student.describe(shared, rois)
    rows = rows_by_kind(sampled_regions, [len(s.private) for s in separations])
    assert sum(len(r) for r in rows) == len(regions.logits)
    return StudentOutputs(
        rpn=rpn,
        anchor_targets=sampled_anchors,
        region_targets=sampled_regions,
        proposals=torch.cat(rois),
        boxes=concatenate_pair_boxes(sampled_regions),
        regions=regions,
        consistent_rows=rows[0],
        inconsistent_rows=rows[1],
        background_rows=rows[2],
        private_rows=rows[3],
        consistent=Pairs.cat(consistent),
        inconsistent=Pairs.cat(inconsistent),
        private=private,
        totals=wait_for_totals(),
    )


def common_size(images: Sequence[Tensor]) -> tuple[int, int]:
    """Return the (height, width) that holds the images of all workers: convolutions see
    the padding, so it must not depend on who holds an image.
    """
    local_sizes = torch.tensor([image.shape[1:] for image in images])
    height, width = all_max(local_sizes.amax(0)).tolist()
    return int(height), int(width)


def _sample_anchors(
    config: Detector,
    rpn: RpnOutputs,
    batch: Images,
    separations: Sequence[Separation],
    generators: Sequence[torch.Generator],
) -> list[AnchorTargets]:
    anchors = rpn.anchors.cpu()
    return [
        anchor_targets(anchors, size, separation, config, generator).to(
            batch.pixels.device
        )
        for size, separation, generator in zip(
            batch.sizes, separations, generators, strict=True
        )
    ]


def _select_rows(batch: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """Select ``rows`` of each image of ``batch`` [B, A, ...] and concatenate them."""
    selected = [
        image[image_rows] for image, image_rows in zip(batch, rows, strict=True)
    ]
    return torch.cat(selected)


def rows_by_kind(
    targets: Sequence[RegionTargets], others: Sequence[int]
) -> tuple[Tensor, ...]:
    """Return the rows of consistent, inconsistent and background RoIs in the
    concatenation over images, and of the ``others`` that follow them in each image.
    """
    kinds: list[int] = []
    for target, count in zip(targets, others, strict=True):
        background = len(target.proposals) - target.positives
        kinds += [0] * len(target.consistent)
        kinds += [1] * len(target.inconsistent)
        kinds += [2] * background
        kinds += [3] * count
    device = targets[0].proposals.device
    kind_of_row = torch.tensor(kinds, dtype=torch.int64, device=device)
    return tuple((kind_of_row == kind).nonzero()[:, 0] for kind in range(4))


def concatenate_pair_boxes(targets: Sequence[RegionTargets]) -> Tensor:
    """Return the boxes of all RoIs on consistent pairs, then of all on inconsistent
    pairs.
    """
    consistent = [t.boxes[: len(t.consistent)] for t in targets]
    inconsistent = [t.boxes[len(t.consistent) :] for t in targets]
    return torch.cat(consistent + inconsistent)
