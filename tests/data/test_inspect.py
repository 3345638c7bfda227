"""Files that kill or stop the process that decodes them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pebble import ProcessFuture, ProcessPool
from PIL import Image

from coin_ray.data import inspect
from coin_ray.data.inspect import Inspection


def _inspect_or_die(uri: str) -> Inspection:
    """Stand in for ``inspect_image``: some names end their process, or never end."""
    name = os.path.basename(uri)
    if "crash" in name:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "hang" in name:
        time.sleep(600)
    print("a library talks")
    return inspect.inspect_image(uri)  # in the worker process: the real one


@pytest.fixture
def _deadly_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "inspect_image", _inspect_or_die)


def _write_image(path: Path) -> str:
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(path)
    return str(path)


@pytest.mark.usefixtures("_deadly_names")
def test_an_image_that_crashes_or_stops_its_process_is_rejected_and_the_others_are_not(
    tmp_path: Path,
) -> None:
    names = [
        "a.png",
        "crash.png",
        "b.png",
        "hang.png",
        "crash2.png",
        "c.png",
        "broken.png",
    ]
    uris = [_write_image(tmp_path / name) for name in names]
    (tmp_path / "broken.png").write_bytes(b"no image")
    inspections = list(inspect.inspect_images(uris, len(uris), seconds=3))
    by_name = dict(zip(names, inspections, strict=True))
    usable = [name for name, row in by_name.items() if isinstance(row, dict)]
    assert usable == ["a.png", "b.png", "c.png"]
    assert by_name["a.png"]["width"] == 30  # type: ignore[index]
    crash = "crashed the process that decoded it (exit code -11)"
    assert crash in str(by_name["crash.png"])
    assert crash in str(by_name["crash2.png"])
    assert "was not decoded in 3 s" in str(by_name["hang.png"])
    assert "not an image" in str(by_name["broken.png"])


@pytest.mark.usefixtures("_deadly_names")
@pytest.mark.slow
def test_many_images_that_crash_at_once_lose_no_other(tmp_path: Path) -> None:
    good = _write_image(tmp_path / "good.png")
    uris = [good if n % 3 == 0 else str(tmp_path / f"crash{n}.png") for n in range(24)]
    inspections = list(inspect.inspect_images(uris, len(uris)))
    assert [isinstance(row, dict) for row in inspections] == [u == good for u in uris]
    assert all("exit code -11" in row for row in inspections if isinstance(row, str))


def test_files_of_a_broken_pool_are_submitted_to_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule, broken_uris = ProcessPool.schedule, list[str]()

    def break_twice(pool: ProcessPool, function: Any, uris: Any, **options: Any) -> Any:
        if uris[0].endswith("3.png") and len(broken_uris) < 2:
            broken_uris.append(uris[0])
            future = ProcessFuture[Inspection]()
            future.set_exception(BrokenProcessPool("All workers expired"))
            return future
        return schedule(pool, function, uris, **options)

    monkeypatch.setattr(ProcessPool, "schedule", break_twice)
    uris = [_write_image(tmp_path / f"{n}.png") for n in range(6)]
    inspections = list(inspect.inspect_images(uris, len(uris)))
    assert len(broken_uris) == 2
    assert [row["uri"] for row in inspections if isinstance(row, dict)] == uris


def test_a_pool_that_breaks_each_time_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def schedule(*_: Any, **__: Any) -> Any:
        future = ProcessFuture[Inspection]()
        future.set_exception(BrokenProcessPool("All workers expired"))
        return future

    monkeypatch.setattr(ProcessPool, "schedule", schedule)
    with pytest.raises(BrokenProcessPool):
        list(inspect.inspect_images([_write_image(tmp_path / "a.png")], 1))


def test_few_files_are_asked_for_ahead_of_their_turn(tmp_path: Path) -> None:
    path, positions = _write_image(tmp_path / "a.png"), list[int]()

    def uris() -> Iterator[str]:
        for position in range(200):
            positions.append(position)
            yield path

    inspections = inspect.inspect_images(uris(), 200)
    next(inspections)
    assert len(positions) <= inspect.MAX_PENDING + 1
    assert len(list(inspections)) == 199


def test_a_file_that_can_not_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"gone\.png"):
        list(inspect.inspect_images([str(tmp_path / "gone.png")], 1))


def test_a_script_without_a_main_guard_is_not_run_again_by_the_processes(
    tmp_path: Path,
) -> None:
    path = _write_image(tmp_path / "a.png")
    script = tmp_path / "script.py"
    script.write_text(
        "from coin_ray.data.inspect import inspect_images\n"
        "print('started')\n"
        f"print(next(inspect_images([{path!r}], 1))['width'])\n"
    )
    run = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["started", "30"]
