"""Settings of the whole suite: one torch thread for each worker, two depths of search for
Hypothesis, and a closing section that says what the fault tests killed and lost."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import hypothesis
import pytest
import torch

FAULT_LINE = "; lost: "

hypothesis.settings.register_profile("fast", max_examples=25, deadline=None)
hypothesis.settings.register_profile("thorough", max_examples=200, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


def pytest_configure() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _restore_tracking_address() -> Iterator[None]:
    """MLflow leaves the address of a tracker in the environment, where the processes
    that a later test starts would take it for the user's choice."""
    address = os.environ.get("MLFLOW_TRACKING_URI")
    yield
    if address is None:
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    else:
        os.environ["MLFLOW_TRACKING_URI"] = address


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lines = [
        line
        for report in terminalreporter.getreports("passed")
        for line in report.capstdout.splitlines()
        if FAULT_LINE in line
    ]
    if not lines:
        return
    terminalreporter.section("faults")
    for line in lines:
        terminalreporter.write_line(line)
