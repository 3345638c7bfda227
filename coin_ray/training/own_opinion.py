"""The starting student as the second teacher: what it detects before any training, in
the rendering and at the sizes in which it is most confident.

It costs no call, and its mistakes are not the cloud's. Its confidence needs no label:
the mean over images of the best score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import hflip

from coin_ray.boxes import mirror_boxes
from coin_ray.config import Distill
from coin_ray.models.students.base import (
    STUDENT_RENDERINGS,
    InputFormat,
    PostProcess,
    StudentRendering,
)
from coin_ray.models.students.building import empty_student
from coin_ray.models.students.detection import detect_objects
from coin_ray.models.students.yolox import YoloxStudent
from coin_ray.structures import Detections
from coin_ray.training.fused_detections import fuse_detections

SIDE_FACTORS = (0.5, 2 / 3, 1.0, 4 / 3, 3 / 2)
"""Sides of the input that are tried, as multiples of the student's own."""
SIDE_COUNT = 3
"""Most confident sizes that are used, each as it is and mirrored."""
PLAIN_MARGIN = 1.05
"""Another rendering must be so many times as confident as the plain one."""
MULTIPLE = 32


@dataclass(frozen=True)
class View:
    """How images are shown to the student."""

    side: int
    mirrored: bool = False


@dataclass(frozen=True)
class SeenDetector:
    """A student that is shown images in another size and rendering than its own."""

    student: YoloxStudent
    side: int
    rendering: StudentRendering

    @property
    def input_format(self) -> InputFormat:
        own = self.student.input_format
        return replace(own, side=self.side, rendering=self.rendering)

    @property
    def post_process(self) -> PostProcess:
        return replace(self.student.post_process, score_min=SCORE_MIN)

    def detect_tensors(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self.student.detect_tensors(pixels)


SCORE_MIN = 0.05
"""Boxes with lower scores are no opinion."""


class OwnOpinion(nn.Module):
    """A student whose detections are those of several views, fused. The views, and the
    student's rendering, are part of the weights.
    """

    view_sides: Tensor

    def __init__(self, student: YoloxStudent) -> None:
        super().__init__()
        self.student = student
        self.num_classes = student.num_classes
        self.register_buffer("view_sides", torch.zeros(SIDE_COUNT, dtype=torch.int64))

    @property
    def views(self) -> list[View]:
        sides = self.view_sides.tolist()
        return [View(side, mirrored) for side in sides for mirrored in (False, True)]

    @property
    def input_format(self) -> InputFormat:
        return self.student.input_format

    @property
    def post_process(self) -> PostProcess:
        return self.student.post_process

    def detect_tensors(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self.student.detect_tensors(pixels)

    def predict(self, images: Sequence[Tensor]) -> list[Detections]:
        """Return the fused detections of uint8 images [3, H, W], in their pixels."""
        views = self.views
        by_view = [self._detect(images, view) for view in views]
        weights = [1.0] * len(views)
        return [
            fuse_detections(opinions, weights)
            for opinions in zip(*by_view, strict=True)
        ]

    def _detect(self, images: Sequence[Tensor], view: View) -> list[Detections]:
        rendering = self.student.input_format.rendering
        detector = SeenDetector(self.student, view.side, rendering)
        device = self.view_sides.device
        if not view.mirrored:
            return _to_cpu(detect_objects(detector, images, device))
        mirrored = detect_objects(detector, [hflip(image) for image in images], device)
        return [
            detections.with_boxes(mirror_boxes(detections.boxes, image.shape[2]))
            for detections, image in zip(_to_cpu(mirrored), images, strict=True)
        ]


def _to_cpu(detections: Sequence[Detections]) -> list[Detections]:
    return [in_image.to(torch.device("cpu")) for in_image in detections]


@dataclass(frozen=True)
class ViewConfidence:
    """The mean over images of the student's best score in a view."""

    rendering: StudentRendering
    side: int
    confidence: float


def mean_best_score(
    student: YoloxStudent,
    images: Sequence[Tensor],
    rendering: StudentRendering,
    side: int,
) -> ViewConfidence:
    """Show the student uint8 images [3, H, W] in one rendering and size."""
    detector = SeenDetector(student, side, rendering)
    device = next(student.parameters()).device
    best_scores = [
        float(detections.scores[:1].sum())
        for detections in detect_objects(detector, images, device)
    ]
    mean = sum(best_scores) / max(1, len(best_scores))
    return ViewConfidence(rendering, side, mean)


def choose_rendering(
    student: YoloxStudent, images: Sequence[Tensor]
) -> tuple[StudentRendering, list[ViewConfidence]]:
    """Return the rendering in which the student is most confident, at its own size and
    half of it, and what was measured. Plain wins unless another is clearly ahead.
    """
    sides = [_round_side(student.side * factor) for factor in (0.5, 1.0)]
    measured = [
        mean_best_score(student, images, rendering, side)
        for rendering in STUDENT_RENDERINGS
        for side in sides
    ]
    totals = dict.fromkeys(STUDENT_RENDERINGS, 0.0)
    for view in measured:
        totals[view.rendering] += view.confidence
    totals["plain"] *= PLAIN_MARGIN
    return max(totals, key=lambda rendering: totals[rendering]), measured


def choose_views(
    student: YoloxStudent, images: Sequence[Tensor]
) -> tuple[OwnOpinion, list[ViewConfidence]]:
    """Return the student's opinion in its rendering, at the sizes in which it is most
    confident, and what was measured.
    """
    rendering = student.input_format.rendering
    sides = dict.fromkeys(_round_side(student.side * f) for f in SIDE_FACTORS)
    measured = [mean_best_score(student, images, rendering, side) for side in sides]
    ranked = sorted(measured, key=lambda view: -view.confidence)
    opinion = OwnOpinion(student)
    best_sides = [view.side for view in ranked[:SIDE_COUNT]]
    opinion.view_sides.copy_(torch.tensor(best_sides))
    return opinion, measured


def load_own_opinion(
    settings: Distill, classes: Sequence[str], weights: Mapping[str, Any]
) -> OwnOpinion:
    """Return the second teacher with the weights of ``OwnOpinion.state_dict``."""
    student = empty_student(settings, classes)
    assert isinstance(student, YoloxStudent)  # checked by the settings
    opinion = OwnOpinion(student)
    opinion.load_state_dict(weights)
    return opinion.eval()


def _round_side(side: float) -> int:
    return max(MULTIPLE, round(side / MULTIPLE) * MULTIPLE)
