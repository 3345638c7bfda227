"""Which model labels the boxes, what it needs, and what becomes of it in the parts."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torchvision.transforms.functional import pil_to_tensor

from coin_ray.clip.fused_resnet import FusedResNet
from coin_ray.cloud.answer import Answer
from coin_ray.cloud.detections import AnswerConverter
from coin_ray.cloud.protocol import RawDetections
from coin_ray.config import Labeler, PipelineConfig, check_runnable
from coin_ray.config.presets import demo, laptop
from coin_ray.errors import ConfigError, InputError
from coin_ray.runs.graph import build_steps
from coin_ray.stages.collecting import labelers
from coin_ray.stages.collecting.cloud_actor import AnsweredImage, answer_table
from coin_ray.stages.collecting.labeler_actor import LabelerActor, describe_labeler
from coin_ray.stages.collecting.labelers import create_labeler
from tests.clip.open_clip_families import save_family
from tests.images import noise_image

CLASSES = ("cat", "dog")
BOXES = np.array([[5, 5, 40, 30], [10, 20, 70, 55]], np.float32)


def _config(kind: Any, **settings: Any) -> PipelineConfig:
    config = demo()
    return replace(
        config,
        classes=CLASSES,
        collect=replace(config.collect, labeler=kind),
        labeler=Labeler(**settings),
    )


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_family("ViT", tmp_path_factory.mktemp("vit"))


def _answers(config: PipelineConfig) -> pa.Table:
    """Return two images with boxes, and one without between them."""
    images = []
    for number, boxes in enumerate((BOXES, BOXES[:0], BOXES[:1])):
        file = io.BytesIO()
        noise_image(80, 60, number, patch=10).save(file, "PNG")
        scores = np.full((len(boxes), len(CLASSES)), 0.4, np.float32)
        detections = RawDetections(boxes, scores, "per_class")
        status = "ok" if len(boxes) else "empty"
        answer = Answer(status, detections, 1, 1.0, 0.1, calls=1)
        images.append(AnsweredImage(str(number), file.getvalue(), answer))
    return answer_table(images, AnswerConverter(config))


def test_boxes_of_a_batch_get_the_labels_of_their_own_image(
    vit: str, tmp_path: Path
) -> None:
    config = _config("crop", model=vit)
    LabelerActor(config, str(tmp_path / "parts"))(_answers(config))
    (part,) = (tmp_path / "parts").glob("*.parquet")
    rows = pq.read_table(part).to_pylist()
    labeler = create_labeler(config)
    assert labeler is not None
    for number, row in enumerate(rows):
        boxes = torch.tensor(row["boxes"]).reshape(-1, 4)
        image = pil_to_tensor(noise_image(80, 60, number, patch=10))
        [expected] = labeler.label([(image, boxes)])
        actual = torch.tensor(row["clip_probs"]).reshape(expected.shape)
        torch.testing.assert_close(actual, expected)
    assert [len(row["boxes"]) for row in rows] == [2, 0, 1]


def test_text_embeddings_are_computed_once(
    vit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, cache = _config("crop", model=vit), str(tmp_path / "texts")
    first: Any = create_labeler(config, cache)
    with monkeypatch.context() as patch:
        patch.setattr(labelers, "class_embeddings", None)
        second: Any = create_labeler(config, cache)
    assert torch.equal(first.embeddings, second.embeddings)
    other = replace(config, classes=("cat", "bird"))
    third: Any = create_labeler(other, cache)
    assert not torch.equal(first.embeddings, third.embeddings)
    prompted = replace(config, clip=replace(config.clip, templates=("{}",)))
    create_labeler(prompted, cache)
    assert len(list((tmp_path / "texts").iterdir())) == 3


def test_text_embeddings_do_not_depend_on_who_computes_them(
    vit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver has more threads than a labeler, and rounding depends on them."""
    threads: list[int] = []
    original = labelers.class_embeddings

    def count_threads(*arguments: Any) -> torch.Tensor:
        threads.append(torch.get_num_threads())
        return original(*arguments)

    monkeypatch.setattr(labelers, "class_embeddings", count_threads)
    monkeypatch.setattr(labelers, "count_torch_threads", lambda: 2)
    threads_before = torch.get_num_threads()
    config = _config("crop", model=vit)
    create_labeler(config, str(tmp_path))
    create_labeler(config)
    assert threads == [2, 2]
    assert torch.get_num_threads() == threads_before


def test_without_a_model_of_its_own_the_labeler_is_the_detector_s_clip() -> None:
    config = _config("crop")
    assert config.labeler_clip == config.clip
    labeler: Any = create_labeler(config)
    assert labeler._transform is None, "crops are cut as they always were"
    assert not isinstance(labeler._encode, FusedResNet)
    fused = replace(config, collect=replace(config.collect, fuse_batch_norms=True))
    fused_labeler: Any = create_labeler(fused)
    assert isinstance(fused_labeler._encode, FusedResNet)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("classifier", {}, "which classifier"),
        ("none", {"model": "ViT-B-32"}, "of no use with --labeler none"),
        ("crop", {"model": "ViT-B-32", "label_map": "m"}, "maps the names of a class"),
    ],
)
def test_settings_that_contradict_each_other(
    kind: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_runnable(_config(kind, **settings))


@pytest.mark.parametrize("name", ["pretrained", "label_map"])
def test_settings_of_a_model_need_the_model(name: str) -> None:
    with pytest.raises(ConfigError, match=r"give --labeler\.model too"):
        Labeler(**{name: "x"})


@pytest.mark.parametrize("prior", [0.0, 1.0, -1.0])
def test_a_prior_is_a_share(prior: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        Labeler(sigmoid_prior=prior)


def test_errors_name_the_labeler_s_settings(vit: str) -> None:
    with pytest.raises(InputError, match=r"labeler\.pretrained: 'openia' is neither"):
        create_labeler(_config("crop", model="ViT-B-32", pretrained="openia"))
    with pytest.raises(InputError, match=r"labeler\.model .* ModifiedResNet"):
        create_labeler(_config("roi", model=vit))


def test_descriptions() -> None:
    assert "no second opinion" in describe_labeler(_config("none"))
    crop = describe_labeler(_config("crop", model="hf-hub:timm/ViT-B-16-SigLIP2"))
    assert crop == "second opinions by CLIP ViT-B-16-SigLIP2, on crops"
    assert "classifier x.onnx" in describe_labeler(
        _config("classifier", model="x.onnx")
    )


def test_another_labeler_is_another_collection_and_the_detector_stays_the_same(
    tmp_path: Path,
) -> None:
    def fingerprints(config: PipelineConfig) -> dict[str, str]:
        return {name: step.fingerprint for name, step in build_steps(config).items()}

    label_map = tmp_path / "map.yaml"
    label_map.write_text("map: {}")
    settings: list[dict[str, Any]] = [
        {},
        {"model": "ViT-B-32"},
        {"model": "ViT-B-32", "pretrained": "openai"},
        {"model": "ViT-B-32", "sigmoid_prior": 0.5},
        {"model": "x.onnx", "label_map": str(label_map)},
    ]
    config = laptop()
    runs = [replace(config, labeler=Labeler(**chosen)) for chosen in settings]
    collections = [fingerprints(run)["collect"] for run in runs]
    label_map.write_text("map: {a: b}")
    collections.append(fingerprints(runs[-1])["collect"])
    assert len(set(collections)) == len(collections)
    assert len({fingerprints(run)["images"] for run in runs}) == 1
    assert all(run.clip == config.clip for run in runs)
