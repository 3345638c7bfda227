from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from coin_ray.errors import ConfigError, InputError
from coin_ray.predictors.transformers_detectors import (
    GroundingDino,
    Owlv2,
    TransformersDetector,
    load_transformers,
)
from coin_ray.serving.detectors import BatchDetector
from coin_ray.serving.server import create_app
from tests.images import encode, noise_image
from tests.predictors.text_prompted_networks import add_noise, grounding_dino
from tests.serving.helpers import detect_request, post

transformers = pytest.importorskip("transformers")

ALPHABET = "abcdefghijklmnopqrstuvwxyz."
LETTERS = (
    "!",
    *ALPHABET,
    *(f"{c}</w>" for c in ALPHABET),
    "<|startoftext|>",
    "<|endoftext|>",
)
CLASSES = ("stop sign", "Cat", "traffic light", "St. Bernard")
TOKENS_BY_CLASS = {
    "stop sign": ("stop", "sign"),
    "Cat": ("cat",),
    "traffic light": ("traffic", "light"),
    "St. Bernard": ("st", "bernard"),
}


def _clip_tokenizer() -> Any:
    return transformers.CLIPTokenizerFast(
        vocab={letter: number for number, letter in enumerate(LETTERS)},
        merges=[],
        model_max_length=24,
        pad_token="!",
    )


def _owlv2() -> Owlv2:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    ends = {"bos_token_id": len(LETTERS) - 2, "eos_token_id": len(LETTERS) - 1}
    text = {**sizes, **ends, "vocab_size": len(LETTERS), "max_position_embeddings": 24}
    vision = {**sizes, "image_size": 64, "patch_size": 16}
    config = transformers.Owlv2Config(
        text_config=text, vision_config=vision, projection_dim=16
    )
    model = transformers.Owlv2ForObjectDetection(config).eval()
    add_noise(model, 0.2)
    add_noise(model.owlv2.text_model, 1.0)
    return Owlv2(
        model,
        _clip_tokenizer(),
        transformers.Owlv2ImageProcessor(size={"height": 64, "width": 64}),
    )


Arrays = tuple[np.ndarray, np.ndarray]
"""Boxes and scores."""


def _noise(seed: int, size: tuple[int, int] = (80, 60)) -> Image.Image:
    return noise_image(*size, seed, patch=10)


@pytest.fixture(scope="module")
def dino() -> GroundingDino:
    model, processor = grounding_dino()
    return GroundingDino(model, processor.tokenizer, processor.image_processor)


@pytest.fixture(scope="module")
def owl() -> Owlv2:
    return _owlv2()


@pytest.fixture(params=["dino", "owl"])
def architecture(request: pytest.FixtureRequest) -> GroundingDino | Owlv2:
    fixture: GroundingDino | Owlv2 = request.getfixturevalue(request.param)
    return fixture


@pytest.fixture
def open_set_detector(architecture: GroundingDino | Owlv2) -> TransformersDetector:
    return TransformersDetector(architecture, "served")


def _dino_by_library(dino: GroundingDino, image: Image.Image) -> Arrays:
    """Return what transformers' own processor gives; a class's tokens are found by
    their text, one by one."""
    processor = transformers.GroundingDinoProcessor(
        dino.image_processor, dino.tokenizer
    )
    text = "stop sign. cat. traffic light. st bernard."
    inputs = processor(images=image, text=text, return_tensors="pt")
    with torch.no_grad():
        prediction = dino.model(**inputs)
    (processed,) = processor.post_process_grounded_object_detection(
        prediction,
        inputs["input_ids"],
        threshold=-1.0,
        target_sizes=[(image.height, image.width)],
    )
    words = dino.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    probabilities = prediction.logits[0].sigmoid().numpy()
    columns = []
    for name in CLASSES:
        positions = [words.index(token) for token in TOKENS_BY_CLASS[name]]
        columns.append(probabilities[:, positions].mean(1))
    return processed["boxes"].numpy(), np.stack(columns, 1)


