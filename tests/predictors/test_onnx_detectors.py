from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from coin_ray.predictors.onnx_detectors import (
    COCO_CLASSES,
    OnnxDetector,
    OnnxNetwork,
    PicoDet,
    Yolox,
    fuse_weighted_boxes,
)

SIDE = 64
DOG, CAT = COCO_CLASSES.index("dog"), COCO_CLASSES.index("cat")
CELL = 2 * 8 + 3
"""Column 3, row 2 of the level with stride 8."""


class FakeSession:
    """Returns fixed arrays and records the input."""

    def __init__(self, arrays: list[np.ndarray]) -> None:
        self.arrays = arrays
        self.input = np.zeros(0)

    def get_inputs(self) -> list[Any]:
        return [type("Input", (), {"name": "image"})]

    def run(self, names: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        self.input = inputs["image"]
        return self.arrays


def _yolox() -> Yolox:
    """A dog with centre (28, 20) and sides 16 x 8 in the network's pixels."""
    candidates = np.zeros((1, 64 + 16 + 4, 85), np.float32)
    candidates[0, CELL, :4] = [0.5, 0.5, np.log(2), np.log(1)]
    candidates[0, CELL, [4, 5 + DOG, 5 + CAT]] = [0.9, 0.8, 0.1]
    return Yolox(FakeSession([candidates]), SIDE)


def _picodet() -> PicoDet:
    """The same box: centre (28, 20), distances 1, .5, 1, .5 cells."""
    cells = [64, 16, 4, 1]
    scores = [np.zeros((1, count, 80), np.float32) for count in cells]
    bins = [np.zeros((1, count, 32), np.float32) for count in cells]
    scores[0][0, CELL, [DOG, CAT]] = [0.72, 0.09]
    distances = np.full((4, 8), -50, np.float32)
    distances[[0, 2], 1] = 50
    distances[[1, 3], :2] = 50
    bins[0][0, CELL] = distances.reshape(-1)
    return PicoDet(FakeSession([*scores, *bins]), SIDE)


@pytest.mark.parametrize(
    ("network", "factors"),
    [(_yolox(), (2, 2)), (_picodet(), (2, 1))],
    ids=["yolox", "picodet"],
)
def test_boxes_are_in_the_image(network: OnnxNetwork, factors: tuple[int, int]) -> None:
    image = Image.new("RGB", (128, 64), "red")
    boxes, scores = OnnxDetector((network,), "test").detect(image, ("cat", "dog"), 0.05)
    x, y = factors
    assert np.allclose(boxes, [[20 * x, 16 * y, 36 * x, 24 * y]], atol=1e-3)
    assert np.allclose(scores, [[0.09, 0.72]])


def test_only_requested_classes_above_the_threshold() -> None:
    detector = OnnxDetector((_yolox(), _picodet()), "both")
    image = Image.new("RGB", (64, 64))
    assert detector.detect(image, ("person",), 0.05)[0].shape == (0, 4)
    assert detector.detect(image, ("cat",), 0.2)[1].shape == (0, 1)
    boxes, scores = detector.detect(image, ("dog",), 0.2)
    assert np.allclose(boxes, [[20, 16, 36, 24]], atol=1e-3)
    assert np.allclose(scores, [[0.72]])


def test_channels_are_blue_green_red() -> None:
    network = _yolox()
    network.predict(Image.new("RGB", (64, 32), (1, 2, 3)))
    assert network.session.input[0, :, 0, 0].tolist() == [3, 2, 1]
    assert network.session.input[0, :, 40, 0].tolist() == [114, 114, 114]


def test_fused_boxes_are_means_and_what_one_network_detects_counts_half() -> None:
    first = (
        np.array([[0, 0, 10, 10], [50, 50, 60, 60]], np.float32),
        np.array([[0.8, 0.1], [0.0, 0.4]], np.float32),
    )
    second = (
        np.array([[0, 0, 10, 12]], np.float32),
        np.array([[0.4, 0.0]], np.float32),
    )
    boxes, scores = fuse_weighted_boxes([first, second])
    assert np.allclose(boxes, [[0, 0, 10, 10 + 2 / 3], [50, 50, 60, 60]])
    assert np.allclose(scores, [[0.6, 0.05], [0, 0.2]])


def test_fusing_no_boxes_gives_empty_arrays() -> None:
    nothing = np.zeros((0, 4), np.float32), np.zeros((0, 2), np.float32)
    boxes, scores = fuse_weighted_boxes([nothing, nothing])
    assert (boxes.shape, scores.shape) == ((0, 4), (0, 2))
