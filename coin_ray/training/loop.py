"""The training loop: resume, batches, checkpoints, curves. It depends neither on the
method nor on Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from coin_ray.config import Detector, TrainingConfig
from coin_ray.data.examples import Batch, Example, iterate_batches
from coin_ray.errors import TrainingError
from coin_ray.parallel import all_sum, worker_count, worker_rank

LOG_EVERY = 20

StateDict = dict[str, Any]
"""Networks, optimizers and random generators of a training, as a checkpoint holds them."""


class TrainingTask(Protocol):
    """A method to train: propagation, distillation, a baseline."""

    def train_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Update everything once; return the named losses, weighted, this worker's
        share.
        """

    def to(self, device: torch.device) -> TrainingTask:
        """Move all networks to ``device``; batches stay on the CPU."""

    def state_dict(self) -> StateDict: ...

    def load_state_dict(self, state: StateDict) -> None: ...


class TrainingHost(Protocol):
    """The environment of the loop: a Ray Train worker, a Tune trial, a test."""

    def resume(self) -> StateDict | None:
        """Return the last checkpoint, or None."""

    def report(
        self, step: int, metrics: Mapping[str, float], checkpoint: StateDict | None
    ) -> None:
        """Accept the metrics of a step. All workers call it at the same steps."""


Curve = list[dict[str, float]]


def run_training_loop(
    task: TrainingTask,
    examples: Sequence[Example],
    fit: TrainingConfig,
    detector: Detector,
    *,
    seed: int,
    host: TrainingHost,
) -> Curve:
    """Train from the host's last checkpoint to ``fit.steps``; a finished run returns at
    once. Returns the curve of all steps logged so far.

    Raises TrainingError naming the loss that is not finite.
    """
    if not examples:
        raise TrainingError(
            "nothing to train on: no image has a usable label. Lower labels.score_min"
            " or check the class names"
        )
    first_step, curve = _restore_checkpoint(task, host)
    if first_step >= fit.steps:
        return curve
    batches = iterate_batches(
        examples,
        fit,
        detector,
        seed=seed,
        first=first_step,
        rank=worker_rank(),
        workers=worker_count(),
    )
    for step, batch in enumerate(batches, start=first_step):
        torch.manual_seed(seed * 1_000_003 + step)
        losses = task.train_step(batch, step)
        completed = step + 1
        is_saved = completed % fit.checkpoint_every == 0 or completed == fit.steps
        is_logged = step % LOG_EVERY == 0 or completed == fit.steps
        if not is_saved and not is_logged:
            continue
        metrics = _reduce_losses(losses, step)  # a checkpoint's losses are checked too
        if is_logged:
            curve.append({"step": float(step), **metrics})
        checkpoint = None
        if is_saved:
            checkpoint = {"task": task.state_dict(), "step": completed, "curve": curve}
        host.report(step, metrics, checkpoint)
    return curve


def _restore_checkpoint(task: TrainingTask, host: TrainingHost) -> tuple[int, Curve]:
    """Load the host's last checkpoint, if any, and return the next step and the curve
    so far.
    """
    checkpoint = host.resume()
    if checkpoint is None:
        return 0, Curve()
    task.load_state_dict(checkpoint["task"])
    return checkpoint["step"], checkpoint["curve"]


def _reduce_losses(losses: Mapping[str, Tensor], step: int) -> dict[str, float]:
    """Sum each loss over workers. Raises TrainingError if one is not finite."""
    names = sorted(losses)
    local = torch.stack([losses[name].detach().float() for name in names])
    metrics = dict(zip(names, all_sum(local).tolist(), strict=True))
    not_finite = [name for name in names if not abs(metrics[name]) < float("inf")]
    if not_finite:
        raise TrainingError(
            f"loss {', '.join(not_finite)} is not finite at step {step}: {metrics}."
            " Lower the learning rate (fit.lr) or set fit.clip_gradient"
        )
    return metrics
