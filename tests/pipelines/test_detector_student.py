"""A whole run whose student was a detector before: taught, evaluated, exported, loaded,
with baselines of the same start.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import coin_ray
from coin_ray.data.coco_classes import COCO_CLASSES
from coin_ray.models.students.yolox_network import YOLOX_SIZES, YoloxNetwork

REPOSITORY = Path(__file__).resolve().parents[2]
RUN = "demo --student yolox-nano --baselines --separate.second-teacher clip_detector"
SMALL = (
    "--data.train 16 --data.val 2 --data.test 8 --cloud.serve-faults 0"
    " --cloud.serve-latency 0 --propagate.fit.steps 4 --distill.fit.steps 6"
    " --distill.fit.warmup 2 --distill.student-side 96"
    " --distill.student-rendering plain"
)

pytestmark = pytest.mark.slow


def run_command(command: str, *arguments: str) -> None:
    environment = os.environ | {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    process = subprocess.run(
        [sys.executable, "-m", "coin_ray.commands.main", *command.split(), *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=590,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]


def test_the_whole_pipeline_with_a_yolox(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights, root = tmp_path / "nano.pth", tmp_path / "run"
    network = YoloxNetwork(80, YOLOX_SIZES["yolox-nano"])
    torch.save({"model": network.state_dict()}, weights)
    run_command(
        f"adapt {RUN} {SMALL}",
        *("--root", str(root), "--distill.student-weights", str(weights)),
        *("--distill.student-weight-classes", *COCO_CLASSES),
    )
    summary = json.loads((root / "summary.json").read_text())
    expected = {"clip_detector", "student", "pseudo_label", "oracle"}
    assert expected <= set(summary["map50"])
    assert list(root.glob("steps/report-*/report.html"))

    config = str(root / "config.yaml")
    run_command("export --baselines --config", config, "--root", str(root))
    image = Image.new("RGB", (80, 60))
    exported = coin_ray.load(str(root / "export" / "model.onnx"))
    trained = coin_ray.load(str(next(root.glob("steps/export-*"))))
    assert exported.classes == trained.classes
    assert len(exported(image)) == len(trained(image))
