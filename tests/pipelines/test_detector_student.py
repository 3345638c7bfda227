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
from tests.models.students.tiny_networks import save_tiny_network

REPOSITORY = Path(__file__).resolve().parents[2]
RUN = "demo --baselines --separate.second-teacher clip_detector"
SMALL = (
    "--data.train 16 --data.val 2 --data.test 8 --cloud.serve-faults 0"
    " --cloud.serve-latency 0 --propagate.fit.steps 4 --distill.fit.steps 6"
    " --distill.fit.warmup 2"
)
SMALL_YOLOX = " --distill.student-side 96 --distill.student-rendering plain"

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


def save_yolox(path: Path) -> str:
    torch.manual_seed(0)
    network = YoloxNetwork(80, YOLOX_SIZES["yolox-nano"])
    torch.save({"model": network.state_dict()}, path)
    return str(path)


@pytest.mark.parametrize("fusion", ["average", "ckg"])
def test_the_whole_pipeline_with_a_yolox(tmp_path: Path, fusion: str) -> None:
    weights, root = save_yolox(tmp_path / "nano.pth"), tmp_path / "run"
    run_command(
        f"adapt {RUN} {SMALL} {SMALL_YOLOX} --student yolox-nano",
        *("--root", str(root), "--distill.student-weights", weights),
        *("--distill.student-weight-classes", *COCO_CLASSES),
        *("--distill.fusion", fusion),
    )
    check_run(root)


def test_the_whole_pipeline_with_a_transformers_detector(tmp_path: Path) -> None:
    """From a folder as on the hub, whose classes are others."""
    pytest.importorskip("transformers")
    folder, root = tmp_path / "d_fine", tmp_path / "run"
    save_tiny_network(folder, "d_fine", ("person", "stop sign", "tree"))
    run_command(f"adapt {RUN} {SMALL} --student {folder}", "--root", str(root))
    check_run(root)


def check_run(root: Path) -> None:
    """Check the figures and the page of a finished run, and that its exported student
    detects what the trained one does.
    """
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
