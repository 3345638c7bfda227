"""Fusion of both teachers' opinions on inconsistent boxes: CKG trained by aligning
gradients (paper section 3.4), with its prototypes, or a rule.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from coin_ray.config import Distill
from coin_ray.fusion.ckg import ConsistentKnowledge
from coin_ray.fusion.rules import RULES, Annotators
from coin_ray.losses import distillation
from coin_ray.losses.gradient import gradient_misalignment, squared_error
from coin_ray.models.faster_rcnn_clip.model import EmbeddingHead
from coin_ray.models.prototypes import Prototypes, update_prototypes
from coin_ray.parallel import all_gather_rows, all_reduce_gradients
from coin_ray.structures import Pairs
from coin_ray.training import diagnosis
from coin_ray.training.schedule import (
    new_optimizer,
    parameter_group,
    set_learning_rate,
)
from coin_ray.training.student_outputs import Losses, RegionKnowledge


class KnowledgeFusion:
    """Names inconsistent boxes, and trains CKG if the rule is CKG.

    ``embeddings`` [K+1, D]: where the prototypes start.

    ``annotators``: both teachers' error rates, estimated from the training images, for
    ``config.fusion`` dawid_skene.
    """

    def __init__(
        self,
        embeddings: Tensor,
        config: Distill,
        annotators: Annotators | None = None,
    ) -> None:
        if (config.fusion == "dawid_skene") != (annotators is not None):
            raise ValueError(
                "annotators are needed for fusion dawid_skene, and only for it; the"
                f" fusion is {config.fusion}"
            )
        self.config = config
        self.annotators = annotators
        self.consistent_prototypes = Prototypes(embeddings)
        self.cloud_prototypes = Prototypes(embeddings)
        self.clip_prototypes = Prototypes(embeddings)
        classes_with_background, size = embeddings.shape
        self.ckg = ConsistentKnowledge(
            size, classes_with_background - 1, config.ckg_heads
        )
        ckg_group = parameter_group(
            list(self.ckg.parameters()), config.ckg_lr, config.fit.weight_decay
        )
        self.optimizer = new_optimizer([ckg_group], config.fit)

    def parts(self) -> dict[str, Any]:
        """Return what has a state, by its name in a checkpoint."""
        return {
            "ckg": self.ckg,
            "consistent_prototypes": self.consistent_prototypes,
            "cloud_prototypes": self.cloud_prototypes,
            "clip_prototypes": self.clip_prototypes,
            "ckg_optimizer": self.optimizer,
        }

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

    def train(self, outputs: RegionKnowledge, head: EmbeddingHead, step: int) -> Losses:
        """Train CKG to label consistent boxes as both teachers do, and to pull the
        student on inconsistent boxes in the direction of the consistent ones. Return
        its losses and figures.

        Does nothing unless the global batch holds RoIs of both kinds.
        """
        totals = outputs.totals
        has_both_kinds = totals.consistent and totals.inconsistent
        if self.config.fusion != "ckg" or not has_both_kinds:
            return {}
        losses = {"ckg_consistent": self.consistency_loss(outputs)}
        embedded = outputs.regions.embedded[outputs.inconsistent_rows]
        pairs = outputs.inconsistent
        fused = self.fuse(embedded, pairs.cloud.probs, pairs.clip.probs)
        losses["ckg_gradient"] = self._gradient_loss(outputs, head, fused)
        figures = diagnosis.inconsistent_agreement_rates(
            fused, pairs, self.confidence_threshold(fused), totals.inconsistent
        )
        weights = self.ckg.weights(embedded, self._teacher_prototypes())
        figures["ckg_spread"] = diagnosis.ckg_weight_spread(weights)
        figures["gradient_angle"] = diagnosis.gradient_angle(losses["ckg_gradient"])
        self._update(losses, step)
        return losses | figures

    def consistency_loss(self, outputs: RegionKnowledge) -> Tensor:
        """Return the divergence of CKG on consistent RoIs from the label that both
        teachers give; with ``ckg_background`` also on background RoIs, where both
        opinions are background.
        """
        class_count = outputs.class_count
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

    def _gradient_loss(
        self, outputs: RegionKnowledge, head: EmbeddingHead, fused: Tensor
    ) -> Tensor:
        """Return the misalignment of the region head's gradients on inconsistent RoIs,
        taught by ``fused`` [B, K+1], and on consistent ones.
        """
        regions, totals = outputs.regions, outputs.totals
        labels = F.one_hot(outputs.consistent.cloud.labels, outputs.class_count).float()
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

    def _update(self, losses: Losses, step: int) -> None:
        """Take one step of CKG's optimizer; the student's gradients stay as they are."""
        parameters = list(self.ckg.parameters())
        total = torch.stack(list(losses.values())).sum()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        all_reduce_gradients(parameters)
        set_learning_rate(self.optimizer, step, self.config.fit)
        self.optimizer.step()

    def update_prototypes(self, outputs: RegionKnowledge) -> None:
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
