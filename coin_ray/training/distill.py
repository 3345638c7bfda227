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
from torch.nn import functional as F
from torchvision.ops import batched_nms

from coin_ray.config import Distill, Separate
from coin_ray.data.examples import Batch
from coin_ray.fusion.ckg import ConsistentKnowledge
from coin_ray.fusion.rules import RULES, Annotators
from coin_ray.losses import distillation
from coin_ray.losses.alignment import prompt_alignment
from coin_ray.losses.gradient import gradient_misalignment, squared_error
from coin_ray.models.co_detr.regional import RegionalDetr
from coin_ray.models.faster_rcnn_clip.model import ClipDetector
from coin_ray.models.prototypes import Prototypes, update_prototypes
from coin_ray.parallel import all_gather_rows, all_reduce_gradients
from coin_ray.structures import Detections, Pairs, Separation
from coin_ray.training import diagnosis
from coin_ray.training.ema import ema_update
from coin_ray.training.loop import StateDict
from coin_ray.training.schedule import (
    make_optimizer,
    mixed_precision,
    new_optimizer,
    optimizer_step,
    parameter_group,
    set_learning_rate,
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
        if (config.fusion == "dawid_skene") != (annotators is not None):
            raise ValueError(
                "annotators are needed for fusion dawid_skene, and only for it; the"
                f" fusion is {config.fusion}"
            )
        self.student = student.train()
        self.teacher = teacher.eval().requires_grad_(False)
        self.teacher_is_clip_detector = isinstance(teacher, ClipDetector)
        self.config = config
        self.separation = separation
        self.annotators = annotators
        self.forward_student = forward_student
        self.consistent_prototypes = Prototypes(embeddings)
        self.cloud_prototypes = Prototypes(embeddings)
        self.clip_prototypes = Prototypes(embeddings)
        self.ckg = ConsistentKnowledge(
            embeddings.shape[1], student.num_classes, config.ckg_heads
        )
        self.optimizer = make_optimizer(student, config.fit)
        ckg_group = parameter_group(
            list(self.ckg.parameters()), config.ckg_lr, config.fit.weight_decay
        )
        self.ckg_optimizer = new_optimizer([ckg_group], config.fit)

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
            ckg_losses = self.train_ckg(outputs, step)
            if inconsistent_teach and self.config.ckg_first:
                losses |= self.inconsistent_losses(outputs)

        optimizer_step(self.optimizer, self.student, losses, step, self.config.fit)
        if step >= self.config.prototypes_from:
            self.update_prototypes(outputs)
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
            outputs.regions.classes, self.consistent_prototypes.values
        )
        losses["alignment"] = self.config.alignment * alignment
        return losses

    def inconsistent_losses(self, outputs: StudentOutputs) -> Losses:
        losses = outputs.inconsistent_losses(
            self.fuse_pairs, per_region=self.config.inconsistent_mean == "regions"
        )
        return _weighted(losses, self.config.inconsistent)

    def fuse_pairs(self, embedded: Tensor, pairs: Pairs) -> tuple[Tensor, float]:
        """Return fused probabilities [R, K+1] of inconsistent pairs with RoI embeddings
        [R, D], and their confidence threshold.
        """
        fused = self.fuse(embedded, pairs.cloud.probs, pairs.clip.probs)
        return fused, self.confidence_threshold(fused)

    def confidence_threshold(self, fused: Tensor) -> float:
        """Return the best probability from which a box of ``fused`` [R, K+1] teaches:
        pi, or with ``fusion_share`` its quantile over all workers.
        """
        share = self.config.fusion_share
        if share is None:
            return self.config.fusion_score_min
        scores = all_gather_rows(fused.float().max(-1).values)
        if not len(scores):
            return self.config.fusion_score_min
        return float(scores.quantile(1 - share, interpolation="lower"))

    def fuse(self, embedded: Tensor, cloud: Tensor, clip: Tensor) -> Tensor:
        """Return fused probabilities [R, K+1] of RoIs with embeddings [R, D] and two
        opinions [R, K+1], by CKG or a rule.
        """
        if self.annotators is not None:
            return self.annotators.posterior(cloud, clip)
        if self.config.fusion in RULES:
            return RULES[self.config.fusion](cloud, clip)
        fused: Tensor = self.ckg(embedded, self._teacher_prototypes(), cloud, clip)
        return fused

    def _teacher_prototypes(self) -> tuple[Tensor, Tensor]:
        return self.cloud_prototypes.normalised(), self.clip_prototypes.normalised()

    # CKG and prototypes

    def train_ckg(self, outputs: StudentOutputs, step: int) -> Losses:
        """Train CKG to label consistent boxes as both teachers do, and to pull the
        student on inconsistent boxes in the direction of the consistent ones. Return
        its losses and figures.

        Does nothing unless the global batch holds RoIs of both kinds.
        """
        totals = outputs.totals
        has_both_kinds = totals.consistent and totals.inconsistent
        if self.config.fusion != "ckg" or not has_both_kinds:
            return {}
        losses = {"ckg_consistent": self.ckg_consistency_loss(outputs)}
        embedded = outputs.regions.embedded[outputs.inconsistent_rows]
        pairs = outputs.inconsistent
        fused = self.fuse(embedded, pairs.cloud.probs, pairs.clip.probs)
        losses["ckg_gradient"] = self._ckg_gradient_loss(outputs, fused)
        figures = diagnosis.inconsistent_agreement_rates(
            fused, pairs, self.confidence_threshold(fused), totals.inconsistent
        )
        weights = self.ckg.weights(embedded, self._teacher_prototypes())
        figures["ckg_spread"] = diagnosis.ckg_weight_spread(weights)
        figures["gradient_angle"] = diagnosis.gradient_angle(losses["ckg_gradient"])
        self._update_ckg(losses, step)
        return losses | figures

    def ckg_consistency_loss(self, outputs: StudentOutputs) -> Tensor:
        """Return the divergence of CKG on consistent RoIs from the label that both
        teachers give; with ``ckg_background`` also on background RoIs, where both
        opinions are background.
        """
        class_count = self.student.num_classes + 1
        if self.config.ckg_background:
            rows, labels = outputs.labelled_rows, outputs.labels
            count = outputs.totals.labelled
        else:
            rows, labels = outputs.consistent_rows, outputs.consistent.cloud.labels
            count = outputs.totals.consistent
        targets = F.one_hot(labels, class_count).float()
        background = targets[len(outputs.consistent_rows) :]
        cloud = torch.cat([outputs.consistent.cloud.probs, background])
        clip = torch.cat([outputs.consistent.clip.probs, background])
        fused = self.fuse(outputs.regions.embedded[rows], cloud, clip)
        return distillation.divergence_of_probabilities(
            fused, targets, count * class_count
        )

    def _ckg_gradient_loss(self, outputs: StudentOutputs, fused: Tensor) -> Tensor:
        """Return the misalignment of the region head's gradients on inconsistent RoIs,
        taught by ``fused`` [B, K+1], and on consistent ones.
        """
        regions, head, totals = outputs.regions, self.student.head, outputs.totals
        labels = F.one_hot(
            outputs.consistent.cloud.labels, self.student.num_classes + 1
        ).float()
        rows = torch.cat([outputs.consistent_rows, outputs.inconsistent_rows])
        logits = head(regions.pooled[rows].detach(), regions.classes.detach()).logits
        consistent_logits, inconsistent_logits = logits.split([len(labels), len(fused)])
        return gradient_misalignment(
            squared_error(
                consistent_logits, labels, totals.consistent * outputs.class_count
            ),
            squared_error(
                inconsistent_logits, fused, totals.inconsistent * outputs.class_count
            ),
            list(head.transformation.parameters()),
        )

    def _update_ckg(self, losses: Losses, step: int) -> None:
        """Take one step of CKG's optimizer; the student's gradients stay as they are."""
        parameters = list(self.ckg.parameters())
        total = torch.stack(list(losses.values())).sum()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        all_reduce_gradients(parameters)
        set_learning_rate(self.ckg_optimizer, step, self.config.fit)
        self.ckg_optimizer.step()

    def update_prototypes(self, outputs: StudentOutputs) -> None:
        """Update the student's prototypes with consistent and background RoIs; CKG's
        also with inconsistent ones, under each teacher's label.
        """
        embedded = outputs.regions.embedded
        rows, labels = outputs.labelled_rows, outputs.labels
        updates = [(self.consistent_prototypes, embedded[rows], labels)]
        if outputs.totals.inconsistent:
            pairs = outputs.inconsistent
            features = embedded[torch.cat([rows, outputs.inconsistent_rows])]
            cloud_labels = torch.cat([labels, pairs.cloud.labels])
            clip_labels = torch.cat([labels, pairs.clip.labels])
            updates += [
                (self.cloud_prototypes, features, cloud_labels),
                (self.clip_prototypes, features, clip_labels),
            ]
        update_prototypes(updates, self.config.prototype_rate)

    # State

    def _parts(self) -> dict[str, Any]:
        return {
            "student": self.student,
            "teacher": self.teacher,
            "ckg": self.ckg,
            "consistent_prototypes": self.consistent_prototypes,
            "cloud_prototypes": self.cloud_prototypes,
            "clip_prototypes": self.clip_prototypes,
            "optimizer": self.optimizer,
            "ckg_optimizer": self.ckg_optimizer,
        }

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
