"""Every subcommand ends with the same exit codes: on a full disk, on Ctrl-C, on a wrong
option and on an error that the user can mend."""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from coin_ray.commands.exit_codes import find_full_disk, run_command
from coin_ray.commands.main import SUBCOMMANDS, main
from coin_ray.errors import (
    BudgetExhausted,
    CoinError,
    InputError,
    StorageUnavailable,
    TrainingError,
)

FULL_DISK = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/run/steps/x")
PIPELINE = "coin_ray.runs.runner.run_pipeline"
COMMANDS = {
    "adapt demo": PIPELINE,
    "plan demo": "coin_ray.runs.runner.print_plan",
    "collect demo": PIPELINE,
    "collect views demo": (
        "coin_ray.experiments.rendering_comparison.compare_renderings"
    ),
    "propagate demo": PIPELINE,
    "separate demo": PIPELINE,
    "distill demo": PIPELINE,
    "evaluate demo": PIPELINE,
    "export demo": "coin_ray.commands.export.export_student",
    "report demo": PIPELINE,
    "report a b": "coin_ray.commands.report.write_comparison",
    "report runs/search/x": "coin_ray.search.page.write_page",
    "teachers compare demo": (
        "coin_ray.experiments.teacher_comparison.compare_teachers"
    ),
    "compare demo": "coin_ray.experiments.studies.run_fusion_study",
    "ablate demo": "coin_ray.experiments.studies.run_ablation",
    "ablate co-detr": "coin_ray.experiments.components.run_component_study",
    "search demo --algorithm random": "coin_ray.search.run.run_search",
    "detector --data demo": "coin_ray.commands.detector.train_detector",
    "review out cvat --root r --out o": "coin_ray.commands.review.export_reviews",
    "labels propose --classes a --root r": "coin_ray.commands.labels.propose_map",
    "journal compact --root r": "coin_ray.commands.journal.open_run_journal",
    "check folder": "coin_ray.data.check.check_datasets",
    "serve": "coin_ray.serving.local_cloud.main",
    "serve register folder": "coin_ray.serving.champion.register",
    "capacity": "coin_ray.commands.capacity.plan_capacity",
}
"""Commands, and the work that each does after it has read its options."""
FAILURES = {
    "full disk": (FULL_DISK, 3),
    "Ctrl-C": (KeyboardInterrupt(), 130),
    "input": (InputError("no images"), 2),
    "budget": (BudgetExhausted("the budget is spent"), 5),
}


def _exit_code(command: str) -> int:
    """Run a command in this process."""
    try:
        return main(command.split())
    except SystemExit as end:  # argparse and tyro end the program themselves
        return int(str(end.code))


