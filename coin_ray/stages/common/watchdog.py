"""Ends a process that hangs: one that has died is noticed and replaced."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from types import TracebackType

STALLED_EXIT_CODE = 70
"""Exit code of a process that ended itself."""
LONGEST_CHECK_INTERVAL = 10.0
"""Seconds between two checks for progress, at most."""


class Watchdog:
    """Ends this process, with a traceback of each thread, when ``notify_progress`` was
    not called for ``seconds``. With 0 or less it never does.
    """

    def __init__(self, activity: str, seconds: float) -> None:
        self.activity = activity
        self.seconds = seconds
        self.last_progress = time.monotonic()
        self.closed = threading.Event()

    def notify_progress(self) -> None:
        """Start to count the seconds anew."""
        self.last_progress = time.monotonic()

    def __enter__(self) -> Watchdog:
        self.notify_progress()
        if self.seconds > 0:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.closed.set()

    def _watch(self) -> None:
        interval = min(self.seconds / 4, LONGEST_CHECK_INTERVAL)
        while not self.closed.wait(interval):
            if time.monotonic() - self.last_progress > self.seconds:
                self._exit()

    def _exit(self) -> None:
        print(
            f"{self.activity}: no progress for {self.seconds:.0f} s, exiting"
            f" ({STALLED_EXIT_CODE}). On a cluster Ray restarts the worker; locally,"
            " rerun the command. It hung at:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        os._exit(STALLED_EXIT_CODE)
