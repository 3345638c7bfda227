"""Teachers that the local cloud serves by name or folder answer what transformers' own
post-processing gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou

from coin_ray.errors import InputError
from coin_ray.predictors.scored_boxes import DUPLICATE_IOU
from coin_ray.predictors.transformers_concepts import OmDetTurbo, Sam3
from coin_ray.predictors.transformers_detectors import (
    MASKED_MODELS,
    ClosedSet,
    TransformersDetector,
    load_transformers,
)
from coin_ray.predictors.transformers_prompt import share_scores, split_classes
from tests.images import noise_image
from tests.models.students.tiny_networks import (
    MODEL_TYPES,
    save_tiny_network,
    tiny_processor,
)
from tests.predictors.text_prompted_networks import omdet_turbo, sam3

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

CLASSES = ("stop sign", "cat", "traffic light")
SIZES = [(80, 60), (50, 90)]


def _noise(seed: int, size: tuple[int, int] = (80, 60)) -> Image.Image:
    return noise_image(*size, seed, patch=5)


@pytest.fixture(scope="module", params=MODEL_TYPES)
def closed_set(request: pytest.FixtureRequest, tmp_path_factory: Any) -> str:
    folder: Path = tmp_path_factory.mktemp(request.param)
    return save_tiny_network(folder, request.param, CLASSES)


@pytest.mark.parametrize("size", SIZES)
def test_closed_sets_give_the_library_s_boxes_labels_and_scores(
    closed_set: str, size: tuple[int, int]
) -> None:
    detector = load_transformers(closed_set)
    architecture = detector._architecture
    assert isinstance(architecture, ClosedSet)
    image, model = _noise(1, size), architecture.model
    processor = tiny_processor(model.config.model_type)
    with torch.no_grad():
        inputs = processor(images=[image], return_tensors="pt")
        (expected,) = processor.post_process_object_detection(
            model(**inputs), threshold=0.0, target_sizes=[(image.height, image.width)]
        )
        boxes, scores = architecture.predict([image], architecture.prompt(CLASSES))
    best = scores[0].flatten().topk(len(expected["scores"]))
    torch.testing.assert_close(best.values, expected["scores"], rtol=0, atol=1e-6)
    assert torch.equal(best.indices % len(CLASSES), expected["labels"])
    rows = best.indices // len(CLASSES)
    torch.testing.assert_close(boxes[0][rows], expected["boxes"], rtol=0, atol=1e-3)
    assert float(scores[0].std(0).min()) > 1e-4, "all queries are alike"


def test_closed_sets_answer_a_batch_of_any_sizes_as_each_image(closed_set: str) -> None:
    detector = load_transformers(closed_set)
    images = [_noise(seed, size) for seed, size in enumerate(SIZES * 2)]
    batch = detector.detect_batch(images, CLASSES, 0.0)
    for image, (boxes, scores) in zip(images, batch, strict=True):
        boxes_alone, scores_alone = detector.detect(image, CLASSES, 0.0)
        assert len(boxes)
        np.testing.assert_allclose(boxes, boxes_alone, atol=1e-2)
        np.testing.assert_allclose(scores, scores_alone, atol=1e-4)


def test_models_that_mask_padding_are_asked_about_one_size_at_a_time(
    closed_set: str,
) -> None:
    architecture = load_transformers(closed_set)._architecture
    assert isinstance(architecture, ClosedSet)
    is_masked = architecture.model.config.model_type in MASKED_MODELS
    assert architecture.pads == is_masked


@pytest.fixture(scope="module", params=["sam3", "omdet"])
def teacher(request: pytest.FixtureRequest) -> tuple[Sam3 | OmDetTurbo, Any]:
    """A model, and its processor."""
    if request.param == "sam3":
        model, processor = sam3()
        return Sam3(model, processor.tokenizer, processor.image_processor), processor
    model, processor = omdet_turbo()
    return OmDetTurbo(model, processor.tokenizer, processor.image_processor), processor


def _predict(architecture: Any, image: Image.Image) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        boxes, scores = architecture.predict([image], architecture.prompt(CLASSES))
    return boxes[0], scores[0]


@pytest.mark.parametrize("size", SIZES)
def test_sam_3_gives_the_library_s_boxes_and_scores_of_each_text(
    size: tuple[int, int],
) -> None:
    model, processor = sam3()
    architecture = Sam3(model, processor.tokenizer, processor.image_processor)
    image = _noise(1, size)
    boxes, scores = _predict(architecture, image)
    for k, (boxes_of_class, vectors) in enumerate(
        zip(boxes.chunk(len(CLASSES)), scores.chunk(len(CLASSES)), strict=True)
    ):
        inputs = processor(images=image, text=CLASSES[k], return_tensors="pt")
        with torch.no_grad():
            prediction = model(**inputs)
        (expected,) = processor.post_process_object_detection(
            prediction, threshold=0.0, target_sizes=[(image.height, image.width)]
        )
        torch.testing.assert_close(vectors[:, k], expected["scores"], rtol=0, atol=1e-6)
        torch.testing.assert_close(boxes_of_class, expected["boxes"], rtol=0, atol=1e-3)
    assert float(scores.std(0).min()) > 1e-3, "all queries are alike"


def test_the_boxes_of_another_text_share_their_scores() -> None:
    first = [[0.0, 0, 10, 10], [50, 50, 60, 60]]
    second = [[0.0, 0, 10, 9], [20, 20, 30, 30]]
    boxes = [torch.tensor(first), torch.tensor(second)]
    scores = [torch.tensor([[0.9], [0.2]]), torch.tensor([[0.4], [0.7]])]
    vectors = share_scores(boxes, scores)
    assert float(box_iou(boxes[0][:1], boxes[1][:1])) >= DUPLICATE_IOU
    expected = torch.tensor([[0.9, 0.4], [0.2, 0], [0.9, 0.4], [0, 0.7]])
    torch.testing.assert_close(vectors, expected)


def test_omdet_turbo_gives_the_library_s_boxes_labels_and_scores() -> None:
    model, processor = omdet_turbo()
    architecture = OmDetTurbo(model, processor.tokenizer, processor.image_processor)
    image = _noise(2)
    boxes, scores = _predict(architecture, image)
    inputs = processor(images=image, text=[list(CLASSES)], return_tensors="pt")
    with torch.no_grad():
        prediction = model(**inputs)
    (expected,) = processor.post_process_grounded_object_detection(
        prediction,
        text_labels=[list(CLASSES)],
        threshold=0.0,
        nms_threshold=1.0,
        target_sizes=[(image.height, image.width)],
    )
    best = scores.flatten().topk(len(expected["scores"]))
    torch.testing.assert_close(best.values, expected["scores"], rtol=0, atol=1e-6)
    assert torch.equal(best.indices % len(CLASSES), expected["labels"])
    clipped = boxes[best.indices // len(CLASSES)].clamp(min=0)
    limits = torch.tensor([image.width, image.height] * 2)
    torch.testing.assert_close(
        torch.minimum(clipped, limits), expected["boxes"], rtol=0, atol=1e-3
    )
    assert float(scores.std(0).min()) > 1e-3, "all queries are alike"


def test_a_batch_gives_what_each_image_gives(
    teacher: tuple[Sam3 | OmDetTurbo, Any],
) -> None:
    detector = TransformersDetector(teacher[0], "served")
    images = [_noise(seed, size) for seed, size in enumerate(SIZES)]
    batch = detector.detect_batch(images, CLASSES, 0.0)
    for image, (boxes, scores) in zip(images, batch, strict=True):
        boxes_alone, scores_alone = detector.detect(image, CLASSES, 0.0)
        assert len(boxes)
        np.testing.assert_allclose(boxes, boxes_alone, atol=1e-2)
        np.testing.assert_allclose(scores, scores_alone, atol=1e-4)


def test_a_saved_teacher_gives_the_same_answers(
    teacher: tuple[Sam3 | OmDetTurbo, Any], tmp_path: Path
) -> None:
    architecture, processor = teacher
    architecture.model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    boxes, scores = load_transformers(str(tmp_path)).detect(_noise(3), CLASSES, 0.0)
    expected_boxes, expected_scores = TransformersDetector(
        architecture, "served"
    ).detect(_noise(3), CLASSES, 0.0)
    np.testing.assert_allclose(boxes, expected_boxes, atol=1e-3)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-4)


@pytest.mark.parametrize(
    ("classes", "reason"),
    [
        (("cat", " "), "letter or a digit"),
        (("cat", "a" * 90), "tokens, the model reads"),
    ],
)
def test_names_that_a_model_can_t_read_are_refused(
    teacher: tuple[Sam3 | OmDetTurbo, Any], classes: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        TransformersDetector(teacher[0], "served").check(classes)


def test_lists_that_are_too_long_are_split() -> None:
    assert split_classes("abcd", [2, 3, 5, 1], 5) == [("a", "b"), ("c",), ("d",)]
    assert split_classes("ab", [9, 1], 5) == [("a",), ("b",)]
    assert split_classes("", [], 5) == [()]


def test_omdet_turbo_reads_a_long_list_in_parts() -> None:
    model, processor = omdet_turbo()
    architecture = OmDetTurbo(model, processor.tokenizer, processor.image_processor)
    classes = [f"{letter}at" for letter in "abcdefghijklmnopqrstuvwxyz"]
    parts = architecture.passes(classes)
    assert [name for part in parts for name in part] == classes
    assert 1 < len(parts) < 5
    detector = TransformersDetector(architecture, "omdet")
    boxes, scores = detector.detect(_noise(1), classes, 0.0)
    assert len(boxes)
    assert scores.shape[1] == len(classes)
