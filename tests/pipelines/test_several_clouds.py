"""Two clouds through Ray Data, as the command line starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN, TEST = 16, 4
SIDE = 192
"""Pixels of the demo's scenes."""


@pytest.fixture
def second_cloud() -> Iterator[str]:
    """The address of a server in a process of its own, which answers in the reference
    wire format with names of the demo."""
    command = [
        sys.executable,
        "tests/cloud/counting_server.py",
        "--width",
        str(SIDE),
        "--height",
        str(SIDE),
        "--labels",
        "car",
        "house",
        "bird",
    ]
    server = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    yield server.stdout.readline().strip()
    server.communicate()


def _collected(root: Path, *arguments: str) -> tuple[dict[str, Any], int]:
    """The step's metrics, and how many images have an answer."""
    size = (
        "--data.train",
        str(TRAIN),
        "--data.val",
        "0",
        "--data.test",
        str(TEST),
        "--cloud.serve-faults",
        "0",
        "--tracking.no-enabled",
    )
    environment = {
        **os.environ,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    before = set(root.glob("steps/collect-*"))
    command = [
        sys.executable,
        "pipelines/collect.py",
        "demo",
        "--root",
        str(root),
        *size,
        *arguments,
    ]
    process = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    (folder,) = set(root.glob("steps/collect-*")) - before
    metrics: dict[str, Any] = json.loads((folder / "manifest.json").read_text())[
        "metrics"
    ]
    return metrics, pq.read_table(folder / "cloud.parquet", columns=["status"])[
        "status"
    ].to_pylist().count("ok")


@pytest.mark.slow
def test_a_second_cloud_of_another_process_gives_second_opinions_and_is_fused(
    tmp_path: Path, second_cloud: str
) -> None:
    count = TRAIN + TEST
    cascade, answered = _collected(
        tmp_path, "--more-clouds", second_cloud, "--ensemble.mode", "cascade"
    )
    assert answered == count
    assert cascade["answered_by"]["http 1"] == count
    assert 0 < cascade["answered_by"]["http 2"] == cascade["second_opinions"] <= count
    fuse, _ = _collected(
        tmp_path, "--more-clouds", second_cloud, "--ensemble.mode", "fuse"
    )
    assert fuse["answered_by"] == {"http 1": count, "http 2": count}
    assert fuse["calls"]["made"] == count - cascade["second_opinions"], (
        "answers to the cascade are on record"
    )
