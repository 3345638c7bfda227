"""A worker that hangs is made a worker that died: those are noticed, and replaced."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from types import TracebackType

STALLED = 70
"""Exit code of a process that ended itself."""


class Watch:
    """Ends this process, telling where each thread was, when ``seen`` was not called
    for ``seconds``. 0 or less: never.
    """

    def __init__(self, what: str, seconds: float) -> None:
        self.what, self.seconds = what, seconds
        self.heard, self.closed = time.monotonic(), threading.Event()

    def seen(self) -> None:
        self.heard = time.monotonic()

    def __enter__(self) -> Watch:
        self.seen()
        if self.seconds > 0:
            threading.Thread(target=self._run, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.closed.set()

    def _run(self) -> None:
        while not self.closed.wait(min(self.seconds / 4, 10.0)):
            if time.monotonic() - self.heard > self.seconds:
                print(
                    f"{self.what}: nothing has happened for {self.seconds:.0f} s; this"
                    " process ends. On a cluster another one goes on; here the same"
                    " command does. It hung at:",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(all_threads=True)
                os._exit(STALLED)
