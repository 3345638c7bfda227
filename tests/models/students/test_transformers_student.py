"""Loading of transformers students: weights, class rows by name, pixels, predictions,
and what can't be loaded.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from coin_ray.config.students import TransformersName
from coin_ray.errors import ConfigError, InputError
from coin_ray.models.students import transformers_weights
from coin_ray.models.students.detection import make_pixels, resize_image
from coin_ray.models.students.transformers_student import TransformersStudent
from coin_ray.models.students.transformers_weights import (
    CLASS_HEAD,
    DENOISING_CLASSES,
    check_transformers_student,
    describe_transformers_student,
    empty_transformers_student,
    is_transformers_student,
    load_transformers_student,
    student_from_transformers_config,
)
from tests.models.students.tiny_networks import (
    MODEL_TYPES,
    SIDE,
    save_tiny_network,
    tiny_network,
    tiny_processor,
)

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

PRETRAINED_CLASSES = ("person", "bicycle", "traffic light", "car")
CLASSES = ("cars", "pedestrian", "Traffic-Light")
ROWS = {0: 3, 2: 2}
"""Pretrained rows of ``CLASSES``; the pedestrian is drawn."""


@pytest.fixture(scope="module")
def pretrained_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pretrained_folders = {}
    for model_type in MODEL_TYPES:
        pretrained_folders[model_type] = tmp_path_factory.mktemp(model_type)
        save_tiny_network(
            pretrained_folders[model_type], model_type, PRETRAINED_CLASSES
        )
    return pretrained_folders


def _make_images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [
        torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
        for size in ((70, 120), (200, 333), (SIDE, SIDE))
    ]


def class_tensors(network: Any) -> dict[str, Tensor]:
    return {
        name: tensor
        for name, tensor in network.state_dict().items()
        if CLASS_HEAD.search(name)
    }


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_class_heads_are_all_tensors_that_depend_on_the_classes(
    model_type: str,
) -> None:
    weights = tiny_network(model_type, 3).state_dict()
    others = tiny_network(model_type, 5).state_dict()
    dependent = {name for name in weights if weights[name].shape != others[name].shape}
    heads = {name for name in weights if CLASS_HEAD.search(name)}
    assert dependent - {DENOISING_CLASSES} == heads
    assert heads


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_class_rows_are_taken_over_by_name(
    model_type: str, pretrained_folders: dict[str, Path]
) -> None:
    folder = str(pretrained_folders[model_type])
    student = load_transformers_student(folder, CLASSES, seed=0)
    same_seed = load_transformers_student(folder, CLASSES, seed=0)
    other_seed = load_transformers_student(folder, CLASSES, seed=1)
    pretrained = tiny_network(model_type, len(PRETRAINED_CLASSES))
    weights, expected = student.network.state_dict(), pretrained.state_dict()
    heads = class_tensors(student.network)
    for name, head in heads.items():
        for row, pretrained_row in ROWS.items():
            assert torch.equal(head[row], expected[name][pretrained_row]), name
    if DENOISING_CLASSES in weights:
        embedding, old = weights[DENOISING_CLASSES], expected[DENOISING_CLASSES]
        assert torch.equal(embedding[[0, 2, 3]], old[[3, 2, 4]])
    same_weights = same_seed.network.state_dict()
    for name, tensor in weights.items():
        assert torch.equal(tensor, same_weights[name])
        if name not in heads and name != DENOISING_CLASSES:
            assert torch.equal(tensor, expected[name]), name
    name = next(name for name in heads if name.endswith("weight"))
    assert not torch.equal(heads[name][1], class_tensors(other_seed.network)[name][1])


def test_as_many_other_classes_are_no_reason_to_keep_a_row(
    pretrained_folders: dict[str, Path],
) -> None:
    classes = ("boat", "bus", "train", "car")
    student = load_transformers_student(
        str(pretrained_folders["d_fine"]), classes, seed=0
    )
    name = "model.enc_score_head.weight"
    expected = tiny_network("d_fine", 4).state_dict()[name]
    head = student.network.state_dict()[name]
    assert torch.equal(head[3], expected[3])
    assert not (head[:3] == expected[:3]).all(1).any()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_it_predicts_what_the_library_s_post_processing_returns(
    model_type: str, pretrained_folders: dict[str, Path]
) -> None:
    folder = str(pretrained_folders[model_type])
    student = load_transformers_student(folder, PRETRAINED_CLASSES, seed=0).eval()
    network = transformers.AutoModelForObjectDetection.from_pretrained(folder).eval()
    processor = tiny_processor(model_type)
    resized = [resize_image(image, student.input_format) for image in _make_images()]
    pixels = make_pixels(resized, (SIDE, SIDE), student.input_format)
    with torch.no_grad():
        predicted = network(pixel_values=pixels)
    sizes = [tuple(image.shape[1:]) for image in _make_images()]
    expected = processor.post_process_object_detection(
        predicted, threshold=student.post_process.score_min, target_sizes=sizes
    )
    for detections, image_expected, size in zip(
        student.predict(_make_images()), expected, sizes, strict=True
    ):
        count = len(detections)
        limit = student.post_process.detections
        assert count == min(len(image_expected["scores"]), limit)
        limits = torch.tensor([size[1], size[0]] * 2)
        boxes = torch.minimum(image_expected["boxes"].clamp(min=0), limits)
        torch.testing.assert_close(detections.boxes, boxes[:count])
        scores, labels = image_expected["scores"], image_expected["labels"]
        torch.testing.assert_close(detections.scores, scores[:count])
        assert torch.equal(detections.labels, labels[:count])
        sums = detections.probs.sum(1)
        torch.testing.assert_close(sums, torch.ones_like(sums))


@pytest.mark.parametrize("model_type", [t for t in MODEL_TYPES if t != "rf_detr"])
def test_pixels_are_those_of_the_image_processor(
    model_type: str, pretrained_folders: dict[str, Path]
) -> None:
    student = load_transformers_student(
        str(pretrained_folders[model_type]), CLASSES, seed=0
    )
    resized = [resize_image(image, student.input_format) for image in _make_images()]
    pixels = make_pixels(resized, (SIDE, SIDE), student.input_format)
    expected = tiny_processor(model_type)(images=_make_images(), return_tensors="pt")
    torch.testing.assert_close(pixels, expected["pixel_values"], rtol=0, atol=1e-6)


def test_rf_detr_s_pixels_are_those_of_its_processor_without_resizing(
    pretrained_folders: dict[str, Path],
) -> None:
    """It resizes without antialiasing, which no student does."""
    student = load_transformers_student(
        str(pretrained_folders["rf_detr"]), CLASSES, seed=0
    )
    image = _make_images()[2]
    pixels = make_pixels([image], (SIDE, SIDE), student.input_format)
    expected = tiny_processor("rf_detr")(images=[image], return_tensors="pt")
    torch.testing.assert_close(pixels, expected["pixel_values"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_trunk_is_the_backbone_and_its_pyramid(
    model_type: str, pretrained_folders: dict[str, Path]
) -> None:
    student = load_transformers_student(
        str(pretrained_folders[model_type]), CLASSES, seed=0
    )
    parts = student.parameter_parts()
    trunk, head = set(map(id, parts.trunk)), set(map(id, parts.head))
    everything = dict(student.network.named_parameters())
    assert trunk | head == set(map(id, everything.values()))
    assert not trunk & head
    for name, parameter in everything.items():
        if "backbone" in name or "conv_encoder" in name:
            assert id(parameter) in trunk
        if CLASS_HEAD.search(name) or "decoder.layers" in name:
            assert id(parameter) in head


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_check_accepts_what_can_be_trained(
    model_type: str, pretrained_folders: dict[str, Path]
) -> None:
    check_transformers_student(str(pretrained_folders[model_type]), CLASSES)


def test_names_of_students() -> None:
    assert is_transformers_student("d-fine-n")
    assert is_transformers_student("hf:owner/name")
    assert not is_transformers_student("yolox-nano")
    assert not is_transformers_student("faster-rcnn")


def test_folders_are_students_by_their_config(
    pretrained_folders: dict[str, Path],
) -> None:
    assert is_transformers_student(str(pretrained_folders["d_fine"]))
    assert not is_transformers_student(str(pretrained_folders["d_fine"].parent))


# Weights that can't be used


@pytest.fixture
def folder(pretrained_folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of D-FINE's folder to damage."""
    return Path(shutil.copytree(pretrained_folders["d_fine"], tmp_path / "student"))


