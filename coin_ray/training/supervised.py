"""Supervised training of Co-DETR, and of detectors with its ATSS head beside them, on
labelled images.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coin_ray.config import TrainingConfig
from coin_ray.config.detector_training import DetectorConfig
from coin_ray.data.examples import Batch
from coin_ray.models.co_detr.collaborative import CollaborativeDetr, Objective
from coin_ray.models.co_detr.targets import Targets
from coin_ray.models.co_detr.transformers_detr import CoTrained
from coin_ray.parallel import all_sum, sum_gradients, worker_rank
from coin_ray.structures import Detections
from coin_ray.training.ema import follow
from coin_ray.training.propagate import mixed_precision
from coin_ray.training.schedule import new_optimizer, set_learning_rate

logger = logging.getLogger(__name__)
OBJECTS = "objects"
Model = CollaborativeDetr | CoTrained


class Supervised:
    """``epoch``: steps after which heads that saw no positive are told."""

    def __init__(
        self, model: Model, config: DetectorConfig, fit: TrainingConfig, epoch: int
    ) -> None:
        self.model, self.config, self.fit, self.epoch = (
            model.train(),
            config,
            fit,
            epoch,
        )
        self.average = (
            copy.deepcopy(model).requires_grad_(False) if config.average else None
        )
        self.optimizer = new_optimizer(groups(model, fit), fit)
        self.seen: Counter[str] = Counter()

    @property
    def shipped(self) -> Model:
        """The model to keep: averaged, if there is an average."""
        return self.model if self.average is None else self.average

    def train_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Losses by component; batches need ``labels`` (scores are weights) and
        ``ignored``.
        """
        self.optimizer.zero_grad()
        targets = [
            target(own, left)
            for own, left in zip(
                batch.knowledge["labels"], batch.knowledge["ignored"], strict=True
            )
        ]
        size = len(targets) // self.config.accumulate
        total: Counter[str] = Counter()
        losses: dict[str, Tensor] = {}
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            found = self._learn(
                batch.strong[part], targets[part], batch.generators[start]
            )
            total.update(found.positives)
            for name, value in components(found).items():
                losses[name] = (
                    losses.get(name, value.new_zeros(()))
                    + value / self.config.accumulate
                )
        self._descend(step)
        total[OBJECTS] = sum(len(t.labels) for t in targets)
        self._watch(total, step)
        return losses

    def _learn(
        self,
        images: Sequence[Tensor],
        targets: Sequence[Targets],
        generator: torch.Generator,
    ) -> Objective:
        with mixed_precision(self.model, self.fit):
            found = self.model.objective(
                self.model.base.prepare(images), targets, generator
            )
        (found.total / self.config.accumulate).backward()  # type: ignore[no-untyped-call]
        return found

    def _descend(self, step: int) -> None:
        sum_gradients(self.model.parameters())
        if self.fit.clip_gradient is not None:
            nn.utils.clip_grad_norm_(
                [p for p in self.model.parameters() if p.grad is not None],
                self.fit.clip_gradient,
            )
        set_learning_rate(self.optimizer, step, self.fit)
        self.optimizer.step()
        if self.average is not None:
            follow(
                self.average, self.model, max(1 - self.config.average, 1 / (step + 1))
            )

    def _watch(self, counts: Counter[str], step: int) -> None:
        """Count positives; at the end of an epoch tell which heads had none."""
        self.seen.update({name: counts[name] for name in (OBJECTS, *self.model.heads)})
        if (step + 1) % self.epoch:
            return
        names = sorted(self.seen)
        found = dict(
            zip(
                names,
                all_sum(torch.tensor([float(self.seen[n]) for n in names]))
                .long()
                .tolist(),
                strict=True,
            )
        )
        self.seen = Counter()
        objects = found.pop(OBJECTS)
        idle = [name for name, count in found.items() if not count]
        if worker_rank() == 0 and (idle or not objects):
            heads = (
                ", ".join(f"{name} {count}" for name, count in found.items())
                or "no auxiliary head"
            )
            logger.warning(
                "epoch %d: %s saw no positive. Objects: %d; positives: %s. Are classes,"
                " boxes and the size of images right?",
                (step + 1) // self.epoch,
                " and ".join(idle) or "the decoder",
                objects,
                heads,
            )

    def to(self, device: torch.device) -> Supervised:
        self.model.to(device)
        if self.average is not None:
            self.average.to(device)
        return self

    def state_dict(self) -> dict[str, Any]:
        average = {} if self.average is None else self.average.state_dict()
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": average,
            "seen": dict(self.seen),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.seen = Counter(state["seen"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])


def target(labels: Detections, ignored: Detections) -> Targets:
    """Scores are weights."""
    return Targets(labels.boxes, labels.labels, labels.scores, ignored.boxes)


def components(found: Objective) -> dict[str, Tensor]:
    """The losses' sums by component: decoder, proposals, each head, each group of
    queries.
    """
    sums: dict[str, Tensor] = {}
    for name, value in found.losses.items():
        first, *rest = name.split("_")
        part = f"{first}_queries" if rest[0] == "queries" else first
        sums[part] = sums.get(part, value.new_zeros(())) + value.detach()
    return sums


def groups(model: Model, fit: TrainingConfig) -> list[dict[str, object]]:
    """The backbone learns at ``visual_lr_factor``, sampling offsets at a tenth, as
    published; norms and biases decay as all else.
    """
    rates = {
        "backbone": fit.lr * fit.visual_lr_factor,
        "offsets": fit.lr / 10,
        "": fit.lr,
    }
    chosen: dict[str, list[nn.Parameter]] = {part: [] for part in rates}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            chosen[
                (
                    "backbone"
                    if ".backbone." in name
                    else "offsets"
                    if ".offsets." in name
                    else ""
                )
            ].append(weight)
    return [
        {
            "params": own,
            "lr": rates[part],
            "base_lr": rates[part],
            "weight_decay": fit.weight_decay,
        }
        for part, own in chosen.items()
        if own
    ]
