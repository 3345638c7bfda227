"""The models of later steps are tried before a call is paid, without keeping their
libraries in memory."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coin_ray.config import PipelineConfig
from coin_ray.config.presets import demo
from coin_ray.errors import ConfigError, InputError, StepError
from coin_ray.stages.collecting import model_check
from coin_ray.stages.collecting.model_check import check_models

COLLECT_WITHOUT_LABELER = """
import sys
import numpy as np
from dataclasses import replace
from coin_ray.cloud.answer import Answer
from coin_ray.cloud.detections import AnswerConverter
from coin_ray.cloud.protocol import RawDetections
from coin_ray.config.presets import demo
from coin_ray.stages import collect
from coin_ray.stages.collecting.cloud_actor import AnsweredImage, answer_table
from coin_ray.stages.collecting.labeler_actor import LabelerActor
from coin_ray.stages.collecting.model_check import check_models
config = demo()
config = replace(config, collect=replace(config.collect, labeler="none"))
check_models(config, sys.argv[1] + "/texts")
boxes, scores = np.ones((1, 4), np.float32), np.ones((1, len(config.classes)))
detections = RawDetections(boxes, scores.astype(np.float32), "per_class")
image = AnsweredImage("a", b"", Answer("ok", detections, 1, 1.0, 0.1, calls=1))
answers = answer_table([image], AnswerConverter(config))
LabelerActor(config, sys.argv[1] + "/parts")(answers)
print(sorted({"torch", "torchvision", "open_clip", "transformers"} & set(sys.modules)))
"""


def _config(labeler: Any, **clip: Any) -> PipelineConfig:
    config = demo()
    collect = replace(config.collect, labeler=labeler)
    return replace(config, collect=collect, clip=replace(config.clip, **clip))


@pytest.mark.parametrize("labeler", ["none", "crop"])
def test_a_missing_file_is_named(tmp_path: Path, labeler: str) -> None:
    config = _config(labeler, pretrained=str(tmp_path / "missing.pt"))
    with pytest.raises((InputError, ConfigError), match=r"missing\.pt"):
        check_models(config, str(tmp_path))


def test_a_check_that_dies_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_check.sys, "executable", "false")
    with pytest.raises(StepError, match="exit code 1"):
        check_models(_config("none"), str(tmp_path))


def test_a_collection_without_a_labeler_loads_no_torch(tmp_path: Path) -> None:
    collection = subprocess.run(
        [sys.executable, "-c", COLLECT_WITHOUT_LABELER, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert collection.returncode == 0, collection.stderr[-3000:]
    assert collection.stdout.strip() == "[]"
    assert len(list((tmp_path / "parts").glob("*.parquet"))) == 1
