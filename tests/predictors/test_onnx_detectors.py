from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from coin_ray.predictors.onnx_detectors import (
    COCO_CLASSES,
    OnnxDetector,
    PicoDet,
    Yolox,
    _OnnxModel,
)

SIDE = 64
DOG, CAT = COCO_CLASSES.index("dog"), COCO_CLASSES.index("cat")


class Session:
    """Gives fixed outputs and remembers the input."""

    def __init__(self, outputs: list[np.ndarray]) -> None:
        self.outputs = outputs
        self.input = np.zeros(0)

    def get_inputs(self) -> list[Any]:
        return [type("Input", (), {"name": "image"})]

    def run(self, names: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        self.input = inputs["image"]
        return self.outputs


def yolox() -> Yolox:
    """A dog at cell (3, 2) of stride 8: centre (28, 20) and sides 16 x 8 in the
    network's pixels."""
    output = np.zeros((1, 64 + 16 + 4, 85), np.float32)
    output[0, 2 * 8 + 3, :4] = [0.5, 0.5, np.log(2), np.log(1)]
    output[0, 2 * 8 + 3, [4, 5 + DOG, 5 + CAT]] = [0.9, 0.8, 0.1]
    return Yolox(Session([output]), SIDE)


def picodet() -> PicoDet:
    """The same box: centre (28, 20), distances 1, .5, 1, .5 cells."""
    cells = [64, 16, 4, 1]
    scores = [np.zeros((1, n, 80), np.float32) for n in cells]
    bins = [np.zeros((1, n, 32), np.float32) for n in cells]
    scores[0][0, 2 * 8 + 3, [DOG, CAT]] = [0.72, 0.09]
    distances = np.full((4, 8), -50, np.float32)
    distances[[0, 2], 1] = 50
    distances[[1, 3], :2] = 50
    bins[0][0, 2 * 8 + 3] = distances.reshape(-1)
    return PicoDet(Session([*scores, *bins]), SIDE)


@pytest.mark.parametrize(
    ("model", "factors"),
    [(yolox(), (2, 2)), (picodet(), (2, 1))],
    ids=["yolox", "picodet"],
)
def test_boxes_in_the_image(model: _OnnxModel, factors: tuple[int, int]) -> None:
    image = Image.new("RGB", (128, 64), "red")
    boxes, scores = OnnxDetector((model,), "test").detect(image, ("cat", "dog"), 0.05)
    x, y = factors
    assert np.allclose(boxes, [[20 * x, 16 * y, 36 * x, 24 * y]], atol=1e-3)
    assert np.allclose(scores, [[0.09, 0.72]])


def test_only_asked_classes_above_the_threshold() -> None:
    detector = OnnxDetector((yolox(), picodet()), "both")
    image = Image.new("RGB", (64, 64))
    assert detector.detect(image, ("person",), 0.05)[0].shape == (0, 4)
    assert detector.detect(image, ("cat",), 0.2)[1].shape == (0, 1)
    boxes, scores = detector.detect(image, ("dog",), 0.2)
    assert np.allclose(boxes, [[20, 16, 36, 24]], atol=1e-3)
    assert np.allclose(scores, [[0.72]])


def test_channels_are_blue_green_red() -> None:
    model = yolox()
    model.predict(Image.new("RGB", (64, 32), (1, 2, 3)))
    assert model.session.input[0, :, 0, 0].tolist() == [3, 2, 1]
    assert model.session.input[0, :, 40, 0].tolist() == [114, 114, 114]
