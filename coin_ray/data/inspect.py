"""Image files looked at in processes of their own: a file that crashes or hangs its
decoder costs that process, not the run.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from coin_ray.errors import InputError

CHILDREN = 4
AHEAD = 4 * CHILDREN
"""Files that are looked at, or wait for it, beyond the one whose turn it is."""
SECONDS = 120.0
"""For one file, reading included; after that it counts as one that hangs."""
Found = dict[str, Any] | str
"""``image_id``, ``uri``, ``width`` and ``height`` (upright), or the reason why the
image can't be used."""


def inspect(
    uris: Iterable[str], total: int, seconds: float = SECONDS
) -> Iterator[Found]:
    """What is found in each file, in their order; ``total``: how many there are. Raises
    OSError for a file that can't be read.
    """
    here = threading.local()
    started: list[_Child] = []

    def look(uri: str) -> Found:
        if not hasattr(here, "child"):
            here.child = _Child(seconds)
            started.append(here.child)
        child: _Child = here.child
        return child.look(uri)

    try:
        with ThreadPoolExecutor(
            max(1, min(CHILDREN, os.cpu_count() or 1, total))
        ) as pool:
            waiting = deque[Future[Found]]()
            for uri in uris:
                waiting.append(pool.submit(look, uri))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        for child in started:
            child.end()


class _Child:
    """One process that decodes files one after the other; it is started again after a
    file that it did not survive.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.process: subprocess.Popen[str] | None = None

    def look(self, uri: str) -> Found:
        answer = self._ask(uri)
        if "unreadable" in answer:
            raise OSError(answer["unreadable"])
        found: Found = answer["row"] if "row" in answer else answer["reason"]
        return found

    def _ask(self, uri: str) -> dict[str, Any]:
        process = self.process = self.process or _start()
        assert process.stdin is not None
        assert process.stdout is not None
        expired = threading.Event()

        def give_up() -> None:
            expired.set()
            process.kill()

        late = threading.Timer(self.seconds, give_up)
        late.start()
        try:
            process.stdin.write(json.dumps(uri) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            late.cancel()
        if line.endswith("\n"):
            found: dict[str, Any] = json.loads(line)
            return found
        self.end()
        if expired.is_set():
            return {"reason": f"the image was not decoded in {self.seconds:.0f} s"}
        return {
            "reason": (
                "the image crashed the process that decoded it (exit code"
                f" {process.returncode})"
            )
        }

    def end(self) -> None:
        if self.process is not None:
            self.process.communicate()  # its input is closed: it ends
            self.process = None


def _start() -> subprocess.Popen[str]:
    """With this process's path of modules: in a job they come from its working
    directory.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "coin_ray.data.inspect"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def look_at(uri: str) -> dict[str, Any]:
    """Of one file: its ``row``, the ``reason`` why it can't be used, or how it is
    ``unreadable``.
    """
    from coin_ray import storage
    from coin_ray.data.canonical import decode_rgb

    try:
        raw = storage.read_bytes(uri)
    except OSError as error:
        return {"unreadable": f"{uri}: {error}"}
    try:
        width, height = decode_rgb(raw).size
    except InputError as error:
        return {"reason": str(error)}
    return {
        "row": {
            "image_id": hashlib.sha256(raw).hexdigest(),
            "uri": uri,
            "width": width,
            "height": height,
        }
    }


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    for line in sys.stdin:
        print(json.dumps(look_at(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
