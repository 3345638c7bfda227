"""Knowledge dissemination: the CLIP detector learns cloud boxes with CLIP labels (paper
section 3.2).

Plain pseudo-labels and the oracle are the same training with other labels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from coin_ray.config import Propagate
from coin_ray.data.examples import Batch
from coin_ray.losses.alignment import prompt_alignment
from coin_ray.losses.supervised import region_soft_class
from coin_ray.models.co_detr.regional import RegionalDetr
from coin_ray.models.faster_rcnn_clip.model import ClipDetector
from coin_ray.models.prototypes import Prototypes
from coin_ray.structures import Separation
from coin_ray.training.loop import StateDict
from coin_ray.training.schedule import make_optimizer, mixed_precision, optimizer_step
from coin_ray.training.student_outputs import (
    StudentForward,
    StudentOutputs,
    common_size,
    forward_student,
)


class Propagation:
    """``forward_student``: the function for detectors of this kind."""

    def __init__(
        self,
        detector: ClipDetector | RegionalDetr,
        embeddings: Tensor,
        config: Propagate,
        forward_student: StudentForward = forward_student,
    ) -> None:
        self.detector = detector.train()
        self.config = config
        self.forward_student = forward_student
        self.prototypes = Prototypes(embeddings)
        self.optimizer = make_optimizer(detector, config.fit)

    def train_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        outputs = self._forward(batch)
        losses = outputs.supervised_losses(self.detector.config)
        if self.config.soft_labels:
            losses["consistent"] = region_soft_class(
                outputs.regions.logits[outputs.labelled_rows],
                self.soft_targets(outputs),
                outputs.totals.labelled,
            )
        alignment = prompt_alignment(outputs.regions.classes, self.prototypes.values)
        losses["alignment"] = self.config.alignment * alignment
        optimizer_step(self.optimizer, self.detector, losses, step, self.config.fit)
        if step >= self.config.prototypes_from:
            self.prototypes.update(
                outputs.regions.embedded[outputs.labelled_rows],
                outputs.labels,
                self.config.prototype_rate,
            )
        return losses

    def _forward(self, batch: Batch) -> StudentOutputs:
        """Forward the strong images, and with ``views: both`` the weak ones too."""
        images, generators = batch.strong, batch.generators
        separations = [
            Separation.from_labels(labels, reviewed=reviewed)
            for labels, reviewed in zip(
                batch.detections["labels"], batch.reviewed, strict=True
            )
        ]
        if self.config.views == "both":
            images = images + batch.weak
            separations = separations * 2
            generators = generators * 2
        with mixed_precision(self.detector, self.config.fit):
            return self.forward_student(
                self.detector, images, common_size(images), separations, generators
            )

    def soft_targets(self, outputs: StudentOutputs) -> Tensor:
        """Return the class vectors [A + G, K+1] of the boxes that labelled RoIs match;
        background RoIs are background.
        """
        classes = self.detector.num_classes + 1
        labels = torch.full_like(outputs.background_rows, classes - 1)
        background = F.one_hot(labels, classes).float()
        return torch.cat([outputs.consistent.clip.probs, background])

    def to(self, device: torch.device) -> Propagation:
        self.detector.to(device)
        self.prototypes.to(device)
        return self

    def state_dict(self) -> StateDict:
        return {
            "detector": self.detector.state_dict(),
            "prototypes": self.prototypes.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: StateDict) -> None:
        self.detector.load_state_dict(state["detector"])
        self.prototypes.load_state_dict(state["prototypes"])
        self.optimizer.load_state_dict(state["optimizer"])
