"""Checkpoints are written while training goes on, whole and in order, and one that can't
be written ends the training."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from coin_ray import storage
from coin_ray.config import TrainingConfig
from coin_ray.stages.common import training_job
from coin_ray.stages.common.progress import ProgressBar
from coin_ray.stages.common.training_job import (
    CHECKPOINT_FILE,
    FolderCheckpointHost,
    load_checkpoint,
)
from coin_ray.stages.common.watchdog import Watchdog

SECONDS = 30.0


def _ignore_step(
    step: int, metrics: Mapping[str, float], checkpoint: dict[str, Any] | None
) -> None:
    """Do nothing."""


def _checkpoint(step: int) -> dict[str, Any]:
    return {"step": step, "task": {"weights": torch.full((1000,), float(step))}}


@contextmanager
def _open_host(folder: Path) -> Iterator[FolderCheckpointHost]:
    with Watchdog("a fit", 0) as watchdog, ThreadPoolExecutor(1) as writer:
        progress_bar = ProgressBar("a fit", 10)
        yield FolderCheckpointHost(
            str(folder), progress_bar, _ignore_step, watchdog, writer
        )


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slow write of the first checkpoint lasts until two more steps were reported;
    changing the weights then changes no file."""
    written_sizes, release = list[int](), threading.Event()
    write_bytes = storage.write_bytes

    def write_slowly(uri: str, content: bytes) -> None:
        assert release.wait(SECONDS)
        written_sizes.append(len(content))
        write_bytes(uri, content)

    monkeypatch.setattr(storage, "write_bytes", write_slowly)
    with _open_host(tmp_path) as host:
        first = _checkpoint(1)
        host.report(0, {}, first)
        first["task"]["weights"].zero_()
        host.report(1, {"loss": 1.0}, None)
        host.report(2, {"loss": 1.0}, None)
        assert not written_sizes
        release.set()
        host.wait_until_written()
        weights = load_checkpoint(str(tmp_path / CHECKPOINT_FILE))["task"]["weights"]
        assert weights.unique().tolist() == [1.0]
        host.report(3, {}, _checkpoint(4))
        host.report(4, {}, _checkpoint(5))  # waits for the one before
        host.wait_until_written()
    assert len(written_sizes) == 3
    resumed = host.resume()
    assert resumed is not None
    assert (resumed["step"], resumed["task"]["weights"][0]) == (5, 5.0)


def test_a_checkpoint_that_cannot_be_written_ends_the_training_at_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(uri: str, content: bytes) -> None:
        raise OSError(28, "No space left on device", uri)

    with _open_host(tmp_path) as host:
        host.report(0, {}, _checkpoint(1))
        host.wait_until_written()
        monkeypatch.setattr(storage, "write_bytes", fail)
        host.report(1, {}, _checkpoint(2))
        with pytest.raises(OSError, match="No space left"):
            host.report(2, {}, _checkpoint(3))
        resumed = host.resume()
        assert resumed is not None
        assert resumed["step"] == 1
        host.wait_until_written()  # the error is raised once


def test_training_workers_wait_for_storage_as_long_as_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The worker is another process, whose patience is the default."""
    configs: list[dict[str, Any]] = []

    class RecordingTrainer:
        def __init__(self, work: object, **options: Any) -> None:
            configs.append(options["train_loop_config"])

        def fit(self) -> None:
            """Train nothing."""

    job = SimpleNamespace(folder=str(tmp_path), training=TrainingConfig())
    monkeypatch.setattr(storage, "_patience", 7.0)
    monkeypatch.setattr(training_job, "TorchTrainer", RecordingTrainer)
    training_job._train(job, in_this_process=True)  # type: ignore[arg-type]
    storage.set_patience(storage.PATIENCE_SECONDS)
    seconds: list[float] = []
    monkeypatch.setattr(
        training_job,
        "train_on_worker",
        lambda job, report: seconds.append(storage.current_patience()),
    )
    training_job._run_ray_worker(configs[0])
    assert seconds == [7.0]


def test_ray_train_writes_nothing_to_the_run_s_storage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has a client of its own, which does not wait for storage that is away."""
    storage_paths: list[str] = []

    class RecordingTrainer:
        def __init__(self, work: object, **options: Any) -> None:
            storage_paths.append(options["run_config"].storage_path)

        def fit(self) -> None:
            """Train nothing."""

    monkeypatch.setattr(storage, "version_stamp", lambda uri: "")
    monkeypatch.setattr(training_job, "TorchTrainer", RecordingTrainer)
    monkeypatch.setattr(training_job, "cluster_cpus", lambda: 2)
    monkeypatch.setattr(training_job, "largest_node_cpus", lambda: 2)
    job = SimpleNamespace(
        title="propagate", folder="s3://bucket/step", training=TrainingConfig()
    )
    for _ in range(2):
        training_job._train(job, in_this_process=False)  # type: ignore[arg-type]
    assert not any("://" in path for path in storage_paths)
    assert len(set(storage_paths)) == 2, "no training goes on from another's files"
