"""Supervised training of Co-DETR, and of detectors with an auxiliary ATSS head, on
labelled images.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from coin_ray.config import TrainingConfig
from coin_ray.config.detector_training import DetectorConfig
from coin_ray.data.examples import Batch
from coin_ray.models.co_detr.collaborative import CollaborativeDetr, Objective
from coin_ray.models.co_detr.targets import DetrTargets
from coin_ray.models.co_detr.transformers_detr import CollaborativeTransformersDetr
from coin_ray.parallel import all_sum, worker_rank
from coin_ray.structures import Detections
from coin_ray.training.ema import ema_update
from coin_ray.training.loop import StateDict
from coin_ray.training.schedule import (
    apply_gradients,
    mixed_precision,
    new_optimizer,
    parameter_group,
)

logger = logging.getLogger(__name__)
OBJECTS = "objects"
Model = CollaborativeDetr | CollaborativeTransformersDetr


class SupervisedTraining:
    """``steps_per_epoch``: after as many steps it warns of heads without positives."""

    def __init__(
        self,
        model: Model,
        config: DetectorConfig,
        fit: TrainingConfig,
        steps_per_epoch: int,
    ) -> None:
        self.model = model.train()
        self.config = config
        self.fit = fit
        self.steps_per_epoch = steps_per_epoch
        self.average = None
        if config.average:
            self.average = copy.deepcopy(model).requires_grad_(False)
        self.optimizer = new_optimizer(parameter_groups(model, fit), fit)
        self.positive_counts: Counter[str] = Counter()

    @property
    def final_model(self) -> Model:
        """The model to keep: averaged, if there is an average."""
        return self.model if self.average is None else self.average

    def train_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Accumulate the gradients of all parts of the batch and take one step. Return
        the losses by component.

        Batches need ``labels`` (scores are weights) and ``ignored``.
        """
        self.optimizer.zero_grad()
        targets = [
            supervised_targets(labels, ignored)
            for labels, ignored in zip(
                batch.detections["labels"], batch.detections["ignored"], strict=True
            )
        ]
        size = len(targets) // self.config.accumulate
        positives: Counter[str] = Counter()
        losses: dict[str, Tensor] = {}
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            objective = self._accumulate_gradients(
                batch.strong[part], targets[part], batch.generators[start]
            )
            positives.update(objective.positives)
            for name, loss in sum_losses_by_component(objective).items():
                previous = losses.get(name, loss.new_zeros(()))
                losses[name] = previous + loss / self.config.accumulate
        self._update_weights(step)
        positives[OBJECTS] = sum(len(t.labels) for t in targets)
        self._warn_without_positives(positives, step)
        return losses

    def _accumulate_gradients(
        self,
        images: Sequence[Tensor],
        targets: Sequence[DetrTargets],
        generator: torch.Generator,
    ) -> Objective:
        with mixed_precision(self.model, self.fit):
            objective = self.model.objective(
                self.model.base.prepare(images), targets, generator
            )
        loss = objective.total / self.config.accumulate
        loss.backward()  # type: ignore[no-untyped-call]
        return objective

    def _update_weights(self, step: int) -> None:
        apply_gradients(self.optimizer, self.model, step, self.fit)
        if self.average is not None:
            rate = max(1 - self.config.average, 1 / (step + 1))
            ema_update(self.average, self.model, rate)

    def _warn_without_positives(self, counts: Counter[str], step: int) -> None:
        """Count positives; at the end of an epoch warn of heads that had none."""
        self.positive_counts.update(
            {name: counts[name] for name in (OBJECTS, *self.model.heads)}
        )
        if (step + 1) % self.steps_per_epoch:
            return
        names = sorted(self.positive_counts)
        local_counts = torch.tensor([float(self.positive_counts[n]) for n in names])
        self.positive_counts = Counter()
        global_counts = all_sum(local_counts).long().tolist()
        positives = dict(zip(names, global_counts, strict=True))
        objects = positives.pop(OBJECTS)
        idle = [name for name, count in positives.items() if not count]
        if worker_rank() != 0 or (objects and not idle):
            return
        listed = ", ".join(f"{name} {count}" for name, count in positives.items())
        logger.warning(
            "epoch %d: %s saw no positive. Objects: %d; positives: %s. Are classes,"
            " boxes and the size of images right?",
            (step + 1) // self.steps_per_epoch,
            " and ".join(idle) or "the decoder",
            objects,
            listed or "no auxiliary head",
        )

    def to(self, device: torch.device) -> SupervisedTraining:
        self.model.to(device)
        if self.average is not None:
            self.average.to(device)
        return self

    def state_dict(self) -> StateDict:
        average = {} if self.average is None else self.average.state_dict()
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": average,
            "seen": dict(self.positive_counts),
        }

    def load_state_dict(self, state: StateDict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.positive_counts = Counter(state["seen"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])


def supervised_targets(labels: Detections, ignored: Detections) -> DetrTargets:
    """Convert labels to targets; their scores become weights."""
    return DetrTargets(labels.boxes, labels.labels, labels.scores, ignored.boxes)


def sum_losses_by_component(objective: Objective) -> dict[str, Tensor]:
    """Sum the losses by component: decoder, proposals, each head, each group of
    queries.
    """
    sums: dict[str, Tensor] = {}
    for name, loss in objective.losses.items():
        head, *suffixes = name.split("_")
        component = f"{head}_queries" if suffixes[0] == "queries" else head
        previous = sums.get(component, loss.new_zeros(()))
        sums[component] = previous + loss.detach()
    return sums


def parameter_groups(model: Model, fit: TrainingConfig) -> list[dict[str, object]]:
    """Group the parameters: the backbone learns at ``visual_lr_factor``, sampling
    offsets at a tenth, as published; norms and biases decay like all others.
    """
    rates = {
        "backbone": fit.lr * fit.visual_lr_factor,
        "offsets": fit.lr / 10,
        "other": fit.lr,
    }
    parameters: dict[str, list[nn.Parameter]] = {part: [] for part in rates}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            parameters[_part_of(name)].append(weight)
    return [
        parameter_group(parameters[part], rate, fit.weight_decay)
        for part, rate in rates.items()
        if parameters[part]
    ]


def _part_of(name: str) -> str:
    """Return the part of a model that the parameter ``name`` belongs to."""
    if ".backbone." in name:
        return "backbone"
    return "offsets" if ".offsets." in name else "other"
