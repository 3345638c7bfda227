"""Phrases of Grounding DINO and MM-Grounding DINO: which tokens mean which phrase, several
phrases and negatives of a class, and lists that are longer than the model reads."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from coin_ray.cloud.answer import Answer
from coin_ray.cloud.class_questions import NEGATIVE_IOU
from coin_ray.cloud.governor import Governor, Limits, LocalGovernor
from coin_ray.cloud.journal.opening import open_journal
from coin_ray.cloud.question_client import create_cloud_client
from coin_ray.config import ClassPrompt, Cloud
from coin_ray.config.presets import folder
from coin_ray.data.canonical import CanonicalImage, canonical_image
from coin_ray.predictors.transformers_detectors import (
    GroundingDino,
    TransformersDetector,
    load_transformers,
)
from coin_ray.serving.server import create_app
from tests.images import encode, noise_image
from tests.predictors.text_prompted_networks import grounding_dino, mm_grounding_dino

pytest.importorskip("transformers")

SINGLE_TOKENS = ("cat", "stop", "photo")
PHRASES = ("stop sign", "cat", "traffic light", "St. Bernard")
TOKENS = (("stop", "sign"), ("cat",), ("traffic", "light"), ("st", "bernard"))
SCORE_MIN = 0.01
Network = tuple[GroundingDino, Any]
"""A model, and transformers' processor of it."""


@pytest.fixture(scope="module", params=[mm_grounding_dino, grounding_dino])
def network(request: pytest.FixtureRequest) -> Network:
    model, processor = request.param()
    dino = GroundingDino(model, processor.tokenizer, processor.image_processor)
    return dino, processor


def _image(seed: int, size: tuple[int, int] = (80, 60)) -> Image.Image:
    return noise_image(*size, seed, patch=10)


@torch.no_grad()
def _predict(
    dino: GroundingDino, image: Image.Image, phrases: Sequence[str]
) -> tuple[Tensor, Tensor]:
    boxes, scores = dino.predict([image], dino.prompt(phrases))
    return boxes[0], scores[0]


@torch.no_grad()
def _by_library(
    network: Network, image: Image.Image, phrases: Sequence[str]
) -> tuple[dict[str, Any], Tensor, list[str]]:
    """Return transformers' own detections, the token probabilities [Q, L] and the
    tokens.
    """
    dino, processor = network
    texts = [phrase.replace(".", "") for phrase in phrases]
    inputs = processor(images=image, text=[texts], return_tensors="pt")
    prediction = dino.model(**inputs)
    (processed,) = processor.post_process_grounded_object_detection(
        prediction,
        inputs["input_ids"],
        threshold=-1.0,
        target_sizes=[(image.height, image.width)],
    )
    words = dino.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    return processed, prediction.logits[0].sigmoid(), words


@pytest.mark.parametrize("size", [(80, 60), (50, 90)])
def test_a_phrase_s_score_is_the_mean_over_its_tokens(
    network: Network, size: tuple[int, int]
) -> None:
    image = _image(1, size)
    boxes, scores = _predict(network[0], image, PHRASES)
    processed, probabilities, words = _by_library(network, image, PHRASES)
    torch.testing.assert_close(boxes, processed["boxes"], rtol=0, atol=1e-3)
    for column, tokens in enumerate(TOKENS):
        spans = [words.index(token) for token in tokens]
        expected = probabilities[:, spans].mean(1)
        torch.testing.assert_close(scores[:, column], expected, rtol=0, atol=1e-5)
    assert float(scores.std(0).min()) > 1e-3, "all queries are alike"
    assert float((scores[:, 0] - scores[:, 1]).abs().max()) > 1e-2, "phrases are alike"


def test_phrases_of_one_token_have_the_library_s_scores_and_labels(
    network: Network,
) -> None:
    """The library's score is the best of all tokens, ours the mean of a phrase's: for
    phrases of one token both are the same, if no full stop is surer.
    """
    image = _image(2)
    _, scores = _predict(network[0], image, SINGLE_TOKENS)
    processed, probabilities, words = _by_library(network, image, SINGLE_TOKENS)
    spans = [words.index(token) for token in SINGLE_TOKENS]
    is_phrase = probabilities.argmax(1)[:, None] == torch.tensor(spans)
    rows = is_phrase.any(1)
    assert int(rows.sum()) >= 2
    best = scores.max(1)
    torch.testing.assert_close(best.values[rows], processed["scores"][rows])
    assert torch.equal(best.indices[rows], is_phrase[rows].int().argmax(1))


