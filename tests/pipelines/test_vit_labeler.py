"""A whole run of the demo with second opinions by a vision transformer that the documented
script has trained, beside a detector on the demo's own CLIP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from coin_ray.demo.build import vit_clip
from tests.small_runs import read_call_log

SMALL = [
    *("--data.train", "16", "--data.val", "2", "--data.test", "8"),
    *("--cloud.serve-faults", "0", "--cloud.serve-latency", "0"),
    *("--propagate.fit.steps", "4", "--distill.fit.steps", "6"),
    *("--distill.burn-up", "3", "--distill.fit.warmup", "2"),
]
LABELER = ["--labeler", "crop", "--labeler.model"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    vit_clip.main([str(folder), "--crops", "1500", "--steps", "120"])
    return folder


def _adapt(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "coin_ray.commands.main", "adapt", "demo"]
    environment = {
        **os.environ,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    return subprocess.run(
        [*command, "--root", str(root), *SMALL, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=590,
        check=False,
    )


def test_a_run_with_a_vision_transformer(vit_folder: Path, tmp_path: Path) -> None:
    process = _adapt(tmp_path, *LABELER, f"local-dir:{vit_folder}")
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    assert "second opinions by CLIP" in process.stdout
    (path,) = tmp_path.glob("steps/collect-*/clip_labels.parquet")
    vectors = [
        np.array(row["probs"])
        for row in pq.read_table(path).to_pylist()
        if row["probs"]
    ]
    probabilities = np.concatenate(vectors)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    assert len(np.unique(probabilities.argmax(1))) > 2
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {"cloud", "clip_labels", "student"} <= set(summary["map50"])
    card = next(tmp_path.glob("steps/export-*/README.md"), None)
    assert card is None or "CLIP" in card.read_text()


def test_a_model_that_can_t_label_ends_the_run_before_a_call(
    vit_folder: Path, tmp_path: Path
) -> None:
    templates = ["--clip.templates", "a photo of a {}, " + "very " * 60]
    for arguments, message in (
        ([*LABELER, "ViT-B-23"], "nearest: ViT-B-32"),
        ([*LABELER, f"local-dir:{vit_folder}", *templates], "tokens, but CLIP"),
    ):
        process = _adapt(tmp_path, *arguments)
        assert process.returncode not in (0, 1), process.stdout[-2000:]
        assert message in process.stderr + process.stdout
        assert not read_call_log(tmp_path)