def _owl_by_library(owl: Owlv2, image: Image.Image) -> Arrays:
    """Return what transformers' own processor gives for each class alone."""
    processor = transformers.Owlv2Processor(owl.image_processor, owl.tokenizer)
    columns, boxes = [], np.zeros(0)
    for name in CLASSES:
        text = [[f"a photo of a {name.lower()}"]]
        inputs = processor(images=image, text=text, return_tensors="pt")
        with torch.no_grad():
            prediction = owl.model(**inputs)
        (processed,) = processor.post_process_grounded_object_detection(
            prediction, threshold=-1.0, target_sizes=[(image.height, image.width)]
        )
        boxes = processed["boxes"].numpy()
        columns.append(processed["scores"].numpy())
    return boxes, np.stack(columns, 1)


def _predict(architecture: GroundingDino | Owlv2, image: Image.Image) -> Arrays:
    with torch.no_grad():
        boxes, scores = architecture.predict([image], architecture.prompt(CLASSES))
    return boxes[0].numpy(), scores[0].numpy()


def _smallest_class_difference(scores: np.ndarray) -> float:
    """Return the smallest over pairs of classes of the largest difference of scores."""
    pairs = combinations(scores.T, 2)
    return min(float(np.abs(first - second).max()) for first, second in pairs)


@pytest.mark.parametrize("size", [(80, 60), (50, 90)])
def test_grounding_dino_s_class_vectors_are_the_means_over_the_tokens_of_each_name(
    dino: GroundingDino, size: tuple[int, int]
) -> None:
    image = _noise(1, size)
    boxes, scores = _predict(dino, image)
    expected_boxes, expected_scores = _dino_by_library(dino, image)
    assert np.allclose(scores, expected_scores, atol=1e-5)
    assert np.allclose(boxes, expected_boxes, atol=1e-3)
    assert expected_scores.std(0).min() > 1e-3, (
        "all queries are alike: the comparison says nothing"
    )
    assert _smallest_class_difference(expected_scores) > 1e-2, "classes are alike"


@pytest.mark.parametrize("size", [(80, 60), (50, 90)])
def test_owlv2_s_class_vectors_are_the_scores_of_each_text_alone(
    owl: Owlv2, size: tuple[int, int]
) -> None:
    image = _noise(2, size)
    boxes, scores = _predict(owl, image)
    expected_boxes, expected_scores = _owl_by_library(owl, image)
    assert np.allclose(scores, expected_scores, atol=1e-6)
    assert np.allclose(boxes, expected_boxes, atol=1e-3)
    assert expected_scores.std(0).min() > 1e-3, (
        "all patches are alike: the comparison says nothing"
    )
    assert _smallest_class_difference(expected_scores) > 1e-4, "classes are alike"


def test_detections_are_candidates_inside_the_image_best_first_without_duplicates(
    architecture: GroundingDino | Owlv2, open_set_detector: TransformersDetector
) -> None:
    image = _noise(3, (90, 50))
    assert isinstance(open_set_detector, BatchDetector)
    boxes, scores = open_set_detector.detect(image, CLASSES, 0.0)
    _, candidates = _predict(architecture, image)
    assert 0 < len(boxes) <= len(candidates)
    assert (boxes >= 0).all()
    assert (boxes[:, [0, 2]] <= 90).all()
    assert (boxes[:, [1, 3]] <= 50).all()
    best = scores.max(1)
    assert (np.diff(best) <= 0).all()
    assert all(np.isclose(candidates, row, atol=1e-5).all(1).any() for row in scores)
    median = float(np.median(best))
    _, above_median = open_set_detector.detect(image, CLASSES, median)
    assert np.array_equal(above_median, scores[best >= median])


def test_no_candidate_above_the_lowest_score_gives_empty_arrays(
    open_set_detector: TransformersDetector,
) -> None:
    boxes, scores = open_set_detector.detect(_noise(4), CLASSES, 1.01)
    assert (boxes.shape, scores.shape) == ((0, 4), (0, len(CLASSES)))


