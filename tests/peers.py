"""Other libraries of the field, in an environment of their own: datumaro needs another
pandas and Pillow than this project."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

REQUIREMENTS = ("supervision==0.31.2", "datumaro==1.13.12", "pycocotools==2.0.11")
SCRIPT = Path(__file__).with_name("peer_script.py")

LabelledBoxes = dict[str, list[list[Any]]]
"""By the name of an image without suffix: left, top, right, bottom, class name."""


@functools.cache
def peers_python() -> str:
    """Return the Python that has the libraries; installed once for each version of
    ``REQUIREMENTS``, below the environment of this Python."""
    version = hashlib.sha256(" ".join(REQUIREMENTS).encode()).hexdigest()[:12]
    folder = Path(sys.prefix) / f"peers-{version}"
    python, mark = folder / "bin" / "python", folder / "installed"
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not mark.exists():
            venv.create(folder, clear=True, with_pip=True)
            command = [str(python), "-m", "pip", "install", "--quiet", *REQUIREMENTS]
            completed = subprocess.run(command, capture_output=True, text=True)
            if completed.returncode:
                pytest.skip(f"can't install {REQUIREMENTS}: {completed.stderr[-300:]}")
            mark.touch()
    return str(python)


def write_as(library: str, format: str, folder: Path) -> LabelledBoxes:
    """Let a library write a data set to a new folder; return its boxes."""
    return _run("write", library, format, folder)


def read_as(library: str, format: str, folder: Path, *arguments: str) -> LabelledBoxes:
    """Let a library read a data set; return its boxes, crowds left out."""
    return _run("read", library, format, folder, *arguments)


def _run(action: str, library: str, format: str, *rest: Any) -> LabelledBoxes:
    command = [peers_python(), SCRIPT, action, library, format, *rest]
    completed = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True
    )
    assert completed.returncode == 0, completed.stderr[-3000:]
    boxes: LabelledBoxes = json.loads(completed.stdout.splitlines()[-1])
    return boxes
