"""One intensity range for a whole run on 16-bit images, and in the exported student."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coin_ray import storage
from coin_ray.config import Cloud, Folder, PipelineConfig
from coin_ray.config.fingerprints import fingerprint, to_identity
from coin_ray.config.yaml_files import read_config, to_yaml
from coin_ray.data.intensity import found_range
from coin_ray.predictors.student import load_exported_student, write_exported_student
from coin_ray.runs.steps import (
    Step,
    make_context,
    read_manifest,
    reopen_step,
    run_step,
    with_found_range,
)
from coin_ray.stages.common.prediction import read_image
from tests.builders import CLASSES, tiny_detector

pytestmark = pytest.mark.usefixtures("inspect_in_this_process")


def _write_frame(path: Path, ground: int, warm: int) -> str:
    """Write a 16-bit image with a warm object on a colder ground."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.full((32, 48), ground, np.uint16)
    values[8:24, 8:24] = warm
    Image.fromarray(values).save(path)
    return str(path)


def _config(tmp_path: Path, **settings: object) -> PipelineConfig:
    data = Folder(images=str(tmp_path / "frames"), **settings)  # type: ignore[arg-type]
    return PipelineConfig("folder", CLASSES, data, Cloud(serve="demo"))


def _images_step(config: PipelineConfig) -> Step:
    return Step("images", "images", config.data)


def test_every_later_step_sees_the_range_that_the_images_step_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    night = _write_frame(tmp_path / "frames" / "night.png", 21_000, 24_000)
    day = _write_frame(tmp_path / "frames" / "day.png", 27_000, 31_000)
    config, root = _config(tmp_path), str(tmp_path / "root")
    step = _images_step(config)
    manifest = run_step(step, config, root)
    assert manifest.metrics["intensity"] == {
        "range": [21_000.0, 31_000.0],
        "images": 2,
        "outside": 0,
    }
    assert "values 21000..31000 become black..white" in capsys.readouterr().out
    later = Step("collect", "collect", (), (step,))
    seen = make_context(later, config, root).config.intensity_range
    assert seen == (21_000.0, 31_000.0)
    assert with_found_range(config, step.folder(root)).intensity_range == seen
    assert found_range(root, to_identity(config.data)) == seen
    frames = [read_image(uri, seen) for uri in (night, day)]
    levels = [(int(frame[0, 0, 0]), int(frame[0, 16, 16])) for frame in frames]
    assert levels == [(0, 76), (153, 255)]


def test_new_images_leave_the_range_of_paid_answers_as_it_was(tmp_path: Path) -> None:
    _write_frame(tmp_path / "frames" / "first.png", 21_000, 24_000)
    config, root = _config(tmp_path), str(tmp_path / "root")
    step = _images_step(config)
    first = run_step(step, config, root)
    reopen_step(step.folder(root), first)
    _write_frame(tmp_path / "frames" / "second.png", 26_000, 29_000)
    second = run_step(step, config, root).metrics["intensity"]
    assert second == {"range": [21_000.0, 24_000.0], "images": 2, "outside": 1}


def test_8_bit_images_have_no_range_and_no_new_metric(tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    Image.new("RGB", (48, 32), "red").save(tmp_path / "frames" / "a.png")
    config, root = _config(tmp_path), str(tmp_path / "root")
    step = _images_step(config)
    assert "intensity" not in run_step(step, config, root).metrics
    assert with_found_range(config, step.folder(root)) is config


def test_the_setting_is_in_the_config_and_in_the_fingerprint(tmp_path: Path) -> None:
    _write_frame(tmp_path / "frames" / "a.png", 21_000, 24_000)
    automatic = _config(tmp_path)
    config = _config(tmp_path, intensity_range=(20_000.0, 40_000.0))
    assert fingerprint(config.data) != fingerprint(automatic.data)
    uri = str(tmp_path / "config.yaml")
    storage.write_bytes(uri, to_yaml(config).encode())
    assert read_config(uri) == config
    step, root = _images_step(config), str(tmp_path / "root")
    run_step(step, config, root)
    intensity = read_manifest(step.folder(root)).metrics["intensity"]
    assert intensity["range"] == [20_000.0, 40_000.0]
    assert config.intensity_range == (20_000.0, 40_000.0)


def test_the_range_is_in_the_exported_student(tmp_path: Path) -> None:
    folder = str(tmp_path / "export")
    detector = tiny_detector(score_min=0.01)
    write_exported_student(detector, CLASSES, folder, intensity_range=(290.0, 310.5))
    assert load_exported_student(folder).intensity_range == (290.0, 310.5)
    write_exported_student(detector, CLASSES, folder)
    assert load_exported_student(folder).intensity_range is None
    assert "intensity_range" not in storage.read_json(f"{folder}/model.json")
