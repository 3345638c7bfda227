"""Report the loss of a training worker in one line of the run's log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.train import UserCallback

from coin_ray.stages.common.ray_logs import shorten_logger, shorten_ray_logs

REASON_CHARACTERS = 300
CONTROLLER_LOGGER = "ray.train.v2._internal.execution.controller.controller"


class WorkerFailureReporter(UserCallback):  # type: ignore[misc]
    """Prints a line for each worker that failed, and shortens what Ray Train's
    controller logs about it. Ray calls it in the controller's process.
    """

    def __init__(self, title: str, retries: int) -> None:
        self.title = title
        self.retries = retries

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Arrive in the controller's process, which logs a page for each worker that
        can't start and calls no callback then.
        """
        self.__dict__.update(state)
        shorten_logger(CONTROLLER_LOGGER)

    def after_exception(
        self, run_context: object, worker_exceptions: Mapping[int, Exception]
    ) -> None:
        """Print the reasons, before Ray decides whether it replaces the workers."""
        shorten_ray_logs()
        for rank, error in sorted(worker_exceptions.items()):
            print(
                f"{self.title}: worker {rank} failed: {describe_failure(error)}. Ray"
                f" replaces workers {self.retries} times; training goes on from the last"
                " checkpoint",
                flush=True,
            )


def describe_failure(error: Exception) -> str:
    """Return the reason of a worker's failure: the last line that is not indented of
    what Ray says, in which details and tracebacks are indented.
    """
    cause = getattr(error, "health_check_failure", error)
    lines = [line for line in str(cause).splitlines() if line.strip()]
    unindented = [line.strip() for line in lines if not line[0].isspace()]
    reason = unindented[-1] if unindented else type(cause).__name__
    return reason[:REASON_CHARACTERS].rstrip(".")
