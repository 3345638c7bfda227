"""A training task under Ray Train. Its checkpoint is one file in the step's folder that
is replaced atomically, so a run resumes itself wherever it died.

On one machine without a cluster the worker is this very process (Ray Train's local
mode: no actors to start). On a cluster it is a group of workers that Ray restarts.
"""

from __future__ import annotations

import io
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from coin_ray import storage
from coin_ray.config import Detector, TrainingConfig
from coin_ray.data.examples import Example
from coin_ray.errors import TrainingError
from coin_ray.parallel import worker_count, worker_rank
from coin_ray.stages.common.cluster import (
    cluster_cpus,
    count_torch_threads,
    ensure_ray,
    largest_node_cpus,
    on_cluster,
    quiet_ray_logs,
    raise_if_storage_failed,
)
from coin_ray.stages.common.progress import ProgressBar, show_progress
from coin_ray.stages.common.watchdog import Watchdog
from coin_ray.stages.common.worker_failures import WorkerFailureReporter
from coin_ray.training import diagnosis
from coin_ray.training.loop import Curve, TrainingTask, run_training_loop

CLUSTER_RETRIES = 3
"""Lost workers after which Ray Train gives up; a training on a cluster then starts
again if it has saved a checkpoint meanwhile."""
PACKAGE_ERROR = "coin_ray.errors."
"""Text in an error message that another attempt would end with again."""
CHECKPOINT_FILE = "state.pt"
"""The last checkpoint of an unfinished training, in its folder."""
CURVE_FILE = "curve.json"
"""The losses by step. A training whose folder has it is finished."""
Checkpoint = dict[str, Any]
"""What the training loop needs to resume: step, curve and the task's state."""
WeightFiles = Mapping[str, Mapping[str, Any] | bytes]
"""State dicts, or the content of whole files, by file name."""
ReportStep = Callable[[int, Mapping[str, float], Checkpoint | None], None]
"""Called after a logged or saved step (counted from 0) with its losses, and with the
checkpoint if one was saved."""


@dataclass(frozen=True)
class TrainingJob:
    """What a worker needs. ``build_task`` is called on the worker; ``export_weights``
    returns what to keep of the trained task.
    """

    title: str
    build_task: Callable[[], TrainingTask]
    export_weights: Callable[[TrainingTask], WeightFiles]
    examples: Sequence[Example]
    training: TrainingConfig
    detector: Detector
    seed: int
    folder: str
    on_checkpoint: Callable[[int, Mapping[str, Any]], None] | None = None
    """Called on rank 0 with the number of steps and each saved checkpoint."""


def run_training_job(job: TrainingJob) -> Curve:
    """Train, or go on from the checkpoint of a killed run. Write the exported weights
    and, last, ``curve.json`` into the folder. Return the curve.

    Raises TrainingError if a worker fails, on a cluster if several do without a
    checkpoint saved between them.
    """
    training = job.training
    one_worker = training.workers == 1 and training.max_workers is None
    in_this_process = one_worker and not on_cluster()
    quiet_ray_logs()
    if not in_this_process:
        ensure_ray()
    curve_uri = storage.join(job.folder, CURVE_FILE)
    while not storage.exists(curve_uri) and not _train(job, in_this_process):
        print(
            f"{job.title}: {CLUSTER_RETRIES + 1} workers were lost, but a new checkpoint"
            " was saved; training goes on from it",
            flush=True,
        )
    curve: Curve = storage.read_json(curve_uri)
    return curve


def _train(job: TrainingJob, in_this_process: bool) -> bool:
    """Train to the end. Return False if that failed but a checkpoint was saved before."""
    checkpoint_uri = storage.join(job.folder, CHECKPOINT_FILE)
    stamp_before = storage.version_stamp(checkpoint_uri)
    retries = CLUSTER_RETRIES if on_cluster() else 0
    try:
        with tempfile.TemporaryDirectory(
            prefix="coin_ray-train-", ignore_cleanup_errors=True
        ) as ray_folder:
            _new_trainer(job, in_this_process, retries, ray_folder).fit()
    except ray.train.TrainingFailedError as error:
        message = str(error)
        may_retry = retries > 0 and PACKAGE_ERROR not in message
        if may_retry and storage.version_stamp(checkpoint_uri) != stamp_before:
            return False
        raise_if_storage_failed(message, job.folder)
        raise TrainingError(
            f"{job.title} failed on a worker: {message[-1500:]}"
        ) from error
    return True


def _new_trainer(
    job: TrainingJob, in_this_process: bool, retries: int, ray_folder: str
) -> TorchTrainer:
    """Return Ray Train's trainer. ``ray_folder``: an empty local folder for its own
    files, since it goes on from what it finds there.

    It keeps nothing in it: checkpoints are written by ``FolderCheckpointHost``. In the
    run's folder, Ray Train would write a marker with each new group of workers by a
    client of its own, and an outage at that moment would end the training.
    """
    if in_this_process:
        scaling_config = ScalingConfig(num_workers=0, use_gpu=job.training.gpu)
        run_config = None
    else:
        scaling_config = _scaling_config(job.training)
        run_config = RunConfig(
            name="train",
            storage_path=ray_folder,
            failure_config=FailureConfig(max_failures=retries),
            callbacks=[WorkerFailureReporter(job.title, retries)],
            logging_config=LoggingConfig(log_level="WARNING"),
        )
    return TorchTrainer(
        _run_ray_worker,
        train_loop_config={"job": job, "patience": storage.current_patience()},
        scaling_config=scaling_config,
        run_config=run_config,
    )


