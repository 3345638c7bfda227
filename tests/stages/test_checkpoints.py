"""States are written while training goes on, whole and in order, and one that can't be
kept ends the fit."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from coin_ray import storage
from coin_ray.stages.common.progress import ProgressBar
from coin_ray.stages.common.training_job import CHECKPOINT_FILE, FolderCheckpointHost, load_checkpoint
from coin_ray.stages.common.watchdog import Watchdog

SECONDS = 30.0


def nothing(
    step: int, metrics: Mapping[str, float], state: dict[str, Any] | None
) -> None:
    """Nobody is told."""


def state(step: int) -> dict[str, Any]:
    return {"step": step, "task": {"weights": torch.full((1000,), float(step))}}


def test_training_goes_on_while_a_state_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slow write of the first state lasts until two more steps were reported;
    changing the weights then changes no file."""
    sent, release = [], threading.Event()
    write = storage.write_bytes

    def slow(uri: str, data: bytes) -> None:
        assert release.wait(SECONDS)
        sent.append(len(data))
        write(uri, data)

    monkeypatch.setattr(storage, "write_bytes", slow)
    with Watchdog("a fit", 0) as watch, ThreadPoolExecutor(1) as writer:
        host = FolderCheckpointHost(str(tmp_path), ProgressBar("a fit", 10), nothing, watch, writer)
        first = state(1)
        host.report(0, {}, first)
        first["task"]["weights"].zero_()
        host.report(1, {"loss": 1.0}, None)
        host.report(2, {"loss": 1.0}, None)
        assert not sent
        release.set()
        host.settle()
        assert load_checkpoint(str(tmp_path / CHECKPOINT_FILE))["task"][
            "weights"
        ].unique().tolist() == [1.0]
        host.report(3, {}, state(4))
        host.report(4, {}, state(5))  # waits for the one before
        host.settle()
    assert len(sent) == 3
    found = host.resume()
    assert found is not None
    assert (found["step"], found["task"]["weights"][0]) == (5, 5.0)


def test_a_state_that_cannot_be_kept_ends_the_fit_at_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(uri: str, data: bytes) -> None:
        raise OSError(28, "No space left on device", uri)

    with Watchdog("a fit", 0) as watch, ThreadPoolExecutor(1) as writer:
        host = FolderCheckpointHost(str(tmp_path), ProgressBar("a fit", 10), nothing, watch, writer)
        host.report(0, {}, state(1))
        host.settle()
        monkeypatch.setattr(storage, "write_bytes", full)
        host.report(1, {}, state(2))
        with pytest.raises(OSError, match="No space left"):
            host.report(2, {}, state(3))
        kept = host.resume()
        assert kept is not None
        assert kept["step"] == 1
        host.settle()  # told once
