"""Second opinions by image classifiers of transformers, timm and ONNX files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from torch import Tensor

from coin_ray.errors import ConfigError, InputError
from coin_ray.predictors.classifier_labeler import ClassifierLabeler, map_classes
from coin_ray.predictors.image_classifiers import (
    ImageClassifier,
    load_image_classifier,
)

transformers = pytest.importorskip("transformers")

NAMES = ("tabby, tabby cat", "golden retriever", "pug, pug-dog", "sports car")
MAP = """
service: classifier
map:
  golden retriever: dog
  pug-dog: {class: dog, weight: 0.5}
  tabby: cat
"""
BOXES = torch.tensor([[10.0, 10, 60, 50], [50, 30, 110, 80], [0, 0, 120, 90]])


def _picture() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(0, 256, (3, 9, 12), generator=generator, dtype=torch.uint8)
    return small.repeat_interleave(10, 1).repeat_interleave(10, 2)


def _squares() -> list[Image.Image]:
    image = Image.fromarray(np.ascontiguousarray(_picture().permute(1, 2, 0).numpy()))
    crops = [image.crop(tuple(box)) for box in BOXES.int().tolist()]
    return [
        crop.resize((max(crop.size),) * 2, Image.Resampling.BICUBIC) for crop in crops
    ]


def _spread(network: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)


def _save_transformers(folder: Path, problem: str | None = None) -> str:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=32,
        patch_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        id2label=dict(enumerate(NAMES)),
        label2id={name: number for number, name in enumerate(NAMES)},
        problem_type=problem,
    )
    network = transformers.ViTForImageClassification(config).eval()
    _spread(network)
    network.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    transformers.ViTImageProcessor(size=size).save_pretrained(folder)
    return str(folder)


def _save_timm(folder: Path, names: tuple[str, ...] | None = NAMES) -> str:
    import timm

    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=len(NAMES)).eval()
    _spread(network)
    torch.save(network.state_dict(), folder / "pytorch_model.bin")
    config: dict[str, Any] = {
        "architecture": "test_resnet",
        "num_classes": len(NAMES),
        "pretrained_cfg": {
            "input_size": [3, 64, 64],
            "crop_pct": 0.9,
            "mean": [0.4, 0.5, 0.6],
            "std": [0.2, 0.3, 0.2],
            "interpolation": "bicubic",
        },
    }
    if names is not None:
        config["label_names"] = list(names)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def _save_onnx(folder: Path, batch: int | str = "n", **described: Any) -> str:
    """Write a mean over the pixels, then one matrix."""
    generator = np.random.default_rng(0)
    weights = generator.normal(size=(3, len(NAMES))).astype(np.float32)
    nodes = [
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "w"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 20, 30])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, len(NAMES)])],
        [
            helper.make_tensor("w", TensorProto.FLOAT, weights.shape, weights.tobytes(), True),
            helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3]),
        ],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 9
    path = folder / "classifier.onnx"
    onnx.save(model, path)
    description = {"classes": list(NAMES), "input_size": [30, 20]} | described
    (folder / "classifier.onnx.json").write_text(json.dumps(description))
    return str(path)


def _map_file(folder: Path, text: str = MAP) -> str:
    path = folder / "map.yaml"
    path.write_text(text)
    return str(path)


def _label(classifier: ImageClassifier, folder: Path) -> Tensor:
    weights = map_classes(classifier, ("cat", "dog"), _map_file(folder))
    [probabilities] = ClassifierLabeler(classifier, weights, 1.0).label(
        [(_picture(), BOXES)]
    )
    return probabilities


def _expected(by_name: Tensor) -> Tensor:
    """Return what the map makes of probabilities [N, 4] that sum to one."""
    cat, dog = by_name[:, 0], by_name[:, 1] + 0.5 * by_name[:, 2]
    return torch.stack([cat, dog, 1 - cat - dog], 1)


def test_a_classifier_of_transformers(tmp_path: Path) -> None:
    folder = _save_transformers(tmp_path)
    pipeline = transformers.pipeline("image-classification", model=folder)
    by_name = torch.tensor(
        [
            [{row["label"]: row["score"] for row in answer}[name] for name in NAMES]
            for answer in pipeline(_squares(), top_k=4)
        ]
    )
    probabilities = _label(load_image_classifier(folder, None), tmp_path)
    torch.testing.assert_close(probabilities, _expected(by_name), rtol=0, atol=1e-5)
    assert float(by_name.std(0).min()) > 1e-3, "all crops are alike"


def test_labels_that_do_not_exclude_each_other(tmp_path: Path) -> None:
    folder = _save_transformers(tmp_path, "multi_label_classification")
    classifier = load_image_classifier(folder, None)
    inputs = torch.stack([classifier.prepare(square) for square in _squares()])
    by_name = classifier.probabilities(inputs).double()
    assert not torch.allclose(by_name.sum(1), torch.ones(3).double())
    cat = by_name[:, 0]
    dog = 1 - (1 - by_name[:, 1]) * (1 - 0.5 * by_name[:, 2])
    odds = torch.stack([cat / (1 - cat), dog / (1 - dog), torch.ones(3)], 1)
    expected = odds / odds.sum(1, keepdim=True)
    torch.testing.assert_close(
        _label(classifier, tmp_path).double(), expected, rtol=0, atol=1e-5
    )


def test_a_classifier_of_timm(tmp_path: Path) -> None:
    import timm
    from timm.data import create_transform, resolve_data_config

    folder = _save_timm(tmp_path)
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = create_transform(**resolve_data_config({}, model=network))
    with torch.no_grad():
        outputs = network(torch.stack([transform(square) for square in _squares()]))
    probabilities = _label(load_image_classifier(folder, None), tmp_path)
    expected = _expected(outputs.softmax(1))
    torch.testing.assert_close(probabilities, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", ["n", 1])
def test_an_onnx_classifier(batch: int | str, tmp_path: Path) -> None:
    import onnxruntime

    path = _save_onnx(tmp_path, batch, mean=[100, 110, 120], std=[50, 60, 70])
    session = onnxruntime.InferenceSession(path)
    rows = []
    for square in _squares():
        resized = np.array(square.resize((30, 20), Image.Resampling.BILINEAR))
        pixels = (resized - np.array([100, 110, 120])) / np.array([50, 60, 70])
        inputs = pixels.transpose(2, 0, 1)[None].astype(np.float32)
        rows.append(torch.from_numpy(session.run(None, {"x": inputs})[0][0]))
    expected = _expected(torch.stack(rows).softmax(1))
    probabilities = _label(load_image_classifier(path, None), tmp_path)
    torch.testing.assert_close(probabilities, expected, rtol=0, atol=1e-5)


def test_imagenet_s_names_come_with_timm() -> None:
    import timm

    from coin_ray.predictors.image_classifiers import _timm_class_names

    names = _timm_class_names("test_resnet", timm.create_model("test_resnet"))
    assert len(names) == 1000
    assert names[207] == ("golden retriever",)
    assert names[281] == ("tabby, tabby cat", "tabby", "tabby cat")


def test_a_class_that_no_name_is_mapped_to(tmp_path: Path) -> None:
    classifier = load_image_classifier(_save_onnx(tmp_path), None)
    with pytest.raises(
        ConfigError,
        match=r"no class for dog \(nearest: pug dog\).*--labeler\.label-map",
    ):
        map_classes(classifier, ("tabby cat", "dog"), None)
    with pytest.raises(ConfigError, match=r"no class for bird \(nearest: none\)"):
        map_classes(classifier, ("cat", "dog", "bird"), _map_file(tmp_path))


def test_a_name_of_the_map_that_the_classifier_has_not(tmp_path: Path) -> None:
    classifier = load_image_classifier(_save_onnx(tmp_path), None)
    text = MAP + "  golden retreiver: dog\n"
    with pytest.raises(
        ConfigError, match=r"'golden retreiver' \(nearest: golden retriever\)"
    ):
        map_classes(classifier, ("cat", "dog"), _map_file(tmp_path, text))


UNUSABLE: list[tuple[str, type[Exception], str]] = [
    ("nobody/has-this", InputError, "could not be loaded as an image classifier"),
    ("absent.onnx", InputError, "no such file absent.onnx"),
]


@pytest.mark.parametrize(("model", "error", "message"), UNUSABLE)
def test_unusable_classifiers(
    model: str,
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(error, match=message):
        load_image_classifier(model, None)


def test_classes_without_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="4 classes without names"):
        load_image_classifier(_save_timm(tmp_path, None), None)


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"classes": ["cat"]}, r"expected an output of shape \[1, 1\]"),
        ({"activation": "none"}, "are no probabilities"),
        ({"classes": []}, "needs classes"),
        ({"size": 3}, "size: Unexpected keyword argument"),
        ({"input_size": [31, 20]}, "can't classify an image"),
    ],
)
def test_a_wrong_description(
    described: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = _save_onnx(tmp_path, **described)
    with pytest.raises(ConfigError, match=message):
        load_image_classifier(path, None)


def test_a_missing_description(tmp_path: Path) -> None:
    path = _save_onnx(tmp_path)
    Path(f"{path}.json").unlink()
    with pytest.raises(ConfigError, match=r"classifier\.onnx\.json"):
        load_image_classifier(path, None)
