"""A training task as a Ray Train run that resumes itself: fixed name, checkpoints below the step's folder."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer

from coin_ray import storage
from coin_ray.config import Detector, Optimize
from coin_ray.data.examples import Example
from coin_ray.parallel import worker_rank
from coin_ray.stages.cluster import cluster_cpus, ensure_ray
from coin_ray.stages.progress import bar
from coin_ray.training.loop import Curve, Task, run

STATE = "state.pt"
CLUSTER_RETRIES = 3
"""Lost workers after which a fit on a cluster gives up. On one machine an error is an error."""


@dataclass(frozen=True)
class Fit:
    """What a Ray Train worker needs. ``make``: builds the task on the worker; ``finish``: what to keep of it, by file name."""

    make: Callable[[], Task]
    finish: Callable[[Task], dict[str, dict[str, torch.Tensor]]]
    examples: Sequence[Example]
    optimize: Optimize
    detector: Detector
    seed: int
    folder: str


def fit(title: str, work: Fit) -> Curve:
    """Train, or go on where a killed run stopped; writes ``finish``'s weights and ``curve.json`` into the folder. Returns the curve."""
    ensure_ray()
    workers = work.optimize.workers
    resources: dict[str, float] = {"CPU": max(1, cluster_cpus() // workers)} if not work.optimize.gpu else {"CPU": 1, "GPU": 1}
    with bar(title, work.optimize.steps) as shown:
        trainer = TorchTrainer(
            _train_worker,
            train_loop_config={"work": work},
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=work.optimize.gpu, resources_per_worker=resources),
            run_config=RunConfig(
                name="train",
                storage_path=work.folder,
                checkpoint_config=CheckpointConfig(num_to_keep=2),
                failure_config=FailureConfig(max_failures=CLUSTER_RETRIES if os.environ.get("RAY_ADDRESS") else 0),
                callbacks=[_Progress(work.optimize.steps)],
            ),
        )
        trainer.fit()
        shown.update(work.optimize.steps)
    curve: Curve = storage.read_json(storage.join(work.folder, "curve.json"))
    return curve


class _Progress(UserCallback):  # type: ignore[misc]
    """Runs on the controller: a line with the losses now and then."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        values = metrics[0]
        if "step" in values:
            losses = " ".join(f"{k} {v:.3f}" for k, v in values.items() if k != "step")
            print(f"step {int(values['step']) + 1}/{self.steps}: {losses}", flush=True)


def _train_worker(config: dict[str, Any]) -> None:
    work: Fit = config["work"]
    if not work.optimize.gpu:
        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "0")) or (os.cpu_count() or 1) // work.optimize.workers))
    task = work.make()
    curve = run(task, work.examples, work.optimize, work.detector, seed=work.seed, host=_RayHost())
    if worker_rank() == 0:
        for name, weights in work.finish(task).items():
            save_weights(storage.join(work.folder, name), weights)
        storage.write_json(storage.join(work.folder, "curve.json"), curve)


class _RayHost:
    """The training loop's host inside a Ray Train worker."""

    def resume(self) -> dict[str, Any] | None:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return None
        with checkpoint.as_directory() as folder:
            state: dict[str, Any] = torch.load(os.path.join(folder, STATE), weights_only=True)
        return state

    def report(self, step: int, metrics: Mapping[str, float], checkpoint: dict[str, Any] | None) -> None:
        values = {"step": float(step), **metrics} if metrics else {}
        if checkpoint is None:
            ray.train.report(values)
            return
        with tempfile.TemporaryDirectory() as folder:
            if worker_rank() == 0:
                torch.save(checkpoint, os.path.join(folder, STATE))
                ray.train.report(values, checkpoint=Checkpoint.from_directory(folder))
            else:
                ray.train.report(values)


def save_weights(uri: str, weights: Mapping[str, torch.Tensor]) -> None:
    buffer = io.BytesIO()
    torch.save(dict(weights), buffer)
    storage.write_bytes(uri, buffer.getvalue())


def load_weights(uri: str) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = torch.load(io.BytesIO(storage.read_bytes(uri)), weights_only=True)
    return weights
