"""Files that kill or stop the process that decodes them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coin_ray.data import inspect

POISONED = """
import os, signal, time
from coin_ray.data import inspect
look = inspect.look_at
def poisoned(uri):
    name = os.path.basename(uri)
    if "crash" in name:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "hang" in name:
        time.sleep(600)
    print("a library talks")
    return look(uri)
inspect.look_at = poisoned
inspect.main()
"""


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Children that do not survive some names; how many were started."""
    started: list[int] = []

    def start() -> subprocess.Popen[str]:
        made = subprocess.Popen(
            [sys.executable, "-c", POISONED],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(made.pid)
        return made

    monkeypatch.setattr(inspect, "_start", start)
    return started


def picture(path: Path) -> str:
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(path)
    return str(path)


def test_an_image_that_crashes_or_stops_its_process_is_rejected_and_the_others_are_not(
    tmp_path: Path, poisoned: list[int]
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
    uris = [picture(tmp_path / name) for name in names]
    (tmp_path / "broken.png").write_bytes(b"no image")
    found = dict(zip(names, inspect.inspect(uris, len(uris), seconds=20), strict=True))
    assert [name for name, one in found.items() if isinstance(one, dict)] == [
        "a.png",
        "b.png",
        "c.png",
    ]
    assert found["a.png"]["width"] == 30  # type: ignore[index]
    assert "crashed the process that decoded it (exit code -11)" in str(
        found["crash.png"]
    )
    assert "was not decoded in 20 s" in str(found["hang.png"])
    assert "not an image" in str(found["broken.png"])
    print(
        f"killed: {len(poisoned)} processes started for 3 images that end them; lost:"
        " nothing else"
    )


def test_few_files_are_asked_for_ahead_of_their_turn(tmp_path: Path) -> None:
    one, asked = picture(tmp_path / "a.png"), list[int]()

    def uris() -> Iterator[str]:
        for number in range(200):
            asked.append(number)
            yield one

    found = inspect.inspect(uris(), 200)
    next(found)
    assert len(asked) <= inspect.AHEAD + 1
    assert len(list(found)) == 199


def test_a_file_that_can_not_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"gone\.png"):
        list(inspect.inspect([str(tmp_path / "gone.png")], 1))
