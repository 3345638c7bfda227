"""The advice of an error can be followed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from coin_ray.clip.encoder import load_clip
from coin_ray.commands.arguments import parse_run_arguments
from coin_ray.config import Clip
from coin_ray.errors import InputError


def test_the_settings_for_training_without_clip_are_accepted(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        load_clip(Clip(model="RN50", pretrained=str(tmp_path / "none.pt")))
    advice = str(error.value).partition("without CLIP: ")[2]
    assert re.fullmatch(r"(--[a-z.-]+ \w+ ?)+", advice)
    run = ["folder", "--images", str(tmp_path), "--classes", "car"]
    run += ["--cloud", "https://detector.example.com", *advice.split()]
    config, _ = parse_run_arguments(run)
    assert config.detector.backbone == "mobilenet_v2"
    assert config.mobilenet.weights == "FILE"
