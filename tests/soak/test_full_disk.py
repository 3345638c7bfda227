"""A disk that fills up in the middle of a run: a clear end, and the same command goes
on when there is room."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import REPOSITORY, environment
from small_runs import SMALL, assert_same_results

pytestmark = [pytest.mark.soak, pytest.mark.timeout(7200)]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own; needs root."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("may not mount a small file system here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def run(root: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "pipelines/full.py",
        "demo",
        "--root",
        str(root),
        *SMALL,
        "--tracking.no-enabled",
    ]
    variables = environment() | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command,
        cwd=REPOSITORY,
        env=variables,
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )


def test_a_full_disk_ends_the_run_and_room_lets_it_go_on(
    disk: Path, tmp_path: Path
) -> None:
    reference = tmp_path / "reference"
    assert run(reference).returncode == 0
    stops = []
    for size in (1, 4, 8, 12, 16, 500):
        subprocess.run(["mount", "-o", f"remount,size={size}m", str(disk)], check=True)
        done = run(disk / "root")
        if done.returncode == 0:
            break
        assert done.returncode == 3, done.stdout[-2000:] + done.stderr[-3000:]
        assert "no space left on the device" in done.stderr
        stops.append(
            f"{size} MB:"
            f" {done.stdout.strip().splitlines()[-1] if done.stdout.strip() else 'at the start'}"
        )
    assert stops
    assert_same_results(disk / "root", reference)
    print(f"disk full {len(stops)} times ({'; '.join(stops)}); lost: nothing")
