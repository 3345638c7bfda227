"""A whole run whose student is a Co-DETR: distilled, evaluated by its base alone,
exported, with baselines of the same network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coin_ray.models.co_detr.regional import DetrWithRegionHead
from coin_ray.predictors.student import load_exported_student

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = [
    *(
        "--data.train",
        "16",
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


def test_the_whole_pipeline_with_a_co_detr_student(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "pipelines/full.py",
        "demo",
        "--student",
        "co-detr",
        "--baselines",
        "--root",
        str(tmp_path),
        *SMALL,
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
        timeout=590,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]

    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {"clip_detector", "student", "pseudo_label", "oracle"} <= set(
        summary["map50"]
    )
    for step in ("distill", "pseudo_label", "oracle"):
        weights = torch.load(
            next(tmp_path.glob(f"steps/{step}-*/detector.pt")), weights_only=True
        )
        assert any(name.startswith("base.decoder.") for name in weights), step
    (curve,) = tmp_path.glob("steps/distill-*/curve.json")
    assert "inconsistent_queries" in json.loads(curve.read_text())[-1]

    predictor = load_exported_student(
        str(next(tmp_path.glob("steps/export-*/model.json")).parent)
    )
    assert isinstance(predictor.detector, DetrWithRegionHead)
    pixels = np.random.default_rng(0).integers(0, 255, (120, 160, 3), np.uint8)
    assert predictor(Image.fromarray(pixels)).num_classes == len(predictor.classes) == 8
