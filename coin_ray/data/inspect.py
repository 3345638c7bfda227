"""Inspect image files in worker processes: a file that crashes or hangs its decoder
costs that process, not the run.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import SpawnContext, SpawnProcess
from types import ModuleType
from typing import Any

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from coin_ray import storage
from coin_ray.data.canonical import upright_size_and_range
from coin_ray.errors import InputError

MAX_PROCESSES = 4
MAX_PENDING = 4 * MAX_PROCESSES
"""Files that are submitted ahead of the one whose turn it is."""
MAX_RESTARTS = 3
"""New pools for one file before the run ends."""
TIMEOUT_SECONDS = 120.0
"""For one file, reading included."""
INTENSITY = "intensity"
Inspection = dict[str, Any] | str
"""``image_id``, ``uri``, ``width`` and ``height`` (upright), and ``intensity``, the own
range, of a deep grey image; or the reason why the image can't be used."""


def inspect_images(
    uris: Iterable[str], total: int, seconds: float = TIMEOUT_SECONDS
) -> Iterator[Inspection]:
    """Inspect each file and yield the inspections in the order of ``uris``, of which
    there are ``total``. Raises OSError for a file that can't be read.
    """
    inspector = _Inspector(min(MAX_PROCESSES, os.cpu_count() or 1, total), seconds)
    try:
        for uri in uris:
            inspector.submit(uri)
            if len(inspector.pending) > MAX_PENDING:
                yield inspector.next_inspection()
        while inspector.pending:
            yield inspector.next_inspection()
    finally:
        inspector.stop()


def inspect_image(uri: str) -> Inspection:
    """Decode one file and return its row, or the reason why it can't be used. Raises
    OSError naming a file that can't be read.
    """
    try:
        raw = storage.read_bytes(uri)
    except OSError as error:
        raise OSError(f"{uri}: {error}") from None
    try:
        (width, height), own_range = upright_size_and_range(raw)
    except InputError as error:
        return str(error)
    image_id = hashlib.sha256(raw).hexdigest()
    row = {"image_id": image_id, "uri": uri, "width": width, "height": height}
    return row if own_range is None else row | {INTENSITY: own_range}


class _Inspector:
    """Submits files to a pool of processes and returns their inspections in order."""

    def __init__(self, processes: int, seconds: float) -> None:
        self.processes, self.seconds = max(1, processes), seconds
        self.pending = deque[tuple[str, ProcessFuture[Inspection]]]()
        self.pool = self._new_pool()

    def submit(self, uri: str) -> None:
        """Schedule the inspection of a file."""
        try:
            future = self.pool.schedule(inspect_image, (uri,), timeout=self.seconds)
        except RuntimeError:  # the pool is broken
            self._restart()
            future = self.pool.schedule(inspect_image, (uri,), timeout=self.seconds)
        self.pending.append((uri, future))

    def next_inspection(self) -> Inspection:
        """Wait for the first pending inspection and remove it.

        A process that dies before pebble knows its file breaks the pool. Then all
        pending files are submitted to a new one.
        """
        for _ in range(MAX_RESTARTS):
            try:
                inspection = self._wait_for_first()
                break
            except BrokenProcessPool:
                self._restart()
        else:
            inspection = self._wait_for_first()
        self.pending.popleft()
        return inspection

    def _wait_for_first(self) -> Inspection:
        """Return the first pending inspection; a process that hangs or dies is a reason
        against its image.
        """
        _, future = self.pending[0]
        try:
            return future.result()
        except ProcessExpired as error:
            return (
                "the image crashed the process that decoded it (exit code"
                f" {error.exitcode})"
            )
        except TimeoutError:
            return f"the image was not decoded in {self.seconds:.0f} s"

    def _restart(self) -> None:
        self.stop()
        self.pool = self._new_pool()
        uris = [uri for uri, _ in self.pending]
        self.pending.clear()
        for uri in uris:
            self.submit(uri)

    def _new_pool(self) -> ProcessPool:
        return ProcessPool(self.processes, context=_ScriptlessContext())

    def stop(self) -> None:
        """End the processes."""
        self.pool.stop()  # type: ignore[no-untyped-call]
        self.pool.join()


class _ScriptlessProcess(SpawnProcess):
    """A spawned process that does not import the caller's script, which may call
    ``coin_ray.adapt`` without an ``if __name__ == "__main__"``.
    """

    def start(self) -> None:
        script = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            super().start()
        finally:
            sys.modules["__main__"] = script


class _ScriptlessContext(SpawnContext):
    Process = _ScriptlessProcess
