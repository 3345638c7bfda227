"""One forward pass of a student against separations: everything the losses compare,
side by side, and those losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from coin_ray.config import Detector
from coin_ray.losses import distillation, supervised
from coin_ray.models.base import Images, Proposed, Regional, Regions
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
Fused = Callable[[Tensor, Pairs], tuple[Tensor, float]]
"""What CKG, or a rule, says of inconsistent pairs seen as embeddings [R, D]: vectors
[R, K+1], and the best probability from which one teaches."""


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """Anchors and sampled RoIs of a batch with what they should learn; RoIs of all
    images behind one another.

    ``on_consistent`` [A], ``on_inconsistent`` [B], ``on_background`` [G],
    ``on_private`` [Q]: rows of ``regions``; ``consistent``, ``inconsistent``: the pairs
    of the first two, row by row; ``private``: the one teacher's view of the last.
    """

    proposed: Proposed
    anchors: list[AnchorTargets]
    targets: list[RegionTargets]
    proposals: Tensor
    boxes: Tensor
    regions: Regions
    on_consistent: Tensor
    on_inconsistent: Tensor
    on_background: Tensor
    on_private: Tensor
    consistent: Pairs
    inconsistent: Pairs
    private: Detections
    totals: Totals

    @property
    def classes(self) -> int:
        """Background included."""
        return self.regions.logits.shape[1]

    @property
    def labels(self) -> Tensor:
        """[A + G] labels of the RoIs on consistent pairs and on background."""
        background = torch.full_like(self.on_background, self.private.num_classes)
        return torch.cat([self.consistent.cloud.labels, background])

    @property
    def labelled(self) -> Tensor:
        """[A + G] rows of ``regions`` with a label."""
        return torch.cat([self.on_consistent, self.on_background])

    def supervised_losses(self, config: Detector) -> Losses:
        """Consistent knowledge as ground truth, and the boxes of inconsistent pairs
        (their class is not settled).
        """
        on_pairs = torch.cat([self.on_consistent, self.on_inconsistent])
        proposed, sampled, totals = self.proposed, self.anchors, self.totals
        objectness = torch.cat(
            [
                row[t.sampled]
                for row, t in zip(proposed.objectness, sampled, strict=True)
            ]
        )
        is_object = torch.cat([t.is_object for t in sampled]).to(objectness)
        return {
            "anchor_objectness": supervised.anchor_objectness(
                objectness, is_object, totals.anchors
            ),
            "anchor_boxes": supervised.anchor_boxes(
                torch.cat(
                    [
                        row[t.positive]
                        for row, t in zip(proposed.deltas, sampled, strict=True)
                    ]
                ),
                torch.cat([proposed.anchors[t.positive] for t in sampled]),
                torch.cat([t.boxes for t in sampled]),
                totals.anchors,
                config.anchor_weights,
            ),
            "consistent": supervised.region_class(
                self.regions.logits[self.labelled],
                self.labels,
                config.background_weight,
                totals.labelled,
            ),
            "boxes": supervised.region_boxes(
                self.regions.deltas[on_pairs],
                self.proposals[on_pairs],
                self.boxes,
                totals.regions,
                config.box_loss,
            ),
        }

    def private_losses(self) -> Losses:
        """RoIs and anchors on boxes that one teacher alone saw, against its view of
        them.
        """
        logits, totals = self.regions.logits[self.on_private], self.totals
        objectness = torch.cat(
            [
                row[t.private]
                for row, t in zip(self.proposed.objectness, self.anchors, strict=True)
            ]
        )
        seen = torch.cat([t.private_probs for t in self.anchors])
        return {
            "private_regions": distillation.private_regions(
                logits, self.private.probs, totals.private * self.classes
            ),
            "private_anchors": distillation.private_anchors(
                objectness, seen, totals.private_anchors * 2
            ),
        }

    def inconsistent_losses(self, fused: Fused, *, per_region: bool) -> Losses:
        """RoIs on inconsistent pairs against what CKG makes of both opinions;
        ``per_region``: the mean is over RoIs, not over elements.
        """
        answers, sure = fused(
            self.regions.embedded[self.on_inconsistent], self.inconsistent
        )
        logits = self.regions.logits[self.on_inconsistent]
        count = (
            self.totals.labelled
            if per_region
            else float(all_sum(distillation.trusted(answers, sure).sum()))
            * self.classes
        )
        return {
            "inconsistent": distillation.inconsistent_regions(
                logits, answers, sure, count
            )
        }


class Look(Protocol):
    """How a kind of student is shown a batch: all that distillation must know of it."""

    def __call__(
        self,
        student: Any,
        images: Sequence[Tensor],
        size: tuple[int, int],
        separations: Sequence[Separation],
        generators: Sequence[torch.Generator],
    ) -> View: ...


def look(
    student: Regional,
    images: Sequence[Tensor],
    size: tuple[int, int],
    separations: Sequence[Separation],
    generators: Sequence[torch.Generator],
) -> View:
    """Forward the student on ``images`` (uint8 [3, H, W]), padded to ``size``, and
    sample anchors and RoIs against their separations (same frame).

    Boxes are assigned on the CPU, where the separations are; what is sampled goes to
    the student's device.
    """
    batch = student.prepare(images, size)
    shared, proposed = student.propose(batch)
    return sample(student, batch, shared, proposed, separations, generators)


def sample(
    student: Regional,
    batch: Images,
    shared: Any,
    proposed: Proposed,
    separations: Sequence[Separation],
    generators: Sequence[torch.Generator],
) -> View:
    """The view of sampled anchors and RoIs of a batch that the student has made
    proposals for.
    """
    device = batch.pixels.device
    config, all_anchors = student.config, proposed.anchors.cpu()
    anchors = [
        anchor_targets(all_anchors, size, separation, config, generator).to(device)
        for size, separation, generator in zip(
            batch.sizes, separations, generators, strict=True
        )
    ]
    targets = [
        region_targets(boxes.cpu(), separation, config, generator).to(device)
        for boxes, separation, generator in zip(
            proposed.boxes, separations, generators, strict=True
        )
    ]
    separations = [s.to(device) for s in separations]
    private = Detections.cat([s.private for s in separations])
    rois = [
        torch.cat([t.proposals, s.private.boxes])
        for t, s in zip(targets, separations, strict=True)
    ]
    totals = Totals.counted(anchors, targets, len(private))
    regions = student.describe(shared, rois)
    consistent, inconsistent, background, on_private = _rows(
        targets, separations, len(regions.logits)
    )
    return View(
        proposed=proposed,
        anchors=anchors,
        targets=targets,
        proposals=torch.cat(rois),
        boxes=_boxes_in_order(targets),
        regions=regions,
        on_consistent=consistent,
        on_inconsistent=inconsistent,
        on_background=background,
        on_private=on_private,
        consistent=Pairs.joined(
            [
                s.consistent[t.consistent]
                for t, s in zip(targets, separations, strict=True)
            ]
        ),
        inconsistent=Pairs.joined(
            [
                s.inconsistent[t.inconsistent]
                for t, s in zip(targets, separations, strict=True)
            ]
        ),
        private=private,
        totals=totals(),
    )


def common_size(images: Sequence[Tensor]) -> tuple[int, int]:
    """(height, width) that holds the images of all workers: convolutions see the
    padding, so it must not depend on who holds an image.
    """
    height, width = all_max(
        torch.tensor([i.shape[1:] for i in images]).amax(0)
    ).tolist()
    return int(height), int(width)


def _rows(
    targets: Sequence[RegionTargets], separations: Sequence[Separation], total: int
) -> tuple[Tensor, ...]:
    """Rows of consistent, inconsistent, background and private RoIs in the
    concatenation over images.
    """
    kind: list[int] = []
    for target, separation in zip(targets, separations, strict=True):
        consistent, inconsistent = len(target.consistent), len(target.inconsistent)
        kind += (
            [0] * consistent
            + [1] * inconsistent
            + [2] * (len(target.proposals) - target.positives)
            + [3] * len(separation.private)
        )
    assert len(kind) == total
    kinds = torch.tensor(kind, dtype=torch.int64, device=targets[0].proposals.device)
    return tuple((kinds == k).nonzero()[:, 0] for k in range(4))


def _boxes_in_order(targets: Sequence[RegionTargets]) -> Tensor:
    """Boxes of all RoIs on consistent pairs, then of all on inconsistent pairs."""
    consistent = [t.boxes[: len(t.consistent)] for t in targets]
    inconsistent = [t.boxes[len(t.consistent) :] for t in targets]
    return torch.cat(consistent + inconsistent)
