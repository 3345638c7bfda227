"""Knowledge dissemination: the CLIP detector learns cloud boxes with CLIP labels (paper section 3.2).

Plain pseudo-labels and the oracle are the same training with other labels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from coin_ray.config import Propagate
from coin_ray.data.examples import Batch
from coin_ray.losses.alignment import prompt_alignment
from coin_ray.models.faster_rcnn_clip.model import ClipDetector
from coin_ray.models.prototypes import Prototypes
from coin_ray.parallel import sum_gradients
from coin_ray.training.schedule import make_optimizer, set_learning_rate
from coin_ray.training.view import as_consistent, look, supervised_losses


class Propagation:
    def __init__(self, detector: ClipDetector, embeddings: Tensor, config: Propagate) -> None:
        self.detector, self.config = detector.train(), config
        self.prototypes = Prototypes(embeddings)
        self.optimizer = make_optimizer(detector, config.fit)

    def train_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        images, labels, generators = batch.strong, batch.knowledge["labels"], batch.generators
        if self.config.views == "both":
            images, labels, generators = images + batch.weak, labels * 2, generators * 2
        view = look(self.detector, images, [as_consistent(kept) for kept in labels], generators)
        losses = supervised_losses(self.detector, view)
        losses["alignment"] = self.config.alignment * prompt_alignment(self.detector.class_embeddings(), self.prototypes.values)
        descend(self.optimizer, self.detector, losses, step, self.config.fit)
        if step >= self.config.prototypes_from:
            self.prototypes.update(view.regions.embedded[view.labelled], view.labels, self.config.prototype_rate)
        return losses

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


def descend(optimizer: torch.optim.Optimizer, model: nn.Module, losses: dict[str, Tensor], step: int, fit: Any) -> None:
    """One optimizer step on the sum of ``losses``, gradients summed over workers."""
    optimizer.zero_grad()
    torch.stack(list(losses.values())).sum().backward()
    sum_gradients(model.parameters())
    if fit.clip_gradient is not None:
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], fit.clip_gradient)
    set_learning_rate(optimizer, step, fit)
    optimizer.step()
