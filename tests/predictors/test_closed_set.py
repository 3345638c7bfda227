from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from models.co_detr.fast_networks import folder
from PIL import Image
from torchvision.ops import box_iou
from torchvision.transforms.functional import pil_to_tensor

from coin_ray.errors import InputError
from coin_ray.models.co_detr.transformers_detr import load_fast, saved
from coin_ray.predictors.transformers_detectors import (
    TransformersDetector,
    load_transformers,
)
from coin_ray.serving.batching import BatchDetector

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

CLASSES = ("stop sign", "cat", "traffic light")


@pytest.fixture(scope="module", params=["rt-detr-v2", "d-fine"])
def place(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Left behind by a training."""
    made, own = tmp_path_factory.mktemp("trained"), str(tmp_path_factory.mktemp("own"))
    torch.manual_seed(0)
    for name, data in saved(
        load_fast(folder(Path(own), request.param, classes=2), request.param, CLASSES)
    ).items():
        (made / name).write_bytes(data)
    return made


@pytest.fixture(scope="module")
def served(place: Path) -> TransformersDetector:
    return load_transformers(str(place))


def picture(width: int = 120, height: int = 80, seed: int = 0) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    )


def test_it_is_a_batch_detector_with_the_classes_it_has_learned(
    served: TransformersDetector,
) -> None:
    assert isinstance(served, BatchDetector)
    assert tuple(served.classes) == CLASSES
    with pytest.raises(
        InputError,
        match="has not learned dog; ask it about stop sign, cat, traffic light",
    ):
        served.check(["cat", "dog"])


def test_it_answers_what_the_model_itself_predicts(
    served: TransformersDetector, place: Path
) -> None:
    boxes, scores = served.detect(picture(), CLASSES, 0.0)
    own = load_fast(
        str(place),
        "rt-detr-v2" if "RTDetr" in (place / "config.json").read_text() else "d-fine",
        CLASSES,
    ).eval()
    predicted = own.predict(own.prepare([pil_to_tensor(picture())]))[0]
    best = predicted[:1]
    overlaps = box_iou(torch.from_numpy(boxes), best.boxes)[:, 0]
    row = int(overlaps.argmax())
    assert float(overlaps[row]) == pytest.approx(1, abs=1e-5)
    assert float(scores[row, int(best.labels[0])]) == pytest.approx(
        float(best.scores[0]), abs=1e-6
    )
    assert scores.max() == pytest.approx(float(best.scores[0]), abs=1e-6)


def test_columns_are_the_classes_in_the_order_asked(
    served: TransformersDetector,
) -> None:
    every = served.detect(picture(), CLASSES, 0.0)[1]
    turned = served.detect(picture(), CLASSES[::-1], 0.0)[1]
    np.testing.assert_array_equal(every, turned[:, ::-1])
    assert served.detect(picture(), ("cat",), 0.0)[1].shape[1] == 1


def test_a_batch_of_any_sizes_gives_what_each_image_gives(
    served: TransformersDetector,
) -> None:
    images = [picture(), picture(60, 90, 1)]
    for image, (boxes, scores) in zip(
        images, served.detect_batch(images, CLASSES, 0.0), strict=True
    ):
        alone = served.detect(image, CLASSES, 0.0)
        np.testing.assert_allclose(boxes, alone[0], atol=1e-2)
        np.testing.assert_allclose(scores, alone[1], atol=1e-4)
        assert (boxes >= 0).all()
        assert (boxes[:, 2:] <= np.array(image.size) + 1e-3).all()
