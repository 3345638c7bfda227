"""Knowledge dissemination: the CLIP detector learns cloud boxes with CLIP labels (paper
section 3.2).

Plain pseudo-labels and the oracle are the same training with other labels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coin_ray.config import Propagate, TrainingConfig
from coin_ray.data.examples import Batch
from coin_ray.losses.alignment import prompt_alignment
from coin_ray.losses.supervised import region_soft_class
from coin_ray.models.co_detr.regional import RegionalDetr
from coin_ray.models.faster_rcnn_clip.model import ClipDetector
from coin_ray.models.prototypes import Prototypes
from coin_ray.parallel import sum_gradients
from coin_ray.structures import Separation
from coin_ray.training.schedule import make_optimizer, set_learning_rate
from coin_ray.training.student_outputs import Look, View, common_size, look


class Propagation:
    """``look``: the one for detectors of this kind."""

    def __init__(
        self,
        detector: ClipDetector | RegionalDetr,
        embeddings: Tensor,
        config: Propagate,
        look: Look = look,
    ) -> None:
        self.detector, self.config, self.look = detector.train(), config, look
        self.prototypes = Prototypes(embeddings)
        self.optimizer = make_optimizer(detector, config.fit)

    def train_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        images, generators = batch.strong, batch.generators
        labels = [
            Separation.of_labels(kept, reviewed=sure)
            for kept, sure in zip(
                batch.knowledge["labels"], batch.reviewed, strict=True
            )
        ]
        if self.config.views == "both":
            images, labels, generators = images + batch.weak, labels * 2, generators * 2
        with mixed_precision(self.detector, self.config.fit):
            view = self.look(
                self.detector, images, common_size(images), labels, generators
            )
        losses = view.supervised_losses(self.detector.config)
        if self.config.soft_labels:
            losses["consistent"] = region_soft_class(
                view.regions.logits[view.labelled],
                self.soft_targets(view),
                view.totals.labelled,
            )
        losses["alignment"] = self.config.alignment * prompt_alignment(
            view.regions.classes, self.prototypes.values
        )
        descend(self.optimizer, self.detector, losses, step, self.config.fit)
        if step >= self.config.prototypes_from:
            self.prototypes.update(
                view.regions.embedded[view.labelled],
                view.labels,
                self.config.prototype_rate,
            )
        return losses

    def soft_targets(self, view: View) -> Tensor:
        """[A + G, K+1] class vectors of the boxes that RoIs lie on; background RoIs are
        background.
        """
        classes = self.detector.num_classes + 1
        background = F.one_hot(
            torch.full_like(view.on_background, classes - 1), classes
        )
        return torch.cat([view.consistent.clip.probs, background.float()])

    def to(self, device: torch.device) -> Propagation:
        self.detector.to(device)
        self.prototypes.to(device)
        return self

    def state_dict(self) -> dict[str, Any]:
        return {
            "detector": self.detector.state_dict(),
            "prototypes": self.prototypes.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.detector.load_state_dict(state["detector"])
        self.prototypes.load_state_dict(state["prototypes"])
        self.optimizer.load_state_dict(state["optimizer"])


def mixed_precision(model: nn.Module, fit: TrainingConfig) -> torch.autocast:
    """The forward pass in bfloat16, if ``fit.amp``; boxes, losses and weights stay in
    float32.
    """
    return torch.autocast(
        next(model.parameters()).device.type, torch.bfloat16, enabled=fit.amp
    )


def descend(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    losses: dict[str, Tensor],
    step: int,
    fit: TrainingConfig,
) -> None:
    """One optimizer step on the sum of ``losses``, gradients summed over workers."""
    optimizer.zero_grad()
    torch.stack(list(losses.values())).sum().backward()
    sum_gradients(model.parameters())
    if fit.clip_gradient is not None:
        nn.utils.clip_grad_norm_(
            [p for p in model.parameters() if p.grad is not None], fit.clip_gradient
        )
    set_learning_rate(optimizer, step, fit)
    optimizer.step()