def test_a_list_that_is_too_long_is_read_in_several_passes(network: Network) -> None:
    dino, _ = network
    phrases = [f"{a} {b}" for a in ("cat", "stop", "light") for b in ("sign", "photo")]
    phrases += [f"{phrase} shirt" for phrase in phrases]
    limit = dino.model.config.max_text_len
    parts = dino.passes(phrases)
    assert [phrase for part in parts for phrase in part] == phrases
    lengths = [dino.prompt(part).tokens["input_ids"].shape[1] for part in parts]
    assert max(lengths) <= limit
    assert len(parts) == 2
    # each list takes the next phrase if it fits
    assert lengths[0] + 4 > limit

    image = _image(3)
    detector = TransformersDetector(dino, "long")
    boxes, scores = detector.detect(image, phrases, 0.0)
    assert scores.shape[1] == len(phrases)
    alone = [_predict(dino, image, part) for part in parts]
    candidates = np.concatenate([b.numpy() for b, _ in alone]).clip(0, [80, 60, 80, 60])
    first = len(parts[0])
    own = {0: slice(0, first), 1: slice(first, None)}
    queries = dino.model.config.num_queries
    for box, vector in zip(boxes, scores, strict=True):
        row = int(np.abs(candidates - box).max(1).argmin())
        columns = own[row // queries]
        expected = alone[row // queries][1][row % queries].numpy()
        np.testing.assert_allclose(vector[columns], expected, atol=1e-5)


def test_a_folder_is_served_with_long_lists(network: Network, tmp_path: Path) -> None:
    dino, processor = network
    dino.model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = load_transformers(str(tmp_path))
    phrases = ["traffic light"] * 9 + ["cat"]
    boxes, scores = loaded.detect(_image(4), phrases, 0.0)
    expected = TransformersDetector(dino, "x").detect(_image(4), phrases, 0.0)
    assert scores.shape[1] == 10
    np.testing.assert_allclose(boxes, expected[0], atol=1e-3)
    np.testing.assert_allclose(scores, expected[1], atol=1e-4)


def _ask(dino: GroundingDino, folder_of_run: Path, *prompts: ClassPrompt) -> Answer:
    """Return the served model's answer about one image, by a run's client."""
    url = "http://127.0.0.1:8000"
    cloud = Cloud(url=url, rate=1e5, score_min=SCORE_MIN)
    classes = ("sign", "animal")
    config = replace(folder(), classes=classes, class_prompts=prompts, cloud=cloud)
    app = create_app(TransformersDetector(dino, "served"))

    async def run() -> Answer:
        journal = open_journal(str(folder_of_run))
        client = create_cloud_client(
            config,
            cloud,
            url,
            journal,
            LocalGovernor(Governor(Limits(1e5, 8))),
            transport=httpx.ASGITransport(app),
        )
        answer = await client.answer(_sent_image())
        await client.aclose()
        journal.close()
        return answer

    return asyncio.run(run())


def _sent_image() -> CanonicalImage:
    return canonical_image(encode(_image(5), "PNG"), 4096)


def _detect(dino: GroundingDino, phrases: Sequence[str]) -> Any:
    image = Image.open(io.BytesIO(_sent_image().data)).convert("RGB")
    return TransformersDetector(dino, "served").detect(image, phrases, SCORE_MIN)


def test_phrases_and_negatives_of_a_class(network: Network, tmp_path: Path) -> None:
    """A class's score is the best of its phrases. A negative drops the boxes of its class
    that it fits better, and no other.
    """
    dino, _ = network
    sign = ClassPrompt("sign", ("stop sign", "traffic light"))
    animal = ClassPrompt("animal", ("cat", "St. Bernard"))
    plain = _ask(dino, tmp_path / "plain", sign, animal).raw
    assert plain is not None
    boxes, scores = _detect(dino, (*sign.ask, *animal.ask))
    by_class = np.stack([scores[:, :2].max(1), scores[:, 2:].max(1)], 1)
    assert set(plain.class_scores.argmax(1)) == {0, 1}
    for box, vector in zip(plain.boxes, plain.class_scores, strict=True):
        distances = np.abs(by_class - vector).max(1)
        row = int(distances.argmin())
        assert distances[row] < 1e-3  # the wire rounds
        assert _iou(boxes[row], box) > 0.99

    refused = replace(animal, negatives=("photo", "shirt", "of"))
    strict = _ask(dino, tmp_path / "strict", sign, refused).raw
    assert strict is not None
    other_boxes, other_scores = _detect(dino, refused.negatives)
    is_dropped = [
        vector.argmax() == 1
        and any(
            _iou(box, other) >= NEGATIVE_IOU and other_score >= vector.max()
            for other, other_score in zip(other_boxes, other_scores.max(1), strict=True)
        )
        for box, vector in zip(plain.boxes, plain.class_scores, strict=True)
    ]
    assert 0 < sum(is_dropped) < len(plain)
    assert strict.counts.suppressed == sum(is_dropped)
    expected = plain.boxes[~np.array(is_dropped)]
    np.testing.assert_allclose(strict.boxes, expected, atol=1e-3)


def _iou(first: Any, second: Any) -> float:
    low, high = np.maximum(first[:2], second[:2]), np.minimum(first[2:], second[2:])
    overlap = float(np.prod(np.clip(high - low, 0, None)))
    areas = float(np.prod(first[2:] - first[:2]) + np.prod(second[2:] - second[:2]))
    return overlap / (areas - overlap)
