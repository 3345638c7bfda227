"""What the fault tests killed and what was lost is told at the end, also of tests that
pass."""

from __future__ import annotations

import pytest

TOLD = "; lost: "


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lines = [
        line
        for report in terminalreporter.getreports("passed")
        for line in report.capstdout.splitlines()
        if TOLD in line
    ]
    if lines:
        terminalreporter.section("faults")
        for line in lines:
            terminalreporter.write_line(line)
