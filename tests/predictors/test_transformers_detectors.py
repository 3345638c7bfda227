from __future__ import annotations

import io
import json
from collections.abc import Sequence
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
from coin_ray.serving.batching import BatchDetector
from coin_ray.serving.local_cloud import create_app
from tests.serving.test_local_cloud import call, post

transformers = pytest.importorskip("transformers")

WORDS = (
    "cat",
    "traffic",
    "light",
    "stop",
    "sign",
    "t",
    "##shirt",
    "-",
    "shirt",
    "st",
    "bernard",
    "a",
    "photo",
    "of",
)
ALPHABET = "abcdefghijklmnopqrstuvwxyz."
LETTERS = (
    "!",
    *ALPHABET,
    *(f"{c}</w>" for c in ALPHABET),
    "<|startoftext|>",
    "<|endoftext|>",
)
CLASSES = ("stop sign", "Cat", "traffic light", "St. Bernard")
SPANS = {
    "stop sign": ("stop", "sign"),
    "Cat": ("cat",),
    "traffic light": ("traffic", "light"),
    "St. Bernard": ("st", "bernard"),
}


def bert_tokenizer() -> Any:
    """BERT's own places for the special tokens, which Grounding DINO's code knows by
    number."""
    words = {
        0: "[PAD]",
        100: "[UNK]",
        101: "[CLS]",
        102: "[SEP]",
        103: "[MASK]",
        1012: ".",
        1029: "?",
    }
    words |= dict(enumerate(WORDS, 200))
    vocabulary = {words.get(i, f"[unused{i}]"): i for i in range(1030)}
    return transformers.BertTokenizerFast(vocab=vocabulary)


def grounding_dino() -> GroundingDino:
    torch.manual_seed(0)
    swin = transformers.SwinConfig(
        image_size=64,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_indices=[2, 3, 4],
    )
    bert = transformers.BertConfig(
        vocab_size=1030,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
    )
    sizes = {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
    }
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.GroundingDinoConfig(
        backbone_config=swin,
        text_config=bert,
        num_queries=12,
        num_feature_levels=3,
        max_text_len=32,
        disable_custom_kernels=True,
        **sizes,
        **heads,
    )
    model = transformers.GroundingDinoForObjectDetection(config).eval()
    wilder(model)
    images = transformers.GroundingDinoImageProcessor(
        size={"shortest_edge": 64, "longest_edge": 96}
    )
    return GroundingDino(model, bert_tokenizer(), images)


def clip_tokenizer() -> Any:
    return transformers.CLIPTokenizerFast(
        vocab={w: i for i, w in enumerate(LETTERS)},
        merges=[],
        model_max_length=24,
        pad_token="!",
    )


def owlv2() -> Owlv2:
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
    wilder(model)
    wilder(model.owlv2.text_model, 1.0)
    return Owlv2(
        model,
        clip_tokenizer(),
        transformers.Owlv2ImageProcessor(size={"height": 64, "width": 64}),
    )


