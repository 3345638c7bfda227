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


class Bar:
    """``update(done, note)`` with the number of finished units; time left is at the
    pace since the first call.
    """

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.last = title, total, time.monotonic()
        self.first: tuple[int, float] | None = None
        self.progress: Progress | None = None
        if sys.stderr.isatty():
            columns = (
                TextColumn("{task.description:<12}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self.progress = Progress(
                *columns,
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self.task = self.progress.add_task(title, total=total, note="")

    def update(self, done: int, note: str = "") -> None:
        self.first = self.first or (done, time.monotonic())
        if self.progress is not None:
            self.progress.update(self.task, completed=done, note=note)
        elif time.monotonic() - self.last > QUIET_SECONDS or done == self.total:
            self.last = time.monotonic()
            print(
                f"{self.title}: {done}/{self.total} {self._left(done)}{note}".rstrip(),
                file=sys.stderr,
                flush=True,
            )

    def _left(self, done: int) -> str:
        assert self.first is not None
        before, start = self.first
        if not before < done < self.total:
            return ""
        seconds = (time.monotonic() - start) * (self.total - done) / (done - before)
        return f"({timedelta(seconds=round(seconds))} left) "


@contextmanager
def bar(title: str, total: int) -> Iterator[Bar]:
    shown = Bar(title, total)
    if shown.progress is None:
        yield shown
        return
    with shown.progress:
        yield shown
