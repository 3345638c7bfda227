"""A run, its most disputed images corrected by a person, and the run again: what was
paid stays paid, and the person is believed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from small_runs import count_calls_by_image

from coin_ray.config.data import DEMO_CLASSES
from coin_ray.data.review import cvat
from coin_ray.data.review.reviews import Review, ReviewedBox

REPOSITORY = Path(__file__).resolve().parents[2]
REVIEWED = 6
SMALL = [
    *(
        "--data.train",
        "24",
        "--data.val",
        "2",
        "--data.test",
        "8",
        "--cloud.serve-faults",
        "0",
        "--cloud.serve-latency",
        "0",
    ),
    *(
        "--propagate.fit.steps",
        "4",
        "--distill.fit.steps",
        "6",
        "--distill.burn-up",
        "3",
        "--distill.fit.warmup",
        "2",
    ),
]

pytestmark = pytest.mark.slow


def _run(script: str, *arguments: str) -> None:
    environment = {
        **os.environ,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [sys.executable, f"pipelines/{script}", *arguments]
    process = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=590,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]


def _corrected(review: Review) -> Review:
    """Return what a person hands back: one box, of a class that nobody said there, around the
    middle."""
    width, height = review.width, review.height
    box = ReviewedBox((width / 4, height / 4, width / 2, height / 2), DEMO_CLASSES[-1])
    return replace(review, boxes=(box,), reviewed=True)


def test_a_run_goes_on_with_what_people_have_corrected(tmp_path: Path) -> None:
    root = tmp_path / "run"
    _run("full.py", "demo", "--root", str(root), *SMALL)
    calls = count_calls_by_image(root)
    before = json.loads((root / "summary.json").read_text())

    _run(
        "review.py",
        "out",
        "cvat",
        "--root",
        str(root),
        "--out",
        str(tmp_path / "out"),
        "--most",
        str(REVIEWED),
    )
    reviews = cvat.read_cvat(str(tmp_path / "out" / "annotations.xml"))
    (tmp_path / "back.xml").write_bytes(
        cvat.cvat_xml([_corrected(review) for review in reviews])
    )
    _run(
        "full.py",
        "demo",
        "--root",
        str(root),
        "--corrections",
        str(tmp_path / "back.xml"),
        *SMALL,
    )

    assert count_calls_by_image(root) == calls, "no call is paid twice"
    for step, times in {
        "images": 1,
        "collect": 1,
        "corrections": 1,
        "propagate": 2,
        "separate": 2,
        "distill": 2,
    }.items():
        assert len(list(root.glob(f"steps/{step}-*/manifest.json"))) == times, step
    (table,) = root.glob("steps/corrections-*/corrections.parquet")
    assert set(pq.read_table(table)["image_id"].to_pylist()) == {
        review.image_id for review in reviews
    }
    after = json.loads((root / "summary.json").read_text())
    assert after["map50"]["cloud"] == before["map50"]["cloud"], (
        "measured on the same test images"
    )
    assert after["map50"]["student"] != before["map50"]["student"]
    counts = after["corrections"]
    assert (counts["images"], counts["boxes"], counts["empty"]) == (
        REVIEWED,
        REVIEWED,
        0,
    )
    assert counts["teachers"]["cloud"]["missed"] > 0
    pages = sorted(
        root.glob("steps/report-*/report.html"), key=lambda page: page.stat().st_mtime
    )
    assert ['id="corrected"' in page.read_text() for page in pages] == [False, True]
