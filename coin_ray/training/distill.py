"""Knowledge separation and distillation into the target detector (paper sections 3.3
and 3.4).

One step, top down: the teacher follows the student (after the burn-up); its results and
the cloud's are separated; the student looks at the strong view; CKG learns by aligning
gradients; the student learns from all three kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms

from coin_ray.config import Distill, Separate
from coin_ray.data.examples import Batch
from coin_ray.fusion.ckg import ConsistentKnowledge
from coin_ray.fusion.rules import RULES, Annotators
from coin_ray.fusion.separate import separate
from coin_ray.losses import distillation
from coin_ray.losses.alignment import prompt_alignment
from coin_ray.losses.gradient import gradient_misalignment, squared_error
from coin_ray.models.co_detr.regional import RegionalDetr
from coin_ray.models.faster_rcnn_clip.model import ClipDetector
from coin_ray.models.prototypes import Prototypes, follow_features
from coin_ray.parallel import gathered, sum_gradients
from coin_ray.structures import Detections, Pairs, Separation
from coin_ray.training import diagnosis
from coin_ray.training.ema import follow
from coin_ray.training.propagate import descend, mixed_precision
from coin_ray.training.schedule import make_optimizer, new_optimizer, set_learning_rate
from coin_ray.training.student_outputs import Look, View, common_size, look

Student = ClipDetector | RegionalDetr
SAME = 0.5
"""Overlap from which two results of one class are the same object."""


class Distillation:
    """``teacher``: a network like the student, which it follows from the burn-up on. It
    is the CLIP detector, or stands beside its results.

    ``annotators``: the teachers as estimated from the training images, for
    ``config.fusion`` dawid_skene. ``look``: for this kind of student.
    """

    def __init__(
        self,
        student: Student,
        teacher: Student,
        embeddings: Tensor,
        config: Distill,
        separation: Separate,
        annotators: Annotators | None = None,
        look: Look = look,
    ) -> None:
        if (config.fusion == "dawid_skene") != (annotators is not None):
            raise ValueError(
                "annotators are needed for fusion dawid_skene, and only for it; the"
                f" fusion is {config.fusion}"
            )
        self.student, self.teacher = (
            student.train(),
            teacher.eval().requires_grad_(False),
        )
        self.config, self.separation, self.annotators, self.look = (
            config,
            separation,
            annotators,
            look,
        )
        self.consistent_prototypes = Prototypes(embeddings)
        self.cloud_prototypes, self.clip_prototypes = (
            Prototypes(embeddings),
            Prototypes(embeddings),
        )
        self.ckg = ConsistentKnowledge(
            embeddings.shape[1], student.num_classes, config.ckg_heads
        )
        self.teacher_is_clip = isinstance(teacher, ClipDetector)
        self.optimizer = make_optimizer(student, config.fit)
        rates: dict[str, object] = {
            "lr": config.ckg_lr,
            "base_lr": config.ckg_lr,
            "weight_decay": config.fit.weight_decay,
        }
        self.ckg_optimizer = new_optimizer(
            [{"params": list(self.ckg.parameters()), **rates}], config.fit
        )

    def train_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        config, student = self.config.at(step), self.student
        burnt_up = step >= config.burn_up
        if burnt_up:
            self.move_teacher(step)
        size = common_size(batch.weak)  # and of the strong views
        separations = self.separate(batch, burnt_up, size)
        with mixed_precision(student, config.fit):
            view = self.look(student, batch.strong, size, separations, batch.generators)

        losses = {
            name: config.consistent * loss
            for name, loss in view.supervised_losses(student.config).items()
        }
        losses |= {
            name: config.private * loss for name, loss in view.private_losses().items()
        }
        losses["alignment"] = config.alignment * prompt_alignment(
            view.regions.classes, self.consistent_prototypes.values
        )
        ckg_losses: dict[str, Tensor] = {}
        if step >= config.prototypes_from:
            teaches = step >= (
                config.burn_up
                if config.inconsistent_from is None
                else config.inconsistent_from
            )
            if teaches and not config.ckg_first:
                losses |= self.inconsistent_losses(view, config.inconsistent)
            ckg_losses = self.train_ckg(view, step)
            if teaches and config.ckg_first:
                losses |= self.inconsistent_losses(view, config.inconsistent)
        descend(self.optimizer, student, losses, step, config.fit)
        if step >= config.prototypes_from:
            self.update_prototypes(view)
        return losses | ckg_losses | diagnosis.kinds(separations)

    def separate(
        self, batch: Batch, burnt_up: bool, size: tuple[int, int]
    ) -> list[Separation]:
        """Before the burn-up the teacher is frozen: its results are those collected
        once (mirrored with the view). Then it looks, at ``size``.

        What a person says of an image is not up to the teachers.
        """
        results = (
            self.second_opinions(batch, size) if burnt_up else batch.knowledge["clip"]
        )
        clip = [
            Detections.cat(parts)
            for parts in zip(results, batch.knowledge["clip_labels"], strict=True)
        ]
        fuse = self.separation.fused_boxes == "always" or (
            self.separation.fused_boxes == "after_burn_up" and burnt_up
        )
        return [
            (
                Separation.of_labels(ours, reviewed=True)
                if reviewed
                else separate(
                    ours, theirs, self.separation, fuse_boxes=fuse, generator=generator
                )
            )
            for ours, theirs, reviewed, generator in zip(
                batch.knowledge["cloud"],
                clip,
                batch.reviewed,
                batch.generators,
                strict=True,
            )
        ]

    def move_teacher(self, step: int) -> None:
        """A teacher that is not the CLIP detector is the student of the burn-up at
        first.
        """
        start = step == self.config.burn_up and not self.teacher_is_clip
        follow(self.teacher, self.student, 1.0 if start else self.config.teacher_rate)

    def second_opinions(self, batch: Batch, size: tuple[int, int]) -> list[Detections]:
        """The teacher's results. One that is not the CLIP detector does not replace
        what that one saw: of the same object the surer result stays.
        """
        found = self.look_with_teacher(batch.weak, size)
        return (
            found
            if self.teacher_is_clip
            else [
                _surer(*both)
                for both in zip(found, batch.knowledge["clip"], strict=True)
            ]
        )

    def look_with_teacher(
        self, images: Sequence[Tensor], size: tuple[int, int]
    ) -> list[Detections]:
        # forgets its cached class embeddings: its prompts have moved
        self.teacher.eval()
        with mixed_precision(self.teacher, self.config.fit):
            found = self.teacher.predict(self.teacher.prepare(images, size))
        return [d.to(torch.device("cpu")) for d in found]

    def inconsistent_losses(self, view: View, weight: float) -> dict[str, Tensor]:
        per_region = self.config.inconsistent_mean == "regions"
        return {
            name: weight * loss
            for name, loss in view.inconsistent_losses(
                self.answers, per_region=per_region
            ).items()
        }

    def answers(self, embedded: Tensor, pairs: Pairs) -> tuple[Tensor, float]:
        """Fused probabilities [R, K+1] of inconsistent pairs seen as ``embedded`` [R,
        D], and the best probability from which one teaches.
        """
        fused = self.fuse(embedded, pairs.cloud.probs, pairs.clip.probs)
        return fused, self.trusted_from(fused)

    def trusted_from(self, fused: Tensor) -> float:
        """The best probability from which a box of ``fused`` [R, K+1] teaches: pi, or
        with ``fusion_share`` its quantile over all workers.
        """
        share = self.config.fusion_share
        if share is None:
            return self.config.fusion_score_min
        best = gathered(fused.float().max(-1).values)
        return (
            float(best.quantile(1 - share, interpolation="lower"))
            if len(best)
            else self.config.fusion_score_min
        )

    def fuse(self, embedded: Tensor, cloud: Tensor, clip: Tensor) -> Tensor:
        """Fused probabilities [R, K+1] of RoIs with embeddings [R, D] and two opinions
        [R, K+1], by CKG or a rule.
        """
        if self.annotators is not None:
            return self.annotators.posterior(cloud, clip)
        if self.config.fusion in RULES:
            return RULES[self.config.fusion](cloud, clip)
        fused: Tensor = self.ckg(
            embedded,
            (self.cloud_prototypes.normalised(), self.clip_prototypes.normalised()),
            cloud,
            clip,
        )
        return fused

    def train_ckg(self, view: View, step: int) -> dict[str, Tensor]:
        """CKG must name consistent boxes as both teachers do, and pull the student on
        inconsistent boxes where the consistent ones pull it.

        Nothing happens unless the global batch holds RoIs of both kinds.
        """
        totals = view.totals
        if self.config.fusion != "ckg" or not (
            totals.consistent and totals.inconsistent
        ):
            return {}
        losses = {"ckg_consistent": self.misnamed(view)}
        regions, head = view.regions, self.student.head
        answers = F.one_hot(
            view.consistent.cloud.labels, self.student.num_classes + 1
        ).float()
        embedded = regions.embedded[view.on_inconsistent]
        fused = self.fuse(
            embedded, view.inconsistent.cloud.probs, view.inconsistent.clip.probs
        )
        again = head(
            regions.pooled[
                torch.cat([view.on_consistent, view.on_inconsistent])
            ].detach(),
            regions.classes.detach(),
        ).logits
        on_consistent, on_inconsistent = again.split([len(answers), len(fused)])
        losses["ckg_gradient"] = gradient_misalignment(
            squared_error(on_consistent, answers, totals.consistent * view.classes),
            squared_error(on_inconsistent, fused, totals.inconsistent * view.classes),
            list(head.transformation.parameters()),
        )
        shown = diagnosis.whom_ckg_follows(
            fused, view.inconsistent, self.trusted_from(fused), totals.inconsistent
        )
        shown["ckg_spread"] = diagnosis.spread(
            self.ckg.weights(
                embedded,
                (self.cloud_prototypes.normalised(), self.clip_prototypes.normalised()),
            )
        )
        shown["gradient_angle"] = diagnosis.gradient_angle(losses["ckg_gradient"])
        parameters = list(self.ckg.parameters())
        gradients = torch.autograd.grad(
            torch.stack(list(losses.values())).sum(), parameters, allow_unused=True
        )
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        sum_gradients(parameters)
        set_learning_rate(self.ckg_optimizer, step, self.config.fit)
        self.ckg_optimizer.step()
        return losses | shown

    def misnamed(self, view: View) -> Tensor:
        """How far CKG is from naming consistent RoIs as both teachers do; with
        ``ckg_background`` also background RoIs, where both see nothing.
        """
        classes = self.student.num_classes + 1
        rows, labels = (
            (view.labelled, view.labels)
            if self.config.ckg_background
            else (view.on_consistent, view.consistent.cloud.labels)
        )
        answers = F.one_hot(labels, classes).float()
        nothing = answers[len(view.on_consistent) :]
        cloud, clip = (
            torch.cat([opinion.probs, nothing])
            for opinion in (view.consistent.cloud, view.consistent.clip)
        )
        count = (
            view.totals.labelled
            if self.config.ckg_background
            else view.totals.consistent
        )
        return distillation.divergence_of_probabilities(
            self.fuse(view.regions.embedded[rows], cloud, clip),
            answers,
            count * classes,
        )

    def update_prototypes(self, view: View) -> None:
        """Consistent + background for the student's prompts; with inconsistent ones,
        named by either teacher, for CKG.
        """
        rate, embedded = self.config.prototype_rate, view.regions.embedded
        seen = [(self.consistent_prototypes, embedded[view.labelled], view.labels)]
        if view.totals.inconsistent:
            features = embedded[torch.cat([view.labelled, view.on_inconsistent])]
            for prototypes, opinion in (
                (self.cloud_prototypes, view.inconsistent.cloud),
                (self.clip_prototypes, view.inconsistent.clip),
            ):
                seen.append(
                    (prototypes, features, torch.cat([view.labels, opinion.labels]))
                )
        follow_features(seen, rate)

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

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])


def _surer(ours: Detections, theirs: Detections) -> Detections:
    both = Detections.cat([ours, theirs])
    return both[batched_nms(both.boxes, both.scores, both.labels, SAME)]