def _scaling_config(training: TrainingConfig) -> ScalingConfig:
    """Return the workers and their resources. A worker's CPUs are its share when the
    largest number of workers runs.
    """
    most_workers = training.max_workers or training.workers
    cpus = max(1, min(cluster_cpus() // most_workers, largest_node_cpus()))
    resources: dict[str, float] = {"CPU": cpus}
    if training.gpu:
        resources = {"CPU": 1, "GPU": 1}
    workers: int | tuple[int, int] = training.workers
    if training.max_workers is not None:
        workers = (training.workers, training.max_workers)
    return ScalingConfig(
        num_workers=workers, use_gpu=training.gpu, resources_per_worker=resources
    )


def _run_ray_worker(config: Mapping[str, Any]) -> None:
    job: TrainingJob = config["job"]
    storage.set_patience(config["patience"])

    def report(
        step: int, metrics: Mapping[str, float], checkpoint: Checkpoint | None
    ) -> None:
        if (
            job.on_checkpoint is not None
            and checkpoint is not None
            and worker_rank() == 0
        ):
            job.on_checkpoint(step + 1, checkpoint)
        ray.train.report({"step": step, **metrics})

    train_on_worker(job, report)


def train_on_worker(job: TrainingJob, report: ReportStep) -> Curve:
    """Do this worker's part of a training, from the last checkpoint on. All workers
    call ``report`` at the same steps.
    """
    # open_clip writes many lines at INFO
    logging.getLogger().setLevel(logging.WARNING)
    training = job.training
    if not training.gpu:
        torch.set_num_threads(count_torch_threads(worker_count()))
    task = job.build_task().to(_worker_device(training))
    with (
        show_progress(job.title, training.steps) as progress,
        Watchdog(job.title, training.stalled_after) as watchdog,
        ThreadPoolExecutor(1) as writer,
    ):
        host = FolderCheckpointHost(job.folder, progress, report, watchdog, writer)
        curve = run_training_loop(
            task, job.examples, training, job.detector, seed=job.seed, host=host
        )
        host.wait_until_written()
    if worker_rank() == 0:
        _write_weights(job.folder, job.export_weights(task))
        storage.write_json(storage.join(job.folder, CURVE_FILE), curve)
        host.remove_checkpoint()
    return curve


def _write_weights(folder: str, files: WeightFiles) -> None:
    for name, weights in files.items():
        uri = storage.join(folder, name)
        if isinstance(weights, bytes):
            storage.write_bytes(uri, weights)
        else:
            save_weights(uri, weights)


def _worker_device(training: TrainingConfig) -> torch.device:
    """Return this worker's device. Raises TrainingError if it should be a GPU and there
    is none.
    """
    if not training.gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise TrainingError(
            "fit.gpu is on, but this worker has no CUDA device: leave it off, or run on"
            " a machine with a GPU"
        )
    if worker_count() > 1 or on_cluster():
        device: torch.device = ray.train.torch.get_device()
        return device
    return torch.device("cuda")


class FolderCheckpointHost:
    """The training loop's host: rank 0 keeps the last checkpoint in a file that is
    replaced whole; all ranks wait for each other.

    The file is written, or sent to an object store, while training goes on; a
    checkpoint that can't be written ends the training at the next one.
    """

    def __init__(
        self,
        folder: str,
        progress: ProgressBar,
        report_step: ReportStep,
        watchdog: Watchdog,
        writer: Executor,
    ) -> None:
        self.uri = storage.join(folder, CHECKPOINT_FILE)
        self.progress = progress
        self.report_step = report_step
        self.watchdog = watchdog
        self.writer = writer
        self.pending_write: Future[None] | None = None

    def resume(self) -> Checkpoint | None:
        """Return the last checkpoint, or None."""
        return load_checkpoint(self.uri) if storage.exists(self.uri) else None

    def report(
        self, step: int, metrics: Mapping[str, float], checkpoint: Checkpoint | None
    ) -> None:
        """Start to write a checkpoint, show the losses and call ``report_step``."""
        if worker_rank() == 0:
            if checkpoint is not None:
                self.wait_until_written()
                self.pending_write = self.writer.submit(
                    storage.write_bytes, self.uri, serialize_weights(checkpoint)
                )
            losses = [
                f"{name} {loss:.2f}"
                for name, loss in metrics.items()
                if name not in diagnosis.NAMES
            ]
            self.progress.update(step + 1, " ".join(losses))
        self.report_step(step, metrics, checkpoint)
        self.watchdog.notify_progress()

    def wait_until_written(self) -> None:
        """Wait for the file of the last checkpoint. Raises the error of its writing."""
        pending_write = self.pending_write
        self.pending_write = None
        if pending_write is not None:
            pending_write.result()

    def remove_checkpoint(self) -> None:
        """Remove the checkpoint with its optimizers: the weights are written."""
        storage.remove(self.uri)


def save_weights(uri: str, weights: Mapping[str, Any]) -> None:
    """Write a state dict, atomically."""
    storage.write_bytes(uri, serialize_weights(weights))


def serialize_weights(weights: Mapping[str, Any]) -> bytes:
    """Return the content of a state dict's file; later changes of the tensors do not
    reach it.
    """
    buffer = io.BytesIO()
    torch.save(dict(weights), buffer)
    return buffer.getvalue()


def load_checkpoint(uri: str) -> Checkpoint:
    """Read a checkpoint onto the CPU."""
    checkpoint: Checkpoint = torch.load(
        io.BytesIO(storage.read_bytes(uri)), map_location="cpu", weights_only=True
    )
    return checkpoint


def load_weights(uri: str) -> dict[str, torch.Tensor]:
    """Read a detector's weights onto the CPU."""
    return load_checkpoint(uri)
