"""A run's detectors start from a file of weights: what is taken over, and what is
refused before a call is paid."""

from __future__ import annotations

import io
import lzma
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import CLASSES, TEMPLATES, tiny_clip, tiny_config, tiny_network

from coin_ray.config import Cloud, Collect, DemoScenes, Distill, PipelineConfig
from coin_ray.config.presets import demo
from coin_ray.errors import InputError
from coin_ray.models.faster_rcnn_clip.backbone import load_backbone
from coin_ray.models.faster_rcnn_clip.first_weights import load_first_weights
from coin_ray.models.weight_files import read_tensors
from coin_ray.runs.graph import build_steps
from coin_ray.stages.collecting.model_check import check_models
from coin_ray.stages.common.students import new_clip_detector, new_student

CLIP = tiny_clip()
TRAINED_TENSOR = "visual.layer3.0.conv1.convolution.weight"
CONFIG = PipelineConfig(
    "test",
    CLASSES,
    DemoScenes(),
    Cloud(),
    clip=TEMPLATES,
    detector=tiny_config(),
    collect=Collect(labeler="none"),
)


def _with_weights(config: PipelineConfig, path: Path) -> PipelineConfig:
    return replace(config, detector=replace(config.detector, weights=str(path)))


@pytest.fixture
def trained_path(tmp_path: Path) -> Path:
    path = tmp_path / "detector.pt"
    state = new_clip_detector(CLIP, CONFIG, seed=8).state_dict()
    state[f"tower.{TRAINED_TENSOR}"] += 1
    torch.save(state, path)
    return path


def test_detectors_start_from_the_weights_whatever_their_seed(
    trained_path: Path,
) -> None:
    trained = torch.load(trained_path, weights_only=True)
    config = _with_weights(CONFIG, trained_path)
    for new_detector in (new_clip_detector, new_student):
        weights = new_detector(CLIP, config, seed=1).state_dict()
        for name, tensor in trained.items():
            assert torch.equal(weights[name], tensor), name


def test_a_co_detr_starts_from_their_tower_and_prompts(trained_path: Path) -> None:
    trained = torch.load(trained_path, weights_only=True)
    distill = Distill(student="co-detr", co_detr=tiny_network())
    config = _with_weights(replace(CONFIG, distill=distill), trained_path)
    weights = new_student(CLIP, config, seed=1).state_dict()
    tower_weights = weights[f"base.backbone.tower.{TRAINED_TENSOR}"]
    assert torch.equal(tower_weights, trained[f"tower.{TRAINED_TENSOR}"])
    assert torch.equal(weights["base.prompts.context"], trained["prompts.context"])


def test_weights_of_other_classes_are_taken_over(trained_path: Path) -> None:
    trained = torch.load(trained_path, weights_only=True)
    config = _with_weights(
        replace(CONFIG, classes=(*CLASSES, "lighthouse")), trained_path
    )
    detector = new_clip_detector(CLIP, config, seed=1)
    assert torch.equal(detector.head.embed.weight, trained["head.embed.weight"])
    assert detector.class_embeddings().shape[0] == len(CLASSES) + 2


def test_a_compressed_file_may_lack_the_backbone(
    trained_path: Path, tmp_path: Path
) -> None:
    trained = torch.load(trained_path, weights_only=True)
    state = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in trained.items()
        if not name.startswith("tower.")
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path = tmp_path / "detector.pt.xz"
    path.write_bytes(lzma.compress(buffer.getvalue()))
    detector = new_clip_detector(CLIP, _with_weights(CONFIG, path), seed=1)
    expected = trained["head.embed.weight"].half().float()
    assert torch.equal(detector.head.embed.weight, expected)
    name = f"tower.{TRAINED_TENSOR}"
    original = new_clip_detector(CLIP, CONFIG, seed=1).state_dict()[name]
    assert torch.equal(detector.state_dict()[name], original)


def _change_tensors(path: Path, case: str) -> None:
    state = torch.load(path, weights_only=True)
    if case == "another network":
        state["decoder.weight"] = torch.zeros(2)
    elif case == "another shape":
        state["head.embed.weight"] = torch.zeros(3, 4)
    elif case == "no head":
        del state["head.embed.weight"]
    elif case == "no tensors":
        state = {"student": state}
    torch.save(state, path)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("another network", r"of another network: 1 of its \d+ tensors"),
        ("another shape", r"has shape \(3, 4\), expected \(64, \d+\)"),
        ("no head", r"lacks 1 of the detector's tensors .*head\.embed\.weight"),
        ("no tensors", "holds no tensors by name"),
        ("truncated", r"can't be read: its 5,000 bytes are truncated"),
        ("missing", "no such file"),
    ],
)
def test_a_file_of_another_kind_is_refused_before_a_call_is_paid(
    trained_path: Path, case: str, message: str
) -> None:
    config = _with_weights(replace(demo(), collect=Collect(labeler="none")), Path())
    if case == "truncated":
        trained_path.write_bytes(trained_path.read_bytes()[:5000])
    elif case == "missing":
        trained_path.unlink()
    else:
        _change_tensors(trained_path, case)
    with pytest.raises(InputError, match=message):
        load_first_weights(new_clip_detector(CLIP, CONFIG, seed=1), str(trained_path))
    config = _with_weights(config, trained_path)
    with pytest.raises(InputError, match=r"detector\.weights"):
        check_models(config, str(trained_path.parent / "texts"))


def test_an_empty_file_is_named() -> None:
    with pytest.raises(InputError, match=r"w\.pt can't be read: its 0 bytes"):
        read_tensors(b"", "w.pt")


def test_a_step_knows_the_file_that_it_starts_from(trained_path: Path) -> None:
    config = _with_weights(CONFIG, trained_path)
    plain = build_steps(CONFIG, baselines=True)
    before = build_steps(config, baselines=True)
    _change_tensors(trained_path, "another shape")
    after = build_steps(config, baselines=True)
    for name in ("propagate", "distill", "pseudo_label", "oracle"):
        prints = {s[name].fingerprint for s in (plain, before, after)}
        assert len(prints) == 3, name
    assert plain["collect"].fingerprint == before["collect"].fingerprint


def test_the_demos_weights_are_small_and_fit() -> None:
    config = demo()
    path = Path(config.detector.weights)
    assert path.stat().st_size <= 4_000_000
    backbone = load_backbone(config)
    detector = new_clip_detector(backbone, config, seed=0)
    other = new_clip_detector(backbone, config, seed=1).state_dict()
    for name, tensor in detector.state_dict().items():
        assert torch.equal(other[name], tensor), name
