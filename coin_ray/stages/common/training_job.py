"""A training task under Ray Train. State goes to the step's folder as one atomic file,
so a run resumes itself wherever it died.

On one machine without a cluster the worker is this very process (Ray Train's local
mode: no actors to start). On a cluster it is a group of workers that Ray restarts.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from coin_ray import storage
from coin_ray.config import Detector, TrainingConfig
from coin_ray.data.examples import Example
from coin_ray.errors import TrainingError
from coin_ray.parallel import worker_count, worker_rank
from coin_ray.stages.common.cluster import (
    cluster_cpus,
    ensure_ray,
    full_disk,
    largest_node_cpus,
    on_cluster,
    quiet,
    threads,
)
from coin_ray.stages.common.progress import Bar, bar
from coin_ray.stages.common.watchdog import Watch
from coin_ray.training import diagnosis
from coin_ray.training.loop import Curve, Task, run

CLUSTER_RETRIES = 3
"""Lost workers after which Ray Train gives up; a fit on a cluster then begins again if
it has got on meanwhile."""
OURS = "coin_ray.errors."
"""In the text of an error that another try would meet again."""
STATE = "state.pt"
"""The last state of an unfinished fit, in its folder."""
Tell = Callable[[int, Mapping[str, float], dict[str, Any] | None], None]
"""Told of a logged or saved step (counted from 0): its losses, and the state if it was
saved."""


@dataclass(frozen=True)
class Fit:
    """What a worker needs. ``make``: builds the task there; ``finish``: the weights to
    keep of it, or whole files, by file name.
    """

    title: str
    make: Callable[[], Task]
    finish: Callable[[Task], Mapping[str, Mapping[str, Any] | bytes]]
    examples: Sequence[Example]
    optimize: TrainingConfig
    detector: Detector
    seed: int
    folder: str
    saved: Callable[[int, Mapping[str, Any]], None] | None = None
    """Told on rank 0 of each saved state, after how many steps."""


def fit(work: Fit) -> Curve:
    """Train, or go on where a killed run stopped; writes ``finish``'s weights and,
    last, ``curve.json`` into the folder. Returns the curve.

    Raises TrainingError if a worker fails, on a cluster if several do without a state
    saved between them.
    """
    here = (
        work.optimize.workers == 1
        and work.optimize.max_workers is None
        and not on_cluster()
    )
    quiet()
    if not here:
        ensure_ray()
    written = storage.join(work.folder, "curve.json")
    while not storage.exists(written) and not _fitted(work, here):
        print(
            f"{work.title}: {CLUSTER_RETRIES + 1} workers lost, but it has got on; it"
            " goes on from its last state",
            flush=True,
        )
    curve: Curve = storage.read_json(written)
    return curve


def _fitted(work: Fit, here: bool) -> bool:
    """Train to the end; False if that failed, but a state was saved before."""
    state = storage.join(work.folder, STATE)
    before = storage.stamp(state)
    retries = CLUSTER_RETRIES if on_cluster() else 0
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"work": work},
        scaling_config=(
            ScalingConfig(num_workers=0, use_gpu=work.optimize.gpu)
            if here
            else _scaling(work.optimize)
        ),
        run_config=(
            None
            if here
            else RunConfig(
                name="train",
                storage_path=work.folder,
                failure_config=FailureConfig(max_failures=retries),
            )
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        if retries and OURS not in str(error) and storage.stamp(state) != before:
            return False
        full_disk(str(error), work.folder)
        raise TrainingError(
            f"{work.title} failed on a worker: {str(error)[-1500:]}"
        ) from error
    return True


def _scaling(optimize: TrainingConfig) -> ScalingConfig:
    """A worker's CPUs are its share where all of them run at once."""
    most = optimize.max_workers or optimize.workers
    cpus = max(1, min(cluster_cpus() // most, largest_node_cpus()))
    resources: dict[str, float] = (
        {"CPU": 1, "GPU": 1} if optimize.gpu else {"CPU": cpus}
    )
    workers = (
        optimize.workers
        if optimize.max_workers is None
        else (optimize.workers, optimize.max_workers)
    )
    return ScalingConfig(
        num_workers=workers, use_gpu=optimize.gpu, resources_per_worker=resources
    )


def _train_worker(config: dict[str, Any]) -> None:
    work: Fit = config["work"]

    def tell(
        step: int, metrics: Mapping[str, float], state: dict[str, Any] | None
    ) -> None:
        if work.saved is not None and state is not None and worker_rank() == 0:
            work.saved(step + 1, state)
        ray.train.report({"step": step, **metrics})

    train(work, tell)


def train(work: Fit, tell: Tell) -> Curve:
    """This worker's part of a fit, from the last saved state on. All workers call
    ``tell`` at the same steps.
    """
    # open_clip tells its life story at INFO
    logging.getLogger().setLevel(logging.WARNING)
    if not work.optimize.gpu:
        torch.set_num_threads(threads(worker_count()))
    task = work.make().to(_device(work.optimize))
    stalled_after = work.optimize.stalled_after
    with (
        bar(work.title, work.optimize.steps) as shown,
        Watch(work.title, stalled_after) as watch,
        ThreadPoolExecutor(1) as writer,
    ):
        host = FolderHost(work.folder, shown, tell, watch, writer)
        curve = run(
            task, work.examples, work.optimize, work.detector, seed=work.seed, host=host
        )
        host.settle()
    if worker_rank() == 0:
        for name, weights in work.finish(task).items():
            place = storage.join(work.folder, name)
            (
                storage.write_bytes(place, weights)
                if isinstance(weights, bytes)
                else save_weights(place, weights)
            )
        storage.write_json(storage.join(work.folder, "curve.json"), curve)
        host.forget()
    return curve


def _device(optimize: TrainingConfig) -> torch.device:
    """This worker's. Raises TrainingError if it should be a GPU and there is none."""
    if not optimize.gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise TrainingError(
            "fit.gpu is on, but this worker has no CUDA device: leave it off, or run on"
            " a machine with a GPU"
        )
    return (
        ray.train.torch.get_device()
        if worker_count() > 1 or on_cluster()
        else torch.device("cuda")
    )


class FolderHost:
    """The training loop's host: rank 0 keeps the last state in a file that is replaced
    whole; all ranks wait for each other.

    The file is written, or sent to an object store, while training goes on; a state
    that can't be kept ends the fit at the next one.
    """

    def __init__(
        self, folder: str, shown: Bar, tell: Tell, watch: Watch, writer: Executor
    ) -> None:
        self.place, self.shown, self.tell, self.watch, self.writer = (
            storage.join(folder, STATE),
            shown,
            tell,
            watch,
            writer,
        )
        self.writing: Future[None] | None = None

    def resume(self) -> dict[str, Any] | None:
        return load_state(self.place) if storage.exists(self.place) else None

    def report(
        self, step: int, metrics: Mapping[str, float], checkpoint: dict[str, Any] | None
    ) -> None:
        if worker_rank() == 0:
            if checkpoint is not None:
                self.settle()
                self.writing = self.writer.submit(
                    storage.write_bytes, self.place, as_bytes(checkpoint)
                )
            self.shown.update(
                step + 1,
                " ".join(
                    f"{name} {value:.2f}"
                    for name, value in metrics.items()
                    if name not in diagnosis.NAMES
                ),
            )
        self.tell(step, metrics, checkpoint)
        self.watch.seen()

    def settle(self) -> None:
        """The last state is in its file. Raises what kept it from there."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def forget(self) -> None:
        """The weights are written: the state with its optimizers is no longer needed."""
        storage.remove(self.place)


def save_weights(uri: str, weights: Mapping[str, Any]) -> None:
    storage.write_bytes(uri, as_bytes(weights))


def as_bytes(weights: Mapping[str, Any]) -> bytes:
    """The file of a state, which may change from here on."""
    buffer = io.BytesIO()
    torch.save(dict(weights), buffer)
    return buffer.getvalue()


def load_state(uri: str) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(
        io.BytesIO(storage.read_bytes(uri)), map_location="cpu", weights_only=True
    )
    return state


def load_weights(uri: str) -> dict[str, torch.Tensor]:
    return load_state(uri)
