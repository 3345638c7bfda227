"""A disk without room: what was there stays, what is said is clear, and with room the
same comes out."""

from __future__ import annotations

import errno
import os
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from builders import examples, propagation, tiny_config, tiny_fit

from coin_ray import storage
from coin_ray.commands.arguments import reported
from coin_ray.errors import TrainingError
from coin_ray.stages.common import training_job as fitting
from coin_ray.stages.common.cluster import raise_if_disk_full
from coin_ray.stages.common.training_job import TrainingJob, train
from coin_ray.stages.propagate import finish

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_that_finds_no_room_leaves_the_old_one_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "state.pt"
    storage.write_bytes(str(place), b"old")

    def full(file: int) -> None:
        raise FULL

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        storage.write_bytes(str(place), b"new")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [
        ("state.pt", b"old")
    ]


@pytest.mark.parametrize("failing", [0, 1, 2, 3])
def test_a_training_that_finds_no_room_goes_on_to_the_same_weights(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writes: the states of steps 3 and 6, the weights, the curve."""
    fit = tiny_fit()
    work = partial(
        TrainingJob,
        "propagate",
        partial(propagation, fit),
        finish,
        examples(tmp_path),
        fit,
        tiny_config(),
        5,
    )
    whole = train(work(str(tmp_path / "whole")), lambda *told: None)
    write, written = storage.write_bytes, list[str]()

    def until_full(uri: str, data: bytes) -> None:
        if len(written) == failing:
            raise FULL
        written.append(uri)
        write(uri, data)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", until_full)
        with pytest.raises(OSError, match="No space left"):
            train(work(str(tmp_path / "full")), lambda *told: None)
    assert train(work(str(tmp_path / "full")), lambda *told: None) == whole
    ours, theirs = (
        torch.load(tmp_path / name / "detector.pt", weights_only=True)
        for name in ("full", "whole")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    print(f"disk full at write {failing}; lost: nothing")


def test_a_worker_s_full_disk_is_told_as_this_machine_s(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work() -> None:
        raise_if_disk_full(
            "ray::_Inner.train() ... OSError: [Errno 28] No space left on device:"
            " '/root/steps/x'",
            "/root/steps",
        )

    assert reported(work) == 3
    assert (
        "no space left on the device: /root/steps. Free some; the same command goes on"
        in capsys.readouterr().err
    )
    raise_if_disk_full("another error", "/root")


class Trainer:
    """In place of Ray Train's: fails as told, saving a state before or not."""

    outcomes: ClassVar[list[tuple[bool, str]]] = []
    place = ""

    def __init__(self, *given: Any, **named: Any) -> None:
        pass

    def fit(self) -> None:
        saves, error = self.outcomes.pop(0)
        if saves:
            storage.write_bytes(self.place, os.urandom(9))
        if error:
            raise fitting.ray.train.TrainingFailedError(error)
        storage.write_json(
            os.path.join(os.path.dirname(self.place), "curve.json"), [{"step": 0.0}]
        )


@pytest.mark.parametrize(
    ("outcomes", "ends"),
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
def test_lost_workers_end_a_fit_only_where_it_does_not_get_on(
    outcomes: list[tuple[bool, str]],
    ends: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fitting, "TorchTrainer", Trainer)
    monkeypatch.setattr(fitting, "on_cluster", lambda: True)
    monkeypatch.setattr(fitting, "ensure_ray", lambda: None)
    monkeypatch.setattr(fitting, "_scaling", lambda optimize: None)
    Trainer.outcomes, Trainer.place = list(outcomes), str(tmp_path / fitting.STATE)
    work = TrainingJob(
        "propagate",
        partial(propagation, tiny_fit()),
        finish,
        [],
        tiny_fit(),
        tiny_config(),
        0,
        str(tmp_path),
    )
    if ends == "finished":
        assert fitting.fit(work) == [{"step": 0.0}]
        Trainer.outcomes.clear()
        assert fitting.fit(work) == [{"step": 0.0}], (
            "a fit whose curve is written is finished: its step was killed while it"
            " waited"
        )
    else:
        with pytest.raises(TrainingError, match=ends):
            fitting.fit(work)
