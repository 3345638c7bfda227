"""Turn the errors of a command into its exit code: the one place for every subcommand.

0 done; 1 a check failed or a training diverged; 2 a wrong option, setting or input;
3 no space on the disk; 4 and 5 the cloud refuses (``coin_ray.errors``); 130 Ctrl-C.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import sys
from collections.abc import Callable, Iterator

from coin_ray.errors import CoinError

DISK_FULL = 3
INTERRUPTED = 130
RERUN_HINT = "rerun the same command to continue"
FULL_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT)


def run_command(
    command: Callable[[], int | None], resume_hint: str = RERUN_HINT
) -> int:
    """Call ``command`` and return its exit code, 0 for None.

    Errors that a user can mend are one message on stderr; others are raised.
    ``resume_hint``: how to continue after Ctrl-C or a full disk.
    """
    try:
        exit_code = command() or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"\nstopped; {resume_hint}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        full_disk = find_full_disk(error)
        if full_disk is not None:
            _discard_output()
            location = getattr(full_disk, "filename", None) or "the root of the run"
            print(
                f"\nno space left on the device: {location}. Free some space, then"
                f" {resume_hint}",
                file=sys.stderr,
            )
            return DISK_FULL
        if isinstance(error, CoinError):
            print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
            return error.exit_code
        raise
    return exit_code


def _discard_output() -> None:
    """Drop output that can't be written, which would change the exit code at the end."""
    try:
        sys.stdout.flush()
    except OSError:
        null_device = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null_device, sys.stdout.fileno())


def find_full_disk(error: BaseException) -> BaseException | None:
    """Return the error of a full disk (or quota) that ``error`` is or was caused by."""
    for cause in _iterate_causes(error):
        if isinstance(cause, OSError) and cause.errno in FULL_DISK_ERRNOS:
            return cause
        if (
            isinstance(cause, sqlite3.Error)
            and getattr(cause, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
        ):
            return cause
    return None


def _iterate_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and everything that caused it, each once."""
    pending, seen = [error], set[int]()
    while pending:
        current = pending.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        causes = [current.__cause__, getattr(current, "cause", None)]  # Ray's errors
        if not current.__suppress_context__:
            causes.append(current.__context__)
        if isinstance(current, BaseExceptionGroup):
            causes += current.exceptions
        pending += [cause for cause in causes if isinstance(cause, BaseException)]
