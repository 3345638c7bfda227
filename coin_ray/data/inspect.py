"""Inspect image files in worker processes: a file that crashes or hangs its decoder
costs that process, not the run.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing.context import SpawnContext, SpawnProcess
from types import ModuleType
from typing import Any

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from coin_ray import storage
from coin_ray.data.canonical import decode_rgb
from coin_ray.errors import InputError

MAX_PROCESSES = 4
MAX_PENDING = 4 * MAX_PROCESSES
"""Files that are submitted ahead of the one whose turn it is."""
TIMEOUT_SECONDS = 120.0
"""For one file, reading included."""
Inspection = dict[str, Any] | str
"""``image_id``, ``uri``, ``width`` and ``height`` (upright), or the reason why the
image can't be used."""


def inspect_images(
    uris: Iterable[str], total: int, seconds: float = TIMEOUT_SECONDS
) -> Iterator[Inspection]:
    """Inspect each file and yield the inspections in the order of ``uris``, of which
    there are ``total``. Raises OSError for a file that can't be read.
    """
    processes = max(1, min(MAX_PROCESSES, os.cpu_count() or 1, total))
    pool = ProcessPool(processes, context=_ScriptlessContext())
    pending = deque[ProcessFuture[Inspection]]()
    try:
        for uri in uris:
            pending.append(pool.schedule(inspect_image, (uri,), timeout=seconds))
            if len(pending) > MAX_PENDING:
                yield _inspection(pending.popleft(), seconds)
        while pending:
            yield _inspection(pending.popleft(), seconds)
    finally:
        pool.stop()  # type: ignore[no-untyped-call]
        pool.join()


def inspect_image(uri: str) -> Inspection:
    """Decode one file and return its row, or the reason why it can't be used. Raises
    OSError naming a file that can't be read.
    """
    try:
        raw = storage.read_bytes(uri)
    except OSError as error:
        raise OSError(f"{uri}: {error}") from None
    try:
        width, height = decode_rgb(raw).size
    except InputError as error:
        return str(error)
    image_id = hashlib.sha256(raw).hexdigest()
    return {"image_id": image_id, "uri": uri, "width": width, "height": height}


def _inspection(future: ProcessFuture[Inspection], seconds: float) -> Inspection:
    """Wait for an inspection; a process that hangs or dies is a reason against its
    image.
    """
    try:
        return future.result()
    except ProcessExpired as error:
        return (
            "the image crashed the process that decoded it (exit code"
            f" {error.exitcode})"
        )
    except TimeoutError:
        return f"the image was not decoded in {seconds:.0f} s"


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