def test_a_batch_of_different_sizes_gives_what_each_image_gives_alone(
    open_set_detector: TransformersDetector,
) -> None:
    images = [_noise(5), _noise(6, (50, 90)), _noise(7), _noise(8, (64, 64))]
    batch = open_set_detector.detect_batch(images, CLASSES, 0.0)
    for image, (boxes, scores) in zip(images, batch, strict=True):
        boxes_alone, scores_alone = open_set_detector.detect(image, CLASSES, 0.0)
        assert np.allclose(boxes, boxes_alone, atol=1e-2)
        assert np.allclose(scores, scores_alone, atol=1e-4)


def test_a_class_s_tokens_don_t_depend_on_its_neighbours(dino: GroundingDino) -> None:
    prompt = dino.prompt(("t-shirt", "cat", "cat"))
    words = dino.tokenizer.convert_ids_to_tokens(prompt.tokens["input_ids"][0])
    tokens = [[words[i] for i in row.nonzero()[:, 0]] for row in prompt.shares]
    assert tokens == [["t", "-", "shirt"], ["cat"], ["cat"]]
    assert torch.allclose(prompt.shares.sum(1), torch.ones(3))


REFUSED: list[tuple[str, Sequence[str], str]] = [
    ("dino", ("cat", "..."), "letter or a digit"),
    ("dino", ("cat", ""), "letter or a digit"),
    ("dino", ("cat", "traffic light " * 20), "43 tokens, the model reads 32"),
    ("owl", ("cat", " "), "letter or a digit"),
    ("owl", ("cat", "a" * 40), "the model reads 24"),
]


@pytest.mark.parametrize(("name", "classes", "reason"), REFUSED)
def test_names_that_the_model_can_t_read_are_refused(
    name: str, classes: Sequence[str], reason: str, request: pytest.FixtureRequest
) -> None:
    open_set_detector = TransformersDetector(request.getfixturevalue(name), name)
    with pytest.raises(InputError, match=reason):
        open_set_detector.check(classes)


def test_served_in_the_reference_format(owl: Owlv2) -> None:
    file_bytes = encode(_noise(9), "PNG")
    app = create_app(TransformersDetector(owl, "owlv2"))
    answered, refused = post(
        app,
        {**detect_request(file_bytes, CLASSES), "threshold": 0.0},
        detect_request(file_bytes, ("cat", " ")),
    )
    detections = answered.json()["detections"]
    assert detections
    for detection in detections:
        assert set(detection["scores"]) == set(CLASSES)
        assert detection["score"] == max(detection["scores"].values())
    assert refused.status_code == 400
    assert "letter or a digit" in refused.json()["detail"]


def test_a_saved_folder_gives_the_same_answers(
    architecture: GroundingDino | Owlv2,
    open_set_detector: TransformersDetector,
    tmp_path: Path,
) -> None:
    processor_class = transformers.Owlv2Processor
    if isinstance(architecture, GroundingDino):
        processor_class = transformers.GroundingDinoProcessor
    processor = processor_class(architecture.image_processor, architecture.tokenizer)
    architecture.model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = load_transformers(str(tmp_path))
    image = _noise(10)
    boxes, scores = loaded.detect(image, CLASSES, 0.0)
    expected_boxes, expected_scores = open_set_detector.detect(image, CLASSES, 0.0)
    assert np.allclose(boxes, expected_boxes, atol=1e-3)
    assert np.allclose(scores, expected_scores, atol=1e-3)


def test_for_a_model_that_is_unavailable_the_message_says_to_give_a_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = r"neither a local folder nor in the cache.*--cloud\.model FOLDER"
    with pytest.raises(InputError, match=message):
        load_transformers("nobody/has-this-detector")


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model folder of transformers"):
        load_transformers(str(tmp_path))


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ConfigError, match=r"is a bert model.*owlv2"):
        load_transformers(str(tmp_path))
