"""A root that f5fc1d4 finished (12 training scenes, two renderings, both baselines; its
weights and its page are left out) is finished for this version too."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

REPOSITORY = Path(__file__).resolve().parents[2]
ARCHIVE = REPOSITORY / "tests" / "golden" / "root-f5fc1d4.tar.xz"
MADE_AT = "/tmp/oldroot/"
"""Where the root lay when it was made: the table of images holds absolute paths."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(root, filter="data")
    (images,) = root.glob("steps/images-*/images.parquet")
    table = pq.read_table(images)
    uris = pc.replace_substring(table["uri"], MADE_AT, f"{root}/")
    position = table.schema.get_field_index("uri")
    pq.write_table(table.set_column(position, "uri", uris), images)
    return root


def _run(root: Path, *options: str, script: str = "full.py") -> str:
    process = subprocess.run(
        [
            sys.executable,
            str(REPOSITORY / "pipelines" / script),
            "--config",
            str(root / "config.yaml"),
            "--root",
            str(root),
            "--baselines",
            *options,
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def _modified(folder: Path) -> dict[str, int]:
    return {
        str(file.relative_to(folder)): file.stat().st_mtime_ns
        for file in folder.rglob("*")
        if file.is_file() and file.name != "summary.json"
    }


def _summary(root: Path) -> dict[str, object]:
    summary: dict[str, object] = json.loads((root / "summary.json").read_text())
    del summary["versions"]
    return summary


def test_nothing_is_asked_and_no_step_is_made_again(root: Path) -> None:
    files, summary = _modified(root), _summary(root)
    log = _run(root)
    assert ": started" not in log
    assert _modified(root) == files
    assert _summary(root) == summary


@pytest.mark.slow
def test_a_lost_collection_is_made_again_from_the_journal_alone(root: Path) -> None:
    (old_step,) = root.glob("steps/collect-*")
    old_tables = {
        name: pq.read_table(old_step / name)
        for name in ("cloud.parquet", "clip_labels.parquet")
    }
    shutil.rmtree(old_step)
    log = _run(root, script="collect.py")
    (step,) = root.glob("steps/collect-*")
    assert step.name == old_step.name
    assert "propagate: started" not in log
    calls = json.loads((step / "manifest.json").read_text())["metrics"]["calls"]
    assert (calls["made"], calls["failed"], calls["cost_usd"]) == (0, 0, 0)
    for name, old_table in old_tables.items():
        table = pq.read_table(step / name)
        for column in ("image_id", "boxes", "labels", "prob_source"):
            assert _equal(table[column], old_table[column]), (name, column)
        for column in ("scores", "probs"):
            assert _differs_by(table[column], old_table[column]) <= ROUNDING[name]


ROUNDING = {"cloud.parquet": 1e-7, "clip_labels.parquet": 2e-5}
"""Largest difference of probabilities: CLIP's batch norms are folded into its weights
since then, and answers are converted by numpy."""


def _equal(column: pa.ChunkedArray, other: pa.ChunkedArray) -> bool:
    return bool(column.combine_chunks().equals(other.combine_chunks()))


def _differs_by(column: pa.ChunkedArray, other: pa.ChunkedArray) -> float:
    numbers, other_numbers = _flatten(column), _flatten(other)
    assert len(numbers) == len(other_numbers) > 0
    return float(np.abs(numbers - other_numbers).max())


def _flatten(column: pa.ChunkedArray) -> NDArray[np.float64]:
    while pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
        column = pc.list_flatten(column)
    return np.asarray(column.to_numpy(zero_copy_only=False), np.float64)
