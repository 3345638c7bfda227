"""What a run's log says of a training worker that failed."""

from __future__ import annotations

import importlib
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.train import RunConfig

from coin_ray.stages.common import ray_logs
from coin_ray.stages.common.worker_failures import (
    CONTROLLER_LOGGER,
    WorkerFailureReporter,
    describe_failure,
)

DEATH = """The actor died unexpectedly before finishing this task.
\tclass_name: RayTrainWorker
\tip: 192.0.2.12
The actor died because its node has died. Node Id: 472c
\tthe actor's node was terminated unexpectedly: health check failed"""
TRACEBACK = """Traceback (most recent call last):
  File "loop.py", line 5, in run
    raise StorageUnavailable(uri)
coin_ray.errors.StorageUnavailable: s3://bucket can't be reached"""


class HealthCheckFailure(Exception):
    """As Ray Train's own one: the actor's error is an attribute."""

    def __init__(self, failure: Exception) -> None:
        super().__init__("A worker health check failed.\nWorker info: Worker(")
        self.health_check_failure = failure


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            HealthCheckFailure(RuntimeError(DEATH)),
            "The actor died because its node has died. Node Id: 472c",
        ),
        (
            RuntimeError(TRACEBACK),
            "coin_ray.errors.StorageUnavailable: s3://bucket can't be reached",
        ),
        (ValueError(), "ValueError"),
        (ValueError("x" * 1000), "x" * 300),
    ],
)
def test_the_reason_is_the_last_line_without_details(
    error: Exception, reason: str
) -> None:
    assert describe_failure(error) == reason


@pytest.fixture
def controller_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[logging.Logger]:
    """Yield Ray Train's logger with a console, as in its controller."""
    monkeypatch.setattr(ray_logs.tempfile, "gettempdir", lambda: str(tmp_path))
    logger = logging.getLogger("ray.train.test_controller")
    logger.setLevel(logging.WARNING)  # a run in this process leaves its parent quiet
    handler = logging.FileHandler(tmp_path / "console.log")
    logger.addHandler(handler)
    yield logger
    logger.removeHandler(handler)


def test_a_lost_worker_is_one_line_and_what_ray_says_of_it_another(
    controller_log: logging.Logger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = HealthCheckFailure(RuntimeError(DEATH))
    reporter = WorkerFailureReporter("propagate", 3)
    reporter.after_exception(None, {0: error})
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(
        "propagate: worker 0 failed: The actor died because its node"
    )
    assert "3 times" in line

    controller_log.warning("Graceful shutdown failed\n%s", TRACEBACK)
    (shortened,) = (tmp_path / "console.log").read_text().splitlines()
    assert shortened.startswith("Graceful shutdown failed (the whole report of Ray: ")
    file = shortened.partition("of Ray: ")[2].rstrip(")")
    assert "StorageUnavailable" in Path(file).read_text()


def test_ray_train_accepts_the_reporter() -> None:
    RunConfig(callbacks=[WorkerFailureReporter("propagate", 3)])


def test_a_worker_that_can_not_start_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The controller's process gets the callback before its logs have a handler."""
    monkeypatch.setattr(ray_logs.tempfile, "gettempdir", lambda: str(tmp_path))
    module = importlib.import_module(CONTROLLER_LOGGER)
    assert module.logger.name == CONTROLLER_LOGGER
    monkeypatch.setattr(module.logger, "filters", [])
    pickle.loads(pickle.dumps(WorkerFailureReporter("propagate", 3)))
    handler = logging.FileHandler(tmp_path / "console.log")
    module.logger.addHandler(handler)
    try:
        raise RuntimeError(DEATH)
    except RuntimeError as error:
        module.logger.exception("Error in control loop iteration: %s", error)
    finally:
        module.logger.removeHandler(handler)
    (line,) = (tmp_path / "console.log").read_text().splitlines()
    assert line.startswith("Error in control loop iteration: The actor died")
    (report,) = tmp_path.glob("coin-ray-*-ray.log")
    assert "health check failed" in report.read_text()
    assert "Traceback" in report.read_text()