def edit_config(folder: Path, **settings: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def refuse(name: str | Path, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_transformers_student(str(name), CLASSES)


@pytest.mark.parametrize("share", [0.5, 0.001, 0])
def test_a_truncated_file_is_named(folder: Path, share: float) -> None:
    path = folder / "model.safetensors"
    file_bytes = path.read_bytes()
    path.write_bytes(file_bytes[: int(len(file_bytes) * share)])
    refuse(folder, f"{folder} can't be loaded: .*model.safetensors.*complete")


def test_a_truncated_pickle_is_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(weights, path)
    path.write_bytes(path.read_bytes()[:100_000])
    refuse(folder, "can't be loaded")


def test_weights_of_another_class_count_are_named(folder: Path) -> None:
    names = {str(number): f"class {number}" for number in range(7)}
    edit_config(folder, id2label=names, label2id={v: int(k) for k, v in names.items()})
    refuse(folder, "the weights are of 4 classes, but id2label in config.json names 7")


def test_weights_of_another_network_are_named(
    folder: Path, pretrained_folders: dict[str, Path]
) -> None:
    shutil.copy(pretrained_folders["rt_detr_v2"] / "model.safetensors", folder)
    refuse(folder, "the weights belong to another network: expected .* of shape")


def test_missing_weights_are_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    removed = "model.enc_output.0.weight"
    del weights[removed]
    save_file(weights, path, metadata={"format": "pt"})
    refuse(folder, f"another network: {removed} is missing")


def test_another_kind_of_model_is_named(folder: Path) -> None:
    edit_config(folder, model_type="detr")
    refuse(folder, "is a detr model; a student is one of rt_detr, rt_detr_v2, d_fine")


def test_a_name_with_weights_of_another_kind_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = {"d-fine-n": ("lw_detr", str(folder))}
    monkeypatch.setattr(transformers_weights, "PRETRAINED", moved)
    refuse("d-fine-n", "d-fine-n: expected a lw_detr model, got a d_fine model")


@pytest.mark.parametrize(
    "missing", ["config.json", "model.safetensors", "preprocessor_config.json"]
)
def test_a_missing_file_is_named(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    refuse(folder, r"can't be loaded: .*Expected config\.json, model\.safetensors")


def test_a_damaged_config_is_named(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "d_fine"')
    refuse(folder, "can't be loaded: .*not a valid JSON")


@pytest.mark.parametrize(
    "size",
    [
        {"shortest_edge": 800, "longest_edge": 1333},
        {"height": 96, "width": 128},
    ],
)
def test_a_processor_that_does_not_stretch_to_a_square_is_named(
    pretrained_folders: dict[str, Path], tmp_path: Path, size: dict[str, int]
) -> None:
    save_tiny_network(tmp_path, "lw_detr", PRETRAINED_CLASSES, size=size)
    refuse(tmp_path, "must stretch images to a square.*preprocessor_config.json")


def test_another_interpolation_is_named(tmp_path: Path) -> None:
    save_tiny_network(tmp_path, "d_fine", PRETRAINED_CLASSES, resample=3)
    refuse(tmp_path, "bilinear interpolation .*resample 3")


def test_an_input_size_that_the_network_does_not_take_is_named(tmp_path: Path) -> None:
    size = {"height": 90, "width": 90}
    save_tiny_network(tmp_path, "rf_detr", PRETRAINED_CLASSES, size=size)
    refuse(tmp_path, "fails on images of its own input size 90 x 90")


def test_a_hub_that_can_t_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub_name = "ustc-community/dfine-nano-coco"
    refuse("d-fine-n", rf"d-fine-n \({hub_name} on the hub\) is not in the cache")
    refuse("hf:nobody/nothing", "give the folder of a copy as the student")


@pytest.mark.parametrize("name", ["hf:", "hf:name", "hf:a/b/c", "hf:a b/c"])
def test_names_on_the_hub_have_an_owner(name: str) -> None:
    refuse(name, "expected hf:OWNER/NAME")


def test_unknown_names_are_answered_with_those_there_are() -> None:
    refuse("d-fine-xl", "no student and no folder; give one of d-fine-n, d-fine-s")


def test_a_version_without_the_model_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"future-n": ("future", "owner/future")}
    monkeypatch.setattr(transformers_weights, "PRETRAINED", known)
    with pytest.raises(ConfigError, match="has no future, which future-n is: pip"):
        check_transformers_student("future-n", CLASSES)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_description_rebuilds_the_network(
    model_type: str, pretrained_folders: dict[str, Path]
) -> None:
    student = load_transformers_student(
        str(pretrained_folders[model_type]), CLASSES, seed=3
    )
    text = json.dumps(describe_transformers_student(student))
    rebuilt = student_from_transformers_config(json.loads(text))
    rebuilt.load_state_dict(student.state_dict())
    assert rebuilt.input_format == student.input_format
    expected = student.eval().predict(_make_images())
    for detections, other in zip(
        rebuilt.eval().predict(_make_images()), expected, strict=True
    ):
        assert torch.equal(detections.boxes, other.boxes)
        assert torch.equal(detections.probs, other.probs)


def test_an_empty_student_takes_trained_weights_without_the_pretrained_ones(
    pretrained_folders: dict[str, Path], tmp_path: Path
) -> None:
    student = load_transformers_student(
        str(pretrained_folders["d_fine"]), CLASSES, seed=0
    )
    folder = shutil.copytree(pretrained_folders["d_fine"], tmp_path / "student")
    (folder / "model.safetensors").unlink()
    empty = empty_transformers_student(str(folder), CLASSES)
    assert not torch.equal(
        class_tensors(empty.network)["class_embed.0.weight"],
        class_tensors(student.network)["class_embed.0.weight"],
    )
    weights = student.state_dict()
    empty.load_state_dict(weights)
    for name, tensor in empty.state_dict().items():
        assert torch.equal(tensor, weights[name])


def test_every_name_in_the_settings_has_a_network() -> None:
    assert set(transformers_weights.PRETRAINED) == set(get_args(TransformersName))


def test_loading_draws_nothing_from_the_global_generator(
    pretrained_folders: dict[str, Path],
) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    student = load_transformers_student(
        str(pretrained_folders["d_fine"]), CLASSES, seed=0
    )
    assert isinstance(student, TransformersStudent)
    assert torch.equal(torch.rand(1), expected)
