"""Progress of a long stage: a live line in a terminal, a plain line now and then in a
log.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

QUIET_SECONDS = 10.0
"""Seconds between two lines of a log."""


class ProgressBar:
    """A count of finished units with a note. The time that remains is estimated from the
    pace since the first update.
    """

    def __init__(self, title: str, total: int) -> None:
        self.title = title
        self.total = total
        self.last_printed = time.monotonic()
        self.first_update: tuple[int, float] | None = None
        self.progress: Progress | None = None
        if sys.stderr.isatty():
            self.progress = _terminal_progress()
            self.task = self.progress.add_task(title, total=total, note="")

    def update(self, count: int, note: str = "") -> None:
        """Show that ``count`` units are finished."""
        if self.first_update is None:
            self.first_update = (count, time.monotonic())
        if self.progress is not None:
            self.progress.update(self.task, completed=count, note=note)
            return
        silence = time.monotonic() - self.last_printed
        if silence > QUIET_SECONDS or count == self.total:
            self.last_printed = time.monotonic()
            line = f"{self.title}: {count}/{self.total} {self._time_left(count)}{note}"
            print(line.rstrip(), file=sys.stderr, flush=True)

    def _time_left(self, count: int) -> str:
        assert self.first_update is not None
        first_count, start = self.first_update
        if not first_count < count < self.total:
            return ""
        elapsed = time.monotonic() - start
        seconds = elapsed * (self.total - count) / (count - first_count)
        return f"({timedelta(seconds=round(seconds))} left) "


def _terminal_progress() -> Progress:
    return Progress(
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    )


@contextmanager
def show_progress(title: str, total: int) -> Iterator[ProgressBar]:
    """Show a progress bar while the ``with`` block runs."""
    progress_bar = ProgressBar(title, total)
    if progress_bar.progress is None:
        yield progress_bar
        return
    with progress_bar.progress:
        yield progress_bar
