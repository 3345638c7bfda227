"""COIN on a student that was a detector before: CKG, trained by aligning gradients on an
auxiliary region head, names the boxes that both teachers found and name differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from coin_ray.config import Detector, Distill, Separate
from coin_ray.data.examples import Batch
from coin_ray.fusion.rules import RULES
from coin_ray.losses import supervised
from coin_ray.models.students.base import PyramidMaps, PyramidStudent
from coin_ray.models.students.region_head import AuxiliaryRegionHead
from coin_ray.structures import Pairs, Separation, Targets
from coin_ray.training import diagnosis
from coin_ray.training.direct import LossesAndFigures, StudentTraining
from coin_ray.training.knowledge_fusion import KnowledgeFusion
from coin_ray.training.schedule import mixed_precision, parameter_group
from coin_ray.training.separation_targets import make_targets, separate_batch
from coin_ray.training.student_outputs import (
    Losses,
    RegionKnowledge,
    concatenate_pair_boxes,
    rows_by_kind,
)
from coin_ray.training.targets import Totals, region_targets
from coin_ray.training.zoom import SIDE_MIN, zoom_separation_randomly

COPIES = 4
"""Moved and scaled copies of each box that the region head learns from."""
SHIFT, LOG_SCALE = 0.3, 0.4
"""Largest shift of a copy, in sides of its box, and largest logarithm of its scale."""
RANDOM_BOXES = 16


@dataclass(frozen=True, slots=True, eq=False)
class DescribedRegions:
    """The RoIs of a batch that the region head learns from, and what it says of the
    inconsistent pairs' own boxes.

    ``proposals`` [A + B, 4]: the RoIs on pairs, consistent ones first; ``boxes`` [A + B,
    4]: of those pairs. ``embeddings`` [M, D]: of all inconsistent pairs, image by image.
    """

    knowledge: RegionKnowledge
    proposals: Tensor
    boxes: Tensor
    embeddings: Tensor


class CkgTargetTraining(StudentTraining):
    """Trains a student, its region head and CKG together.

    ``detector``: how the region head samples and classifies boxes.
    """

    student: PyramidStudent

    def __init__(
        self,
        student: PyramidStudent,
        config: Distill,
        separation: Separate,
        detector: Detector,
    ) -> None:
        super().__init__(
            student,
            config.fit,
            average_rate=config.teacher_rate,
            frozen_norms=config.student_batch_norm == "frozen",
            zoom=config.student_zoom,
        )
        self.config = config
        self.separation = separation
        self.detector = detector
        self.region_head = AuxiliaryRegionHead(student, detector)
        embeddings = self.region_head.class_embeddings().detach()
        self.fusion = KnowledgeFusion(embeddings, config)
        self.optimizer.add_param_group(
            parameter_group(
                list(self.region_head.parameters()),
                config.fit.lr,
                config.fit.weight_decay,
            )
        )

    def learning_module(self) -> nn.Module:
        return nn.ModuleList([cast("nn.Module", self.student), self.region_head])

    def compute_losses(self, batch: Batch, step: int) -> LossesAndFigures:
        images, separations = self._separate(batch)
        with mixed_precision(self.region_head, self.fit):
            extracted = self.student.extract_maps(images)
            described = self._describe(extracted, images, separations, batch.generators)
        losses = self._region_losses(described)
        figures = diagnosis.count_boxes_by_kind(separations)
        knowledge = described.knowledge
        has_begun = step >= self.config.prototypes_from
        if has_begun:
            figures |= self.fusion.train(knowledge, self.region_head.head, step)
            losses |= self._inconsistent_losses(knowledge)
        targets = self._make_targets(separations, described, has_begun)
        if has_begun:
            self.fusion.update_prototypes(knowledge)
        with mixed_precision(self.region_head, self.fit):
            losses |= self.student.losses_of_maps(extracted, images, targets)
        return losses, figures

    def _separate(self, batch: Batch) -> tuple[list[Tensor], list[Separation]]:
        """Return the strong images and their separations, each at a random size."""
        separations = separate_batch(
            batch,
            batch.detections["clip"],
            self.separation,
            fuse_boxes=self.separation.fused_boxes == "always",
        )
        zoomed = [
            zoom_separation_randomly(image, separation, self.zoom, generator)
            for image, separation, generator in zip(
                batch.strong, separations, batch.generators, strict=True
            )
        ]
        return [image for image, _ in zoomed], [separation for _, separation in zoomed]

    def _describe(
        self,
        extracted: PyramidMaps,
        images: Sequence[Tensor],
        separations: Sequence[Separation],
        generators: Sequence[torch.Generator],
    ) -> DescribedRegions:
        """Sample RoIs around the boxes of the images and elsewhere, and describe them
        and the inconsistent pairs' boxes.
        """
        device = extracted.pixels.device
        sampled = [
            region_targets(
                draw_proposals(separation, image, generator),
                separation,
                self.detector,
                generator,
            ).to(device)
            for separation, image, generator in zip(
                separations, images, generators, strict=True
            )
        ]
        wait_for_totals = Totals.start_count([], sampled, 0)
        separations = [separation.to(device) for separation in separations]
        rois = [
            torch.cat([targets.proposals, separation.inconsistent.boxes])
            for targets, separation in zip(sampled, separations, strict=True)
        ]
        regions = self.region_head(extracted, images, rois)
        consistent, inconsistent, background, disputed = rows_by_kind(
            sampled, [len(separation.inconsistent) for separation in separations]
        )
        pairs = list(zip(sampled, separations, strict=True))
        knowledge = RegionKnowledge(
            regions=regions,
            consistent_rows=consistent,
            inconsistent_rows=inconsistent,
            background_rows=background,
            consistent=Pairs.cat([s.consistent[t.consistent] for t, s in pairs]),
            inconsistent=Pairs.cat([s.inconsistent[t.inconsistent] for t, s in pairs]),
            totals=wait_for_totals(),
        )
        return DescribedRegions(
            knowledge,
            torch.cat(rois)[torch.cat([consistent, inconsistent])],
            concatenate_pair_boxes(sampled),
            regions.embedded[disputed].detach(),
        )

    def _region_losses(self, described: DescribedRegions) -> Losses:
        """Return the region head's losses: classes of consistent boxes and background,
        boxes of all pairs.
        """
        knowledge = described.knowledge
        pair_rows = torch.cat([knowledge.consistent_rows, knowledge.inconsistent_rows])
        weight = self.config.region_head_weight
        return {
            "region_classes": weight
            * supervised.region_class(
                knowledge.regions.logits[knowledge.labelled_rows],
                knowledge.labels,
                self.detector.background_weight,
                knowledge.totals.labelled,
            ),
            "region_boxes": weight
            * supervised.region_boxes(
                knowledge.regions.deltas[pair_rows],
                described.proposals,
                described.boxes,
                knowledge.totals.regions,
                self.detector.box_loss,
            ),
        }

    def _inconsistent_losses(self, knowledge: RegionKnowledge) -> Losses:
        losses = knowledge.inconsistent_losses(
            self.fusion.fuse_pairs,
            per_region=self.config.inconsistent_mean == "regions",
        )
        weight = self.config.region_head_weight * self.config.inconsistent
        return {"region_inconsistent": weight * losses["inconsistent"]}

    @torch.no_grad()
    def _make_targets(
        self,
        separations: Sequence[Separation],
        described: DescribedRegions,
        has_begun: bool,
    ) -> list[Targets]:
        """Return what the separations teach: names of disputed boxes by CKG, once its
        training ``has_begun``, and before that by the mean of both opinions.
        """
        disputed = Pairs.cat([separation.inconsistent for separation in separations])
        average, threshold = RULES["average"], 0.0
        if has_begun:
            pairs = disputed.to(described.embeddings.device)
            probs, threshold = self.fusion.fuse_pairs(described.embeddings, pairs)
        else:
            probs = average(disputed.cloud.probs, disputed.clip.probs)
        counts = [len(separation.inconsistent) for separation in separations]
        return [
            make_targets(
                separation, self.config.targets, average, disputed_probs, threshold
            )
            for separation, disputed_probs in zip(
                separations, probs.cpu().split(counts), strict=True
            )
        ]

    def _parts(self) -> dict[str, Any]:
        head = {"region_head": self.region_head}
        return super()._parts() | head | self.fusion.parts()

    def to(self, device: torch.device) -> Self:
        super().to(device)
        for part in self._parts().values():
            if isinstance(part, nn.Module):
                part.to(device)
        return self


def draw_proposals(
    separation: Separation, image: Tensor, generator: torch.Generator
) -> Tensor:
    """Return boxes [R, 4] around all boxes of an image [3, H, W], moved and scaled at
    random, and at random places.
    """
    boxes = torch.cat(
        [
            separation.consistent.boxes,
            separation.inconsistent.boxes,
            separation.private.boxes,
        ]
    ).repeat(COPIES, 1)
    height, width = image.shape[1:]
    size = boxes.new_tensor([width, height])
    draws = torch.rand(len(boxes), 4, generator=generator) * 2 - 1
    centres, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    centres = centres + SHIFT * draws[:, :2] * sides
    sides = sides * (LOG_SCALE * draws[:, 2:]).exp()
    anywhere = torch.rand(2, RANDOM_BOXES, 2, generator=generator) * size
    proposals = torch.cat(
        [
            torch.cat([centres - sides / 2, centres + sides / 2], 1),
            torch.cat([anywhere.amin(0), anywhere.amax(0)], 1),
        ]
    )
    clipped: Tensor = clip_boxes_to_image(proposals, (height, width))
    return clipped[(clipped[:, 2:] - clipped[:, :2]).amin(1) >= SIDE_MIN]
