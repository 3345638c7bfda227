from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from coin_ray.errors import ConfigError
from coin_ray.predictors.onnx_detectors import (
    COCO_CLASSES,
    DescribedDetector,
    OnnxDetector,
    OnnxNetwork,
    PicoDet,
    fuse_weighted_boxes,
    load_onnx_detector,
)
from coin_ray.predictors.onnx_signature import OnnxSignature

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
        return [type("Input", (), {"name": "image", "type": "tensor(float)"})]

    def run(self, names: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        self.input = inputs["image"]
        return self.arrays


def _yolox() -> DescribedDetector:
    """A dog with centre (28, 20) and sides 16 x 8 in the network's pixels."""
    candidates = np.zeros((1, 64 + 16 + 4, 85), np.float32)
    candidates[0, CELL, :4] = [0.5, 0.5, np.log(2), np.log(1)]
    candidates[0, CELL, [4, 5 + DOG, 5 + CAT]] = [0.9, 0.8, 0.1]
    return DescribedDetector(FakeSession([candidates]), OnnxSignature(), (SIDE, SIDE))


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
    return PicoDet(FakeSession([*scores, *bins]), (SIDE, SIDE))


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


def _constant_model(
    folder: Path,
    output: np.ndarray,
    shape: tuple[Any, ...] = (1, 3, 64, 64),
    half: bool = False,
    **description: Any,
) -> str:
    """Write a model that answers ``output`` whatever it is shown; return its path."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, kinds = onnx.helper, onnx.TensorProto
    constant = onnx.numpy_helper.from_array(output.astype(np.float32))
    zero = onnx.numpy_helper.from_array(np.float32(0))
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=kinds.FLOAT),
        helper.make_node("ReduceMean", ["pixels"], ["mean"], keepdims=0),
        helper.make_node("Constant", [], ["zero"], value=zero),
        helper.make_node("Mul", ["mean", "zero"], ["nothing"]),
        helper.make_node("Constant", [], ["answer"], value=constant),
        helper.make_node("Add", ["answer", "nothing"], ["output"]),
    ]
    kind = kinds.FLOAT16 if half else kinds.FLOAT
    graph = helper.make_graph(
        nodes,
        "constant",
        [helper.make_tensor_value_info("images", kind, shape)],
        [helper.make_tensor_value_info("output", kinds.FLOAT, output.shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    path = str(folder / "model.onnx")
    onnx.save(model, path)
    if description:
        (folder / "model.onnx.json").write_text(json.dumps(description))
    return path


def _decoded(boxes: list[list[float]], scores: list[list[float]]) -> np.ndarray:
    return np.concatenate([boxes, scores], 1)[None]


BOX = [[20.0, 16.0, 36.0, 24.0]]
CENTRED = [[28.0, 20.0, 16.0, 8.0]]
TWO = {"classes": ["cat", "dog"]}


@pytest.mark.parametrize(
    ("output", "shape", "half", "description"),
    [
        (_decoded(BOX, [[0.1, 0.8]]), (1, 3, 64, 64), False, {"boxes": "xyxy"}),
        (_decoded(CENTRED, [[0.1, 0.8]]), (1, 3, 64, 64), True, {"boxes": "cxcywh"}),
        (
            _decoded(CENTRED, [[0.1, 0.8]]).transpose(0, 2, 1),
            ("batch", 3, "height", "width"),
            False,
            {"boxes": "cxcywh", "layout": "columns", "input_size": [64, 64]},
        ),
        (_decoded(BOX, [[0.1, 0.8]]), (1, 3, 64, 96), False, {"boxes": "xyxy"}),
    ],
    ids=["xyxy", "half", "columns, free sides", "oblong"],
)
def test_a_described_detector_is_read_as_described(
    output: np.ndarray,
    shape: tuple[Any, ...],
    half: bool,
    description: dict[str, Any],
    tmp_path: Path,
) -> None:
    settings = TWO | {"objectness": False} | description
    detector = load_onnx_detector(
        [_constant_model(tmp_path, output, shape, half, **settings)]
    )
    boxes, scores = detector.detect(Image.new("RGB", (64, 64)), ("cat", "dog"), 0.05)
    assert np.allclose(boxes, BOX)
    assert np.allclose(scores, [[0.1, 0.8]])


@pytest.mark.parametrize(
    ("output", "shape", "description", "message"),
    [
        (
            np.zeros((1, 252, 85)),
            (1, 3, 64, 64),
            {},
            r"\[1, 84, 85\] for an input of 64",
        ),
        (np.full((1, 84, 85), 60), (1, 3, 64, 64), {}, "its boxes are not 'raw'"),
        (np.zeros((1, 84, 85)), (4, 3, 64, 64), {}, "expected a batch of 1"),
        (np.zeros((1, 84, 85)), (1, 1, 64, 64), {}, "expected one input"),
        (np.zeros((1, 84, 9)), (1, 3, 64, 64), {}, "neither a YOLOX nor a PicoDet"),
        (np.zeros((1, 84, 85)), (1, 3, 64, 64), TWO, r"\[1, 84, 7\]"),
        (np.zeros((1, 84, 85)), (1, 3, 64, 64), {"nms": "no"}, "no description"),
        (np.zeros((1, 84, 85)), (1, 3, 64, 64), {"anchors": 3}, "no description"),
        (
            np.full((1, 5, 6), -1),
            (1, 3, 64, 64),
            TWO | {"boxes": "cxcywh", "objectness": False},
            "its boxes are not 'cxcywh'",
        ),
    ],
)
def test_a_detector_that_is_not_as_described_is_an_error_when_it_is_loaded(
    output: np.ndarray,
    shape: tuple[Any, ...],
    description: dict[str, Any],
    message: str,
    tmp_path: Path,
) -> None:
    path = _constant_model(tmp_path, output, shape, **description)
    with pytest.raises(ConfigError, match=message):
        load_onnx_detector([path])


@pytest.mark.parametrize(("nms", "count"), [("class_wise", 2), ("class_agnostic", 1)])
def test_suppression_is_within_a_class_unless_described_otherwise(
    nms: str, count: int, tmp_path: Path
) -> None:
    rider = _decoded([[10, 10, 50, 60], [10, 14, 50, 62]], [[0.9, 0.1], [0.1, 0.8]])
    settings = TWO | {"boxes": "xyxy", "objectness": False, "nms": nms}
    detector = load_onnx_detector([_constant_model(tmp_path, rider, **settings)])
    found, _ = detector.detect(Image.new("RGB", (64, 64)), ("cat", "dog"), 0.25)
    assert len(found) == count
