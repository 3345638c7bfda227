"""The one training loop: resume, batches, checkpoints, curves. It knows neither the
method nor Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from coin_ray.config import Detector, TrainingConfig
from coin_ray.data.examples import Batch, Example, batches
from coin_ray.errors import TrainingError
from coin_ray.parallel import all_sum, worker_count, worker_rank

LOG_EVERY = 20


class Task(Protocol):
    """What is trained: propagation, distillation, a baseline."""

    def train_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Update everything once; return the named loss parts, weighted, this worker's
        share.
        """

    def to(self, device: torch.device) -> Task:
        """Moved there whole; batches stay on the CPU."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Host(Protocol):
    """Where the loop runs: a Ray Train worker, a Tune trial, a test."""

    def resume(self) -> dict[str, Any] | None:
        """The last checkpoint, or None."""

    def report(
        self, step: int, metrics: Mapping[str, float], checkpoint: dict[str, Any] | None
    ) -> None:
        """Called by all workers at the same steps."""


Curve = list[dict[str, float]]


def run(
    task: Task,
    examples: Sequence[Example],
    fit: TrainingConfig,
    detector: Detector,
    *,
    seed: int,
    host: Host,
) -> Curve:
    """Train from the host's last checkpoint to ``fit.steps``; a finished run returns at
    once. Returns the curve of all steps logged so far.

    Raises TrainingError naming the part when a loss is not finite.
    """
    if not examples:
        raise TrainingError(
            "nothing to train on: no image has a usable label. Lower collect.score_min"
            " or check the class names"
        )
    state = host.resume()
    first, curve = 0, Curve()
    if state is not None:
        task.load_state_dict(state["task"])
        first, curve = state["step"], state["curve"]
    source = (
        batches(
            examples,
            fit,
            detector,
            seed=seed,
            first=first,
            rank=worker_rank(),
            workers=worker_count(),
        )
        if first < fit.steps
        else ()
    )
    for step, batch in enumerate(source, start=first):
        torch.manual_seed(seed * 1_000_003 + step)
        parts = task.train_step(batch, step)
        done = step + 1
        saved = done % fit.checkpoint_every == 0 or done == fit.steps
        logged = step % LOG_EVERY == 0 or done == fit.steps
        if not saved and not logged:
            continue
        metrics = _global_values(parts, step)  # a step that is saved is checked
        if logged:
            curve.append({"step": float(step), **metrics})
        host.report(
            step,
            metrics,
            (
                {"task": task.state_dict(), "step": done, "curve": curve}
                if saved
                else None
            ),
        )
    return curve


def _global_values(parts: Mapping[str, Tensor], step: int) -> dict[str, float]:
    names = sorted(parts)
    values = all_sum(torch.stack([parts[n].detach().float() for n in names])).tolist()
    metrics = dict(zip(names, values, strict=True))
    wrong = [n for n in names if not abs(metrics[n]) < float("inf")]
    if wrong:
        raise TrainingError(
            f"loss {', '.join(wrong)} is not finite at step {step}: {metrics}. Lower"
            " the learning rate or set clip_gradient"
        )
    return metrics
