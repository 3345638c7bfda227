"""Turn the errors of a command into its exit code: the one place for every subcommand.

0 done; 1 a check failed or a training diverged; 2 a wrong option, setting or input, or
a file that may not be read or written; 3 no space on the disk, or storage that stays
away; 4 and 5 the cloud refuses (``coin_ray.errors``); 130 Ctrl-C; 141 nobody reads the
output any more.
"""

from __future__ import annotations

import errno
import os
import select
import sqlite3
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator

from coin_ray.errors import FULL_DISK_ERRNOS, CoinError, StorageUnavailable

DISK_FULL = 3
NOT_PERMITTED = 2
INTERRUPTED = 130
CLOSED_PIPE = 141
"""As of a command that a closed pipe has ended."""
PERMISSION_ERRNOS = (errno.EACCES, errno.EPERM, errno.EROFS)
MESSAGE_CHARACTERS = 300
RERUN_HINT = "rerun the same command to continue"


def run_command(
    command: Callable[[], int | None], resume_hint: str = RERUN_HINT
) -> int:
    """Call ``command`` and return its exit code, 0 for None.

    Errors that a user can mend are one message on stderr; of errors of Ray the whole
    report is in a file that the message names; others are raised. ``resume_hint``: how
    to continue after Ctrl-C or a full disk.
    """
    try:
        exit_code = command() or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"\nstopped; {resume_hint}", file=sys.stderr)
        return INTERRUPTED
    except SystemExit:  # argparse has printed its help
        if _nobody_reads_output():
            return CLOSED_PIPE
        raise
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads_output():
            return CLOSED_PIPE
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
        return _report(error)
    return exit_code


def _report(error: Exception) -> int:
    """Print the error on stderr and return its exit code; raise it if a user can't mend
    it.
    """
    for cause in _iterate_causes(error):
        if isinstance(cause, StorageUnavailable):
            error = cause
    if isinstance(error, CoinError):
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, OSError) and error.errno in PERMISSION_ERRNOS:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        return NOT_PERMITTED
    if type(error).__module__.startswith("ray."):
        lines = str(error).strip().splitlines() or [""]
        print(
            f"\n{type(error).__name__}: {lines[-1][:MESSAGE_CHARACTERS]}. The whole report"
            f" of Ray: {_write_report(error)}",
            file=sys.stderr,
        )
        return CoinError.exit_code
    raise error


def _write_report(error: Exception) -> str:
    """Write the traceback into a new temporary file and return its path."""
    with tempfile.NamedTemporaryFile(
        "w", prefix="coin-ray-error-", suffix=".txt", delete=False
    ) as file:
        traceback.print_exception(error, file=file)
    return file.name


def _nobody_reads_output() -> bool:
    """Return whether standard output is a pipe that was closed; drop what is left."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):  # no file of the system, as in a notebook
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    _discard_output()
    return True


def _discard_output() -> None:
    """Drop output that can't be written, which would change the exit code at the end."""
    null_device = os.open(os.devnull, os.O_WRONLY)
    try:
        sys.stdout.flush()
    except OSError:  # a full disk or a closed pipe
        os.dup2(null_device, sys.stdout.fileno())
    finally:
        os.close(null_device)


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
