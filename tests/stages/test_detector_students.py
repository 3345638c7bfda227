"""Students that were detectors before, in the steps of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from coin_ray.config import PipelineConfig
from coin_ray.config.presets import demo, with_student
from coin_ray.errors import ConfigError, InputError
from coin_ray.models.students.yolox_network import YOLOX_SIZES, YoloxNetwork
from coin_ray.runs.graph import baseline_training, build_steps
from coin_ray.runs.runner import run_pipeline
from coin_ray.stages.common.prediction import predict
from coin_ray.stages.common.students import (
    load_trained_detector,
    student_input,
    with_target_labels,
)
from coin_ray.stages.common.training_job import save_weights
from coin_ray.stages.distill import (
    build_target_distillation,
    export_target_distillation,
)
from coin_ray.stages.propagate import build_propagation, export_propagation
from coin_ray.training.ckg_targets import CkgTargetTraining
from coin_ray.training.direct import TargetTraining, plain_targets

BACKBONE = cast("Any", None)  # no part of these students


@pytest.fixture(scope="module")
def yolox_weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    network = YoloxNetwork(80, YOLOX_SIZES["yolox-nano"])
    path = tmp_path_factory.mktemp("weights") / "nano.pth"
    torch.save({"model": network.state_dict()}, path)
    return str(path)


def make_config(yolox_weights: str, **changes: object) -> PipelineConfig:
    config = with_student(demo(), "yolox-nano")
    settings = {
        "student_weights": yolox_weights,
        "student_weight_classes": (),
        "student_side": 96,
        "student_rendering": "plain",
    }
    distill = replace(config.distill, **(settings | changes))  # type: ignore[arg-type]
    separate = replace(config.separate, second_teacher="clip_detector")
    return replace(config, distill=distill, separate=separate)


def test_the_average_is_delivered_and_read_back(
    yolox_weights: str, tmp_path: Path
) -> None:
    config = make_config(yolox_weights)
    task = build_target_distillation(config)
    for parameter in task.average.parameters():
        parameter.add_(0.01)
    files = export_target_distillation(task)
    assert set(files) == {"detector.pt", "teacher.pt"}
    uri = str(tmp_path / "detector.pt")
    save_weights(uri, cast("Any", files["detector.pt"]))
    loaded = load_trained_detector("student", uri, BACKBONE, config)
    images = [torch.randint(256, (3, 60, 90), dtype=torch.uint8)]
    (detections,) = predict(loaded, images, config.detector)
    (expected,) = task.average.predict(images)
    assert torch.equal(detections.boxes, expected.boxes)
    assert torch.equal(detections.probs, expected.probs)


def test_with_ckg_the_student_is_delivered_without_its_region_head(
    yolox_weights: str,
) -> None:
    config = make_config(yolox_weights, fusion="ckg")
    task = build_target_distillation(config)
    assert isinstance(task, CkgTargetTraining)
    plain = build_target_distillation(make_config(yolox_weights))
    delivered = cast("Any", export_target_distillation(task)["detector.pt"])
    expected = cast("Any", export_target_distillation(plain)["detector.pt"])
    assert list(delivered) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(delivered[name], tensor), name


def test_baselines_have_the_student_s_start_and_steps(yolox_weights: str) -> None:
    config = make_config(yolox_weights)
    baseline = baseline_training(config)
    assert baseline.fit.steps == config.distill.fit.steps
    task = build_propagation(config, baseline, "cloud")
    assert isinstance(task, TargetTraining)
    assert task.make_batch_targets is plain_targets
    student = build_target_distillation(config).student.state_dict()
    for name, tensor in task.student.state_dict().items():
        assert torch.equal(tensor, student[name]), name
    assert set(export_propagation(task)) == {"detector.pt"}


def test_the_student_has_its_own_size_and_threshold(yolox_weights: str) -> None:
    config = make_config(yolox_weights, student_side=128)
    settings = student_input(config)
    assert (settings.short_side, settings.long_side) == (128, 128)
    assert student_input(demo()) == demo().detector
    assert with_target_labels(config).labels.score_min == 0.1
    assert with_target_labels(demo()) == demo()


def test_other_weights_are_another_distillation(
    yolox_weights: str, tmp_path: Path
) -> None:
    path = tmp_path / "nano.pth"
    path.write_bytes(Path(yolox_weights).read_bytes())
    config = make_config(str(path))
    before = build_steps(config, baselines=True)
    path.write_bytes(b"other")
    after = build_steps(config, baselines=True)
    changed = {
        name
        for name, step in before.items()
        if step.fingerprint != after[name].fingerprint
    }
    assert {"distill", "pseudo_label", "oracle"} <= changed
    assert not changed & {"images", "collect"}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"student_weights": "/nowhere/nano.pth"}, InputError, "no such file"),
        ({"student": "yolox-tiny"}, InputError, "another architecture than yolox-tiny"),
        ({"student_weight_classes": ("a", "b")}, ConfigError, "80 classes, expected 2"),
    ],
)
def test_wrong_weights_are_named_before_anything_is_done(
    changes: dict[str, object],
    error: type[Exception],
    message: str,
    yolox_weights: str,
    tmp_path: Path,
) -> None:
    config = make_config(yolox_weights, **changes)
    with pytest.raises(error, match=message):
        run_pipeline(config, build_steps(config), str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_settings_that_do_not_fit_are_named(yolox_weights: str) -> None:
    with pytest.raises(ConfigError, match="fusion average"):
        make_config("", student="d-fine-n", fusion="ckg")
    with pytest.raises(ConfigError, match="multiple of 32"):
        make_config(yolox_weights, student_side=100)
    with pytest.raises(ConfigError, match="no statistics of batch norms"):
        make_config("x.onnx", student_batch_norm="live")
    with pytest.raises(ConfigError, match="is for YOLOX students"):
        make_config(yolox_weights, student="faster-rcnn")
