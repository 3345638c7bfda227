"""Check that a run whose disk fills up ends with a clear message, and that the same
command resumes it when there is space."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import REPOSITORY, quiet_environment
from small_runs import SMALL, assert_same_results

pytestmark = [pytest.mark.soak, pytest.mark.timeout(7200)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB, mounted for the test; needs root."""
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount_point)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a small file system here")
    yield mount_point
    subprocess.run(["umount", "-l", str(mount_point)], check=True)


def _run_demo(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "pipelines/full.py", "demo", "--root", str(root)]
    return subprocess.run(
        [*command, *SMALL, "--tracking.no-enabled"],
        cwd=REPOSITORY,
        env=quiet_environment() | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )


def test_a_full_disk_ends_the_run_and_room_lets_it_go_on(
    small_disk: Path, tmp_path: Path
) -> None:
    reference = tmp_path / "reference"
    assert _run_demo(reference).returncode == 0
    stops = []
    for size in (1, 4, 8, 12, 16, 500):
        subprocess.run(
            ["mount", "-o", f"remount,size={size}m", str(small_disk)], check=True
        )
        completed = _run_demo(small_disk / "root")
        if completed.returncode == 0:
            break
        assert completed.returncode == 3, (
            completed.stdout[-2000:] + completed.stderr[-3000:]
        )
        assert "no space left on the device" in completed.stderr
        lines = completed.stdout.strip().splitlines() or ["at the start"]
        stops.append(f"{size} MB: {lines[-1]}")
    assert stops
    assert_same_results(small_disk / "root", reference)
    print(f"disk full {len(stops)} times ({'; '.join(stops)}); lost: nothing")
