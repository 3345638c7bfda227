"""Settings of the whole suite: one torch thread for each worker, temporary files in memory,
two depths of search for Hypothesis, and a closing section that says what the fault tests
killed and lost."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import hypothesis
import pytest
import torch

FAULT_LINE = "; lost: "
MEMORY_FOLDER = "/dev/shm"
MEMORY_MIN = 4 * 2**30
"""Free bytes from which temporary files are kept in memory; a suite writes about 1 GB."""

hypothesis.settings.register_profile("fast", max_examples=25, deadline=None)
hypothesis.settings.register_profile("thorough", max_examples=200, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


def pytest_configure() -> None:
    torch.set_num_threads(1)
    if _has_memory_folder():
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", MEMORY_FOLDER)


def _has_memory_folder() -> bool:
    """Return whether files may be kept in memory: journals and databases synchronise
    every record, which takes milliseconds on a disk.
    """
    if not os.access(MEMORY_FOLDER, os.W_OK):
        return False
    status = os.statvfs(MEMORY_FOLDER)
    is_large = status.f_bavail * status.f_frsize >= MEMORY_MIN
    return is_large and not status.f_flag & os.ST_NOEXEC


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
