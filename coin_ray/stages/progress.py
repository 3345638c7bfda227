"""Progress of a long stage: a live line in a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

QUIET_SECONDS = 10.0


class Bar:
    """``update(done, note)`` with the number of finished units."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.last = title, total, time.monotonic()
        self.progress: Progress | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self.progress = Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True))
            self.task = self.progress.add_task(title, total=total, note="")

    def update(self, done: int, note: str = "") -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=done, note=note)
        elif time.monotonic() - self.last > QUIET_SECONDS or done == self.total:
            self.last = time.monotonic()
            print(f"{self.title}: {done}/{self.total} {note}".rstrip(), file=sys.stderr, flush=True)


@contextmanager
def bar(title: str, total: int) -> Iterator[Bar]:
    shown = Bar(title, total)
    if shown.progress is None:
        yield shown
        return
    with shown.progress:
        yield shown
