"""Train a student that was a detector before with ``Targets``: one loss, one step, and a
moving average of the weights, which is the student that is delivered.

The learning rate must not destroy what the student knows: its pretrained trunk learns
at ``fit.visual_lr_factor`` of the rate, and its batch norms keep their statistics.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from coin_ray.config import Distill, Separate, TrainingConfig
from coin_ray.data.examples import Batch
from coin_ray.fusion.rules import RULES, Annotators
from coin_ray.models.students.base import DetectorStudent
from coin_ray.structures import Targets
from coin_ray.training import diagnosis
from coin_ray.training.ema import ema_update
from coin_ray.training.loop import StateDict
from coin_ray.training.schedule import (
    mixed_precision,
    new_optimizer,
    optimizer_step,
    parameter_group,
)
from coin_ray.training.separation_targets import (
    Fuse,
    label_targets,
    make_targets,
    separate_batch,
)
from coin_ray.training.zoom import zoom_randomly

BatchTargets = tuple[list[Targets], dict[str, Tensor]]
"""The targets of each image of a batch, and figures for the curve."""
MakeBatchTargets = Callable[[Batch], BatchTargets]
LossesAndFigures = tuple[dict[str, Tensor], dict[str, Tensor]]
LEARNING_NORMS = (nn.modules.batchnorm._BatchNorm,)


class StudentTraining(ABC):
    """The steps of a student and of its average.

    ``average_rate``: share of the student in the average per step, after the first
    steps, in which the average is the plain mean. ``frozen_norms``: batch norms keep
    their statistics. ``zoom``: range of factors by which images are scaled at random.
    """

    def __init__(
        self,
        student: DetectorStudent,
        fit: TrainingConfig,
        *,
        average_rate: float,
        frozen_norms: bool,
        zoom: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        # convolutions are faster with the channels last, twice as fast with fit.amp
        cast("nn.Module", student).to(memory_format=torch.channels_last)
        self.student = student
        self.fit = fit
        self.average_rate = average_rate
        self.frozen_norms = frozen_norms
        self.zoom = zoom
        self.average = copy.deepcopy(student).eval().requires_grad_(False)
        self.optimizer = new_optimizer(target_parameter_groups(student, fit), fit)

    @abstractmethod
    def compute_losses(self, batch: Batch, step: int) -> LossesAndFigures:
        """Return the losses of a step, and figures for the curve."""

    def learning_module(self) -> nn.Module:
        """Return the module of all parameters that the optimizer moves."""
        return cast("nn.Module", self.student)

    def train_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        set_training_mode(self.student, frozen_norms=self.frozen_norms)
        losses, figures = self.compute_losses(batch, step)
        optimizer_step(self.optimizer, self.learning_module(), losses, step, self.fit)
        rate = max(self.average_rate, 1 / (step + 1))
        average, student = cast("list[nn.Module]", [self.average, self.student])
        ema_update(average, student, rate)
        return losses | figures

    def _parts(self) -> dict[str, Any]:
        return {
            "student": self.student,
            "average": self.average,
            "optimizer": self.optimizer,
        }

    def to(self, device: torch.device) -> Self:
        self.student.to(device)
        self.average.to(device)
        return self

    def state_dict(self) -> StateDict:
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: StateDict) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])


class TargetTraining(StudentTraining):
    """``make_batch_targets``: what the strong images of a batch teach."""

    def __init__(
        self,
        student: DetectorStudent,
        make_batch_targets: MakeBatchTargets,
        fit: TrainingConfig,
        *,
        average_rate: float,
        frozen_norms: bool,
        zoom: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        super().__init__(
            student,
            fit,
            average_rate=average_rate,
            frozen_norms=frozen_norms,
            zoom=zoom,
        )
        self.make_batch_targets = make_batch_targets

    def compute_losses(self, batch: Batch, step: int) -> LossesAndFigures:
        targets, figures = self.make_batch_targets(batch)
        images, targets = zoom_batch(batch, targets, self.zoom)
        with mixed_precision(self.learning_module(), self.fit):
            losses = self.student.losses(images, targets)
        return losses, figures


def set_training_mode(student: DetectorStudent, *, frozen_norms: bool) -> None:
    """Set a student to training, with ``frozen_norms`` all but the statistics of its
    batch norms.
    """
    student.train()
    if frozen_norms:
        for module in student.modules():
            if isinstance(module, LEARNING_NORMS):
                module.eval()


def zoom_batch(
    batch: Batch, targets: Sequence[Targets], zoom: tuple[float, float]
) -> tuple[list[Tensor], list[Targets]]:
    """Return the strong images and their targets, each at a random size."""
    zoomed = [
        zoom_randomly(image, image_targets, zoom, generator)
        for image, image_targets, generator in zip(
            batch.strong, targets, batch.generators, strict=True
        )
    ]
    return [image for image, _ in zoomed], [targets for _, targets in zoomed]


def target_parameter_groups(
    student: DetectorStudent, fit: TrainingConfig
) -> list[dict[str, object]]:
    """Group the parameters: the trunk learns at ``visual_lr_factor``; norms and biases
    do not decay.
    """
    parts = student.parameter_parts()
    groups: list[dict[str, object]] = []
    for parameters, factor in ((parts.trunk, fit.visual_lr_factor), (parts.head, 1.0)):
        for decays in (True, False):
            selected = [
                parameter
                for parameter in parameters
                if parameter.requires_grad and (parameter.ndim > 1) == decays
            ]
            decay = fit.weight_decay if decays else 0.0
            if selected and factor > 0:
                groups.append(parameter_group(selected, fit.lr * factor, decay))
    return groups


def separation_targets(
    config: Distill, separation: Separate, annotators: Annotators | None = None
) -> MakeBatchTargets:
    """Return the function that makes targets of both teachers' detections in a batch:
    it separates them, and fuses opinions by the rule ``config.fusion``.
    """
    if (config.fusion == "dawid_skene") != (annotators is not None):
        raise ValueError(
            "annotators are needed for fusion dawid_skene, and only for it; the fusion"
            f" is {config.fusion}"
        )
    fuse: Fuse = annotators.posterior if annotators else RULES[config.fusion]
    fuse_boxes = separation.fused_boxes == "always"

    def make_batch_targets(batch: Batch) -> BatchTargets:
        separations = separate_batch(
            batch, batch.detections["clip"], separation, fuse_boxes=fuse_boxes
        )
        targets = [make_targets(s, config.targets, fuse) for s in separations]
        return targets, diagnosis.count_boxes_by_kind(separations)

    return make_batch_targets


def plain_targets(batch: Batch) -> BatchTargets:
    """Return the labels of a batch as certain targets."""
    return [label_targets(labels) for labels in batch.detections["labels"]], {}