@pytest.mark.parametrize(
    "failures",
    [
        pytest.param(("full disk", "Ctrl-C"), id="disk and Ctrl-C"),
        pytest.param(tuple(FAILURES), id="all", marks=pytest.mark.slow),
    ],
)
def test_every_subcommand_has_the_same_exit_codes(
    failures: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert {command.split()[0] for command in COMMANDS} == set(SUBCOMMANDS)
    table = {}
    for command, work in COMMANDS.items():
        codes = {}
        for name in failures:

            def fail(
                *_: object, failure: BaseException = FAILURES[name][0], **__: object
            ) -> None:
                raise failure

            with monkeypatch.context() as patch:
                patch.setattr(work, fail)
                codes[name] = _exit_code(command)
        codes["wrong option"] = _exit_code(f"{command} --no-such-option")
        table[command] = codes
    capsys.readouterr()
    with capsys.disabled():
        columns = [*failures, "wrong option"]
        print(f"\n{'exit codes':<36} {'  '.join(columns)}")
        for command, codes in table.items():
            cells = (f"{codes[name]:>{len(name)}}" for name in columns)
            print(f"{command:<36} {'  '.join(cells)}")
    expected_codes = {name: FAILURES[name][1] for name in failures}
    expected_codes["wrong option"] = 2
    assert table == dict.fromkeys(COMMANDS, expected_codes)


def _caused_by_full_disk(error: BaseException) -> BaseException:
    error.__cause__ = FULL_DISK
    return error


def _sqlite_error() -> sqlite3.Error:
    """The error that SQLite gives for a database that may not grow."""
    database = sqlite3.connect(":memory:")
    database.execute("PRAGMA max_page_count = 1")
    try:
        database.execute("CREATE TABLE full (a)")
    except sqlite3.Error as error:
        return error
    raise AssertionError("the database grew")


class _RemoteError(Exception):
    """As Ray's, an error that holds the one of the worker."""

    cause = FULL_DISK


@pytest.mark.parametrize(
    "error",
    [
        FULL_DISK,
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        _caused_by_full_disk(TrainingError("the training failed")),
        _caused_by_full_disk(RuntimeError()),
        ExceptionGroup("workers", [ValueError(), FULL_DISK]),
        _RemoteError(),
        _sqlite_error(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_full_disk_is_recognised_however_it_is_wrapped(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    assert run_command(fail, "run it again") == 3
    message = capsys.readouterr().err
    assert "no space left on the device" in message
    assert "then run it again" in message


def test_other_errors_are_no_full_disk() -> None:
    assert find_full_disk(OSError(errno.EACCES, "denied")) is None
    assert find_full_disk(CoinError("a message")) is None

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(fail)


def _start(*arguments: str, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "coin_ray.commands.main", *arguments]
    process: subprocess.Popen[str] = subprocess.Popen(
        command, text=True, stderr=subprocess.PIPE, **options
    )  # type: ignore[call-overload]
    return process


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [("capacity", "--json"), ("capacity",)])
def test_a_process_whose_output_does_not_fit_the_disk(
    arguments: tuple[str, ...],
) -> None:
    with open("/dev/full", "w") as full_device:
        process = _start(*arguments, stdout=full_device)
        _, message = process.communicate(timeout=120)
    assert process.returncode == 3
    assert "no space left on the device" in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    "arguments", [("--help",), ("journal", "--help"), ("adapt", "demo", "--settings")]
)
def test_a_reader_that_has_closed_the_pipe_ends_the_process_quietly(
    arguments: tuple[str, ...],
) -> None:
    read, write = os.pipe()
    os.close(read)
    process = _start(*arguments, stdout=write)
    os.close(write)
    _, message = process.communicate(timeout=120)
    assert (process.returncode, message) == (141, "")


def test_errors_that_a_worker_wraps_and_that_the_system_raises(
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrapped = RuntimeError("pages of Ray")
    wrapped.__cause__ = StorageUnavailable("s3://b could not be reached for 600 s")
    errors: dict[Exception, tuple[int, str]] = {
        wrapped: (3, "StorageUnavailable: s3://b could not be reached for 600 s"),
        PermissionError(errno.EACCES, "Permission denied", "/home/me"): (
            2,
            "PermissionError: [Errno 13] Permission denied: '/home/me'",
        ),
        OSError(errno.EROFS, "Read-only file system", "/root/x"): (
            2,
            "OSError: [Errno 30] Read-only file system: '/root/x'",
        ),
    }
    for error, (code, line) in errors.items():

        def fail(error: Exception = error) -> None:
            raise error

        assert run_command(fail) == code
        assert capsys.readouterr().err.strip() == line


def test_the_report_of_an_error_of_ray_is_in_a_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ray_error = type("ActorDiedError", (Exception,), {"__module__": "ray.exceptions"})

    def fail() -> None:
        raise ray_error("page 1\npage 2\nthe actor died")

    assert run_command(fail) == 1
    (report,) = tmp_path.iterdir()
    line = capsys.readouterr().err.strip()
    assert line == (
        f"ActorDiedError: the actor died. The whole report of Ray: {report}"
    )
    assert "page 1" in report.read_text()
    assert "Traceback" in report.read_text()


def _ignore_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.mark.slow
@pytest.mark.parametrize("start", [None, _ignore_ctrl_c])
def test_a_process_that_ctrl_c_stops(
    start: Callable[[], None] | None, tmp_path: Path
) -> None:
    """Shells start jobs in the background with SIGINT ignored; uvicorn catches it."""
    ready_file = tmp_path / "ready"
    process = _start("serve", "--ready-file", str(ready_file), preexec_fn=start)
    give_up_at = time.monotonic() + 120
    while not ready_file.exists():
        assert process.poll() is None
        assert time.monotonic() < give_up_at
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped" in message
    assert "Traceback" not in message
