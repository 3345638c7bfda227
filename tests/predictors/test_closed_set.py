from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou
from torchvision.transforms.functional import pil_to_tensor

from coin_ray.errors import InputError
from coin_ray.models.co_detr.transformers_detr import (
    load_transformers_detr,
    pack_transformers_detr,
)
from coin_ray.predictors.transformers_detectors import (
    TransformersDetector,
    load_transformers,
)
from coin_ray.serving.detectors import BatchDetector
from tests.images import noise_image
from tests.models.co_detr.transformers_networks import save_network

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

CLASSES = ("stop sign", "cat", "traffic light")
IMAGE = noise_image(patch=1)


@pytest.fixture(scope="module", params=["rt-detr-v2", "d-fine"])
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def trained_folder(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a training writes."""
    folder = tmp_path_factory.mktemp("trained")
    network_folder = tmp_path_factory.mktemp("network")
    torch.manual_seed(0)
    network = save_network(network_folder, model, classes=2)
    closed_set_detector = load_transformers_detr(network, model, CLASSES)
    for name, file_bytes in pack_transformers_detr(closed_set_detector).items():
        (folder / name).write_bytes(file_bytes)
    return folder


@pytest.fixture(scope="module")
def closed_set_detector(trained_folder: Path) -> TransformersDetector:
    return load_transformers(str(trained_folder))


def test_it_is_a_batch_detector_with_the_classes_it_has_learned(
    closed_set_detector: TransformersDetector,
) -> None:
    assert isinstance(closed_set_detector, BatchDetector)
    assert tuple(closed_set_detector.classes) == CLASSES
    message = "has not learned dog; ask it about stop sign, cat, traffic light"
    with pytest.raises(InputError, match=message):
        closed_set_detector.check(["cat", "dog"])


def test_it_answers_what_the_model_itself_predicts(
    closed_set_detector: TransformersDetector, trained_folder: Path, model: str
) -> None:
    boxes, scores = closed_set_detector.detect(IMAGE, CLASSES, 0.0)
    network = load_transformers_detr(str(trained_folder), model, CLASSES).eval()
    predicted = network.predict(network.prepare([pil_to_tensor(IMAGE)]))[0]
    best = predicted[:1]
    overlaps = box_iou(torch.from_numpy(boxes), best.boxes)[:, 0]
    row = int(overlaps.argmax())
    assert float(overlaps[row]) == pytest.approx(1, abs=1e-5)
    best_score = pytest.approx(float(best.scores[0]), abs=1e-6)
    assert float(scores[row, int(best.labels[0])]) == best_score
    assert scores.max() == best_score


def test_columns_are_the_classes_in_the_requested_order(
    closed_set_detector: TransformersDetector,
) -> None:
    scores = closed_set_detector.detect(IMAGE, CLASSES, 0.0)[1]
    reversed_scores = closed_set_detector.detect(IMAGE, CLASSES[::-1], 0.0)[1]
    np.testing.assert_array_equal(scores, reversed_scores[:, ::-1])
    assert closed_set_detector.detect(IMAGE, ("cat",), 0.0)[1].shape[1] == 1


def test_a_batch_of_any_sizes_gives_what_each_image_gives(
    closed_set_detector: TransformersDetector,
) -> None:
    images = [IMAGE, noise_image(60, 90, seed=1, patch=1)]
    batch = closed_set_detector.detect_batch(images, CLASSES, 0.0)
    for image, (boxes, scores) in zip(images, batch, strict=True):
        boxes_alone, scores_alone = closed_set_detector.detect(image, CLASSES, 0.0)
        np.testing.assert_allclose(boxes, boxes_alone, atol=1e-2)
        np.testing.assert_allclose(scores, scores_alone, atol=1e-4)
        assert (boxes >= 0).all()
        assert (boxes[:, 2:] <= np.array(image.size) + 1e-3).all()
