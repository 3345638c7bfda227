"""Knowledge separation and distillation into the target detector (paper sections 3.3
and 3.4).

One step: the teacher follows the student (after the burn-up); its detections and the
cloud's are separated; the student forwards the strong images; CKG learns by aligning
gradients; the student learns from all three kinds of knowledge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from coin_ray.config import Distill, Separate
from coin_ray.data.examples import Batch
from coin_ray.fusion.rules import Annotators
from coin_ray.losses.alignment import prompt_alignment
from coin_ray.models.co_detr.regional import RegionalDetr
from coin_ray.models.faster_rcnn_clip.model import ClipDetector
from coin_ray.structures import Detections, Separation
from coin_ray.training import diagnosis
from coin_ray.training.ema import ema_update
from coin_ray.training.knowledge_fusion import KnowledgeFusion
from coin_ray.training.loop import StateDict
from coin_ray.training.schedule import (
    make_optimizer,
    mixed_precision,
    optimizer_step,
)
from coin_ray.training.separation_targets import separate_batch
from coin_ray.training.student_outputs import (
    Losses,
    StudentForward,
    StudentOutputs,
    common_size,
    forward_student,
)

Student = ClipDetector | RegionalDetr
DUPLICATE_IOU = 0.5
"""IoU from which two detections of one class are the same object."""


class Distillation:
    """``teacher``: the mean teacher, a network like the student, which it follows from
    the burn-up on. It is the CLIP detector, or adds to the CLIP detector's detections.

    ``annotators``: both teachers' error rates, estimated from the training images, for
    ``config.fusion`` dawid_skene. ``forward_student``: the function for this kind of
    student.
    """

    def __init__(
        self,
        student: Student,
        teacher: Student,
        embeddings: Tensor,
        config: Distill,
        separation: Separate,
        annotators: Annotators | None = None,
        forward_student: StudentForward = forward_student,
    ) -> None:
        self.student = student.train()
        self.teacher = teacher.eval().requires_grad_(False)
        self.teacher_is_clip_detector = isinstance(teacher, ClipDetector)
        self.config = config
        self.separation = separation
        self.forward_student = forward_student
        self.fusion = KnowledgeFusion(embeddings, config, annotators)
        self.optimizer = make_optimizer(student, config.fit)

    def train_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        burnt_up = step >= self.config.burn_up
        if burnt_up:
            self.update_teacher(step)
        size = common_size(batch.weak)  # the strong images have the same sizes
        separations = self.separate(batch, burnt_up, size)
        with mixed_precision(self.student, self.config.fit):
            outputs = self.forward_student(
                self.student, batch.strong, size, separations, batch.generators
            )

        losses = self.basic_losses(outputs)
        ckg_losses: Losses = {}
        if step >= self.config.prototypes_from:
            inconsistent_teach = step >= self._first_inconsistent_step()
            if inconsistent_teach and not self.config.ckg_first:
                losses |= self.inconsistent_losses(outputs)
            ckg_losses = self.fusion.train(outputs, self.student.head, step)
            if inconsistent_teach and self.config.ckg_first:
                losses |= self.inconsistent_losses(outputs)

        optimizer_step(self.optimizer, self.student, losses, step, self.config.fit)
        if step >= self.config.prototypes_from:
            self.fusion.update_prototypes(outputs)
        return losses | ckg_losses | diagnosis.count_boxes_by_kind(separations)

    def _first_inconsistent_step(self) -> int:
        if self.config.inconsistent_from is None:
            return self.config.burn_up
        return self.config.inconsistent_from

    # Teachers

    def update_teacher(self, step: int) -> None:
        """Move the mean teacher towards the student. One that is not the CLIP detector
        starts as a copy of the student at the end of the burn-up.
        """
        is_first = step == self.config.burn_up and not self.teacher_is_clip_detector
        rate = 1.0 if is_first else self.config.teacher_rate
        ema_update(self.teacher, self.student, rate)

    def separate(
        self, batch: Batch, burnt_up: bool, size: tuple[int, int]
    ) -> list[Separation]:
        """Separate both teachers' detections of each image. Before the burn-up the
        second teacher is frozen: its detections were collected once (and are mirrored
        with the image). After it, the mean teacher predicts, at ``size``.
        """
        clip_detections = batch.detections["clip"]
        if burnt_up:
            clip_detections = self.predict_second_teacher(batch, size)
        rule = self.separation.fused_boxes
        fuse_boxes = rule == "always" or (rule == "after_burn_up" and burnt_up)
        return separate_batch(
            batch, clip_detections, self.separation, fuse_boxes=fuse_boxes
        )

    def predict_second_teacher(
        self, batch: Batch, size: tuple[int, int]
    ) -> list[Detections]:
        """Return the mean teacher's detections. If it is not the CLIP detector, they are
        merged with the CLIP detector's collected ones.
        """
        predicted = self.predict_with_teacher(batch.weak, size)
        if self.teacher_is_clip_detector:
            return predicted
        return [
            _merge_by_nms(detections, collected)
            for detections, collected in zip(
                predicted, batch.detections["clip"], strict=True
            )
        ]

    def predict_with_teacher(
        self, images: Sequence[Tensor], size: tuple[int, int]
    ) -> list[Detections]:
        # its cached class embeddings are outdated, since its prompts have moved
        self.teacher.eval()
        with mixed_precision(self.teacher, self.config.fit):
            detections = self.teacher.predict(self.teacher.prepare(images, size))
        return [d.to(torch.device("cpu")) for d in detections]

    # Losses of the student

    def basic_losses(self, outputs: StudentOutputs) -> Losses:
        """Return the weighted losses that do not need CKG: consistent knowledge, private
        knowledge, prompt alignment.
        """
        consistent = outputs.supervised_losses(self.student.config)
        losses = _weighted(consistent, self.config.consistent)
        losses |= _weighted(outputs.private_losses(), self.config.private)
        alignment = prompt_alignment(
            outputs.regions.classes, self.fusion.consistent_prototypes.values
        )
        losses["alignment"] = self.config.alignment * alignment
        return losses

    def inconsistent_losses(self, outputs: StudentOutputs) -> Losses:
        losses = outputs.inconsistent_losses(
            self.fusion.fuse_pairs,
            per_region=self.config.inconsistent_mean == "regions",
        )
        return _weighted(losses, self.config.inconsistent)

    # State

    def _parts(self) -> dict[str, Any]:
        return {
            "student": self.student,
            "teacher": self.teacher,
            "optimizer": self.optimizer,
        } | self.fusion.parts()

    def to(self, device: torch.device) -> Distillation:
        for part in self._parts().values():
            if isinstance(part, nn.Module):
                part.to(device)
        return self

    def state_dict(self) -> StateDict:
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: StateDict) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])


def _weighted(losses: Mapping[str, Tensor], weight: float) -> Losses:
    return {name: weight * loss for name, loss in losses.items()}


def _merge_by_nms(first: Detections, second: Detections) -> Detections:
    """Merge two teachers' detections by class-wise NMS: of the same object the one with
    the higher score stays.
    """
    merged = Detections.cat([first, second])
    rows = batched_nms(merged.boxes, merged.scores, merged.labels, DUPLICATE_IOU)
    return merged[rows]
