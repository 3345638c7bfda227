"""A disk without room: existing files stay, the message is clear, and with room the same
results come out."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from builders import examples, propagation, tiny_config, tiny_fit

from coin_ray import storage
from coin_ray.commands.exit_codes import run_command
from coin_ray.errors import TrainingError
from coin_ray.stages.common import training_job
from coin_ray.stages.common.cluster import raise_if_storage_failed
from coin_ray.stages.common.training_job import (
    TrainingJob,
    run_training_job,
    train_on_worker,
)
from coin_ray.stages.propagate import export_propagation

DISK_FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _ignore_step(
    step: int, metrics: Mapping[str, float], checkpoint: dict[str, Any] | None
) -> None:
    """Do nothing."""


def test_a_file_that_finds_no_room_leaves_the_old_one_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.pt"
    storage.write_bytes(str(path), b"old")

    def fail(file: int) -> None:
        raise DISK_FULL

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        storage.write_bytes(str(path), b"new")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [
        ("state.pt", b"old")
    ]


@pytest.mark.parametrize("failing_write", [0, 1, 2, 3])
def test_a_training_that_finds_no_room_goes_on_to_the_same_weights(
    failing_write: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writes are the checkpoints of steps 3 and 6, the weights, the curve."""
    fit = tiny_fit()
    job_in = partial(
        TrainingJob,
        "propagate",
        partial(propagation, fit),
        export_propagation,
        examples(tmp_path),
        fit,
        tiny_config(),
        5,
    )
    undisturbed_curve = train_on_worker(job_in(str(tmp_path / "whole")), _ignore_step)
    write_bytes, written = storage.write_bytes, list[str]()

    def write_until_full(uri: str, content: bytes) -> None:
        if len(written) == failing_write:
            raise DISK_FULL
        written.append(uri)
        write_bytes(uri, content)

    job = job_in(str(tmp_path / "full"))
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", write_until_full)
        with pytest.raises(OSError, match="No space left"):
            train_on_worker(job, _ignore_step)
    assert train_on_worker(job, _ignore_step) == undisturbed_curve
    resumed, undisturbed = (
        torch.load(tmp_path / name / "detector.pt", weights_only=True)
        for name in ("full", "whole")
    )
    assert all(torch.equal(resumed[name], undisturbed[name]) for name in undisturbed)
    print(f"disk full at write {failing_write}; lost: nothing")


def test_a_worker_s_full_disk_is_reported_as_this_machine_s(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise_if_storage_failed(
            "ray::_Inner.train() ... OSError: [Errno 28] No space left on device:"
            " '/root/steps/x'",
            "/root/steps",
        )

    assert run_command(fail) == 3
    message = (
        "no space left on the device: /root/steps. Free some space, then rerun the"
    )
    assert message in capsys.readouterr().err
    raise_if_storage_failed("another error", "/root")


class _Trainer:
    """Stands for Ray Train's: fails with the next outcome, saving a checkpoint before or
    not."""

    outcomes: ClassVar[list[tuple[bool, str]]] = []
    checkpoint = ""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def fit(self) -> None:
        saves, error = self.outcomes.pop(0)
        if saves:
            storage.write_bytes(self.checkpoint, os.urandom(9))
        if error:
            raise training_job.ray.train.TrainingFailedError(error)
        curve = os.path.join(os.path.dirname(self.checkpoint), "curve.json")
        storage.write_json(curve, [{"step": 0.0}])


@pytest.mark.parametrize(
    ("outcomes", "end"),
    [
        ([(True, ""), (True, "never")], "finished"),
        ([(True, "worker died"), (True, "worker died"), (True, "")], "finished"),
        (
            [(True, "worker died"), (False, "worker died"), (True, "never")],
            "failed on a worker: worker died",
        ),
        ([(False, "worker died"), (True, "never")], "failed on a worker: worker died"),
        (
            [
                (True, "coin_ray.errors.TrainingError: loss boxes is not finite"),
                (True, "never"),
            ],
            "loss boxes is not finite",
        ),
    ],
)
def test_lost_workers_end_a_training_only_where_it_saves_no_checkpoint(
    outcomes: list[tuple[bool, str]],
    end: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training_job, "TorchTrainer", _Trainer)
    monkeypatch.setattr(training_job, "on_cluster", lambda: True)
    monkeypatch.setattr(training_job, "ensure_ray", lambda: None)
    monkeypatch.setattr(training_job, "_scaling_config", lambda training: None)
    _Trainer.outcomes = list(outcomes)
    _Trainer.checkpoint = str(tmp_path / training_job.CHECKPOINT_FILE)
    job = TrainingJob(
        "propagate",
        partial(propagation, tiny_fit()),
        export_propagation,
        [],
        tiny_fit(),
        tiny_config(),
        0,
        str(tmp_path),
    )
    if end == "finished":
        assert run_training_job(job) == [{"step": 0.0}]
        _Trainer.outcomes.clear()
        assert run_training_job(job) == [{"step": 0.0}], (
            "a training whose curve is written is finished: its step was killed while"
            " it waited"
        )
    else:
        with pytest.raises(TrainingError, match=end):
            run_training_job(job)