@torch.no_grad()
def wilder(model: torch.nn.Module, spread: float = 0.2) -> None:
    """Random weights spread enough that queries and classes differ."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * spread)


def noise(seed: int, size: tuple[int, int] = (80, 60)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(
        0, 255, (size[1] // 10, size[0] // 10, 3), np.uint8
    )
    return Image.fromarray(pixels).resize(size)


@pytest.fixture(scope="module")
def dino() -> GroundingDino:
    return grounding_dino()


@pytest.fixture(scope="module")
def owl() -> Owlv2:
    return owlv2()


def naive_dino(
    dino: GroundingDino, image: Image.Image
) -> tuple[np.ndarray, np.ndarray]:
    """transformers' own processor and boxes; a class's tokens are found by their text,
    one by one."""
    processor = transformers.GroundingDinoProcessor(
        dino.image_processor, dino.tokenizer
    )
    inputs = processor(
        images=image,
        text="stop sign. cat. traffic light. st bernard.",
        return_tensors="pt",
    )
    with torch.no_grad():
        output = dino.model(**inputs)
    found = processor.post_process_grounded_object_detection(
        output,
        inputs["input_ids"],
        threshold=-1.0,
        target_sizes=[(image.height, image.width)],
    )
    words = dino.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    probabilities = output.logits[0].sigmoid()
    scores = np.zeros((len(probabilities), len(CLASSES)))
    for query in range(len(probabilities)):
        for column, name in enumerate(CLASSES):
            places = [words.index(token) for token in SPANS[name]]
            scores[query, column] = np.mean(
                [float(probabilities[query, place]) for place in places]
            )
    return found[0]["boxes"].numpy(), scores


def naive_owl(owl: Owlv2, image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    processor = transformers.Owlv2Processor(owl.image_processor, owl.tokenizer)
    scores, boxes = [], np.zeros(0)
    for name in CLASSES:
        inputs = processor(
            images=image, text=[[f"a photo of a {name.lower()}"]], return_tensors="pt"
        )
        with torch.no_grad():
            output = owl.model(**inputs)
        found = processor.post_process_grounded_object_detection(
            output, threshold=-1.0, target_sizes=[(image.height, image.width)]
        )
        boxes = found[0]["boxes"].numpy()
        scores.append(found[0]["scores"].numpy())
    return boxes, np.stack(scores, 1)


def sorted_by_score(
    boxes: np.ndarray, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(-scores.max(1), kind="stable")
    return boxes[order], scores[order]


@pytest.mark.parametrize("size", [(80, 60), (50, 90)])
def test_grounding_dino_s_class_vectors_are_the_means_over_the_tokens_of_each_name(
    dino: GroundingDino, size: tuple[int, int]
) -> None:
    image = noise(1, size)
    with torch.no_grad():
        boxes, scores = dino.predict([image], dino.prompt(CLASSES))
    expected_boxes, expected = naive_dino(dino, image)
    assert np.allclose(scores[0], expected, atol=1e-5)
    assert np.allclose(boxes[0], expected_boxes, atol=1e-3)
    assert expected.std(0).min() > 1e-3, (
        "all queries are alike: the comparison says nothing"
    )
    assert all(
        np.abs(expected[:, i] - expected[:, j]).max() > 1e-2
        for i in range(4)
        for j in range(i)
    ), "classes are alike"


@pytest.mark.parametrize("size", [(80, 60), (50, 90)])
def test_owlv2_s_class_vectors_are_the_scores_of_each_text_alone(
    owl: Owlv2, size: tuple[int, int]
) -> None:
    image = noise(2, size)
    with torch.no_grad():
        boxes, scores = owl.predict([image], owl.prompt(CLASSES))
    expected_boxes, expected = naive_owl(owl, image)
    assert np.allclose(scores[0], expected, atol=1e-6)
    assert np.allclose(boxes[0], expected_boxes, atol=1e-3)
    assert expected.std(0).min() > 1e-3, (
        "all patches are alike: the comparison says nothing"
    )
    assert all(
        np.abs(expected[:, i] - expected[:, j]).max() > 1e-4
        for i in range(4)
        for j in range(i)
    ), "classes are alike"


@pytest.mark.parametrize("kind", ["dino", "owl"])
def test_detections_are_candidates_inside_the_image_best_first_without_duplicates(
    kind: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(kind)
    image = noise(3, (90, 50))
    detector = TransformersDetector(model, kind)
    assert isinstance(detector, BatchDetector)
    boxes, scores = detector.detect(image, CLASSES, 0.0)
    with torch.no_grad():
        candidates = model.predict([image], model.prompt(CLASSES))[1][0].numpy()
    assert 0 < len(boxes) <= len(candidates)
    assert (boxes >= 0).all()
    assert (boxes[:, [0, 2]] <= 90).all()
    assert (boxes[:, [1, 3]] <= 50).all()
    assert (np.diff(scores.max(1)) <= 0).all()
    assert all(np.isclose(candidates, row, atol=1e-5).all(1).any() for row in scores)
    middle = float(np.median(scores.max(1)))
    assert np.array_equal(
        detector.detect(image, CLASSES, middle)[1], scores[scores.max(1) >= middle]
    )


@pytest.mark.parametrize("kind", ["dino", "owl"])
def test_no_candidate_above_the_lowest_score_gives_empty_arrays(
    kind: str, request: pytest.FixtureRequest
) -> None:
    detector = TransformersDetector(request.getfixturevalue(kind), kind)
    boxes, scores = detector.detect(noise(4), CLASSES, 1.01)
    assert (boxes.shape, scores.shape) == ((0, 4), (0, len(CLASSES)))


@pytest.mark.parametrize("kind", ["dino", "owl"])
def test_a_batch_of_different_sizes_gives_what_each_image_gives_alone(
    kind: str, request: pytest.FixtureRequest
) -> None:
    detector = TransformersDetector(request.getfixturevalue(kind), kind)
    images = [noise(5), noise(6, (50, 90)), noise(7), noise(8, (64, 64))]
    together = detector.detect_batch(images, CLASSES, 0.0)
    for image, (boxes, scores) in zip(images, together, strict=True):
        alone_boxes, alone = detector.detect(image, CLASSES, 0.0)
        assert np.allclose(boxes, alone_boxes, atol=1e-2)
        assert np.allclose(scores, alone, atol=1e-4)


def test_a_class_s_tokens_don_t_depend_on_its_neighbours(dino: GroundingDino) -> None:
    prompt = dino.prompt(("t-shirt", "cat", "cat"))
    words = dino.tokenizer.convert_ids_to_tokens(prompt.tokens["input_ids"][0])
    assert [[words[i] for i in row.nonzero()[:, 0]] for row in prompt.shares] == [
        ["t", "-", "shirt"],
        ["cat"],
        ["cat"],
    ]
    assert torch.allclose(prompt.shares.sum(1), torch.ones(3))


REFUSED: list[tuple[str, Sequence[str], str]] = [
    ("dino", ("cat", "..."), "letter or a digit"),
    ("dino", ("cat", ""), "letter or a digit"),
    ("dino", ("traffic light",) * 20, "62 tokens, the model reads 32"),
    ("owl", ("cat", " "), "letter or a digit"),
    ("owl", ("cat", "a" * 40), "the model reads 24"),
]


@pytest.mark.parametrize(("kind", "classes", "reason"), REFUSED)
def test_names_that_the_model_can_t_read_are_refused(
    kind: str, classes: Sequence[str], reason: str, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(InputError, match=reason):
        TransformersDetector(request.getfixturevalue(kind), kind).check(classes)


def test_served_in_the_reference_format(owl: Owlv2) -> None:
    sink = io.BytesIO()
    noise(9).save(sink, "PNG")
    app = create_app(TransformersDetector(owl, "owlv2"))
    answered, refused = post(
        app,
        {**call(sink.getvalue(), CLASSES), "threshold": 0.0},
        call(sink.getvalue(), ("cat", " ")),
    )
    elements = answered.json()["detections"]
    assert elements
    assert all(
        set(e["scores"]) == set(CLASSES) and e["score"] == max(e["scores"].values())
        for e in elements
    )
    assert refused.status_code == 400
    assert "letter or a digit" in refused.json()["detail"]


def saved(folder: Path, model: Any, processor: Any) -> str:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["dino", "owl"])
def test_a_saved_folder_gives_the_same_answers(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = request.getfixturevalue(kind)
    processor = {
        "dino": transformers.GroundingDinoProcessor,
        "owl": transformers.Owlv2Processor,
    }[kind](model.image_processor, model.tokenizer)
    detector = load_transformers(saved(tmp_path, model.model, processor))
    image = noise(10)
    expected = TransformersDetector(model, kind).detect(image, CLASSES, 0.0)
    for found, wanted in zip(
        detector.detect(image, CLASSES, 0.0), expected, strict=True
    ):
        assert np.allclose(found, wanted, atol=1e-3)


def test_a_model_that_can_t_be_had_says_to_give_a_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError,
        match=r"neither a local folder nor in the cache.*--cloud\.model FOLDER",
    ):
        load_transformers("nobody/has-this-detector")


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model folder of transformers"):
        load_transformers(str(tmp_path))


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ConfigError, match=r"is a bert model.*owlv2"):
        load_transformers(str(tmp_path))
