from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from PIL import Image

from coin_ray.commands.export import format_int8_loss, parse_export
from coin_ray.errors import ConfigError, InputError
from coin_ray.export.int8_loss import Int8Loss, ModelPair, int8_loss
from coin_ray.structures import Detections
from coin_ray.tables import Truth
from tests.builders import CLASSES, Row, detections
from tests.export.conftest import Package
from tests.images import noise_image

pytest.importorskip("onnxscript", reason="needs the extra export")
onnx = pytest.importorskip("onnx")

from coin_ray.export.int8 import int8_model
from coin_ray.export.package import require_extra
from coin_ray.predictors.onnx_student import OnnxStudent

IMAGE = Image.new("RGB", (9, 9))
BOX = (0, 0, 10, 10)
DETECTION = (BOX, 0, 0.9)
BELOW_THRESHOLD = ((20, 20, 30, 30), 0, 0.29)


def _always(*rows: Row) -> Callable[[Image.Image], Detections]:
    return lambda _: detections(*rows)


def _truth(label: int) -> Truth:
    box = torch.tensor([BOX], dtype=torch.float32)
    return Truth(box, torch.tensor([label]), torch.tensor([False]))


@pytest.mark.parametrize(
    ("int8", "found_again", "difference"),
    [
        ([DETECTION], 1.0, 0.0),
        ([(BOX, 0, 0.8)], 1.0, 0.1),
        ([((0, 0, 10, 9.5), 0, 0.05)], 1.0, 0.85),
        ([((0, 0, 10, 8.5), 0, 0.9)], 0.0, None),
        ([(BOX, 1, 0.9)], 0.0, None),
        ([], 0.0, None),
    ],
)
def test_found_again_means_same_class_and_overlap(
    int8: list[Row], found_again: float, difference: float | None
) -> None:
    pair = ModelPair(_always(DETECTION, BELOW_THRESHOLD), _always(*int8))
    loss = int8_loss(pair, [IMAGE], [], 3)
    assert (loss.images, loss.detections) == (1, 1)
    assert loss.found_again == found_again
    assert loss.score_difference == pytest.approx(difference, abs=1e-4)
    assert loss.labelled == 0
    assert (loss.map50, loss.map50_int8, loss.points) == (None, None, None)
    assert not loss.too_large


def test_the_loss_of_map50_is_of_the_annotated_images() -> None:
    pair = ModelPair(_always(DETECTION), _always((BOX, 1, 0.9)))
    loss = int8_loss(pair, [], [(IMAGE, _truth(0)), (IMAGE, _truth(0))], 3)
    assert loss.labelled == 2
    assert (loss.map50, loss.map50_int8, loss.points) == (1.0, 0.0, 100.0)
    assert loss.too_large
    assert (loss.detections, loss.found_again) == (0, None)


@pytest.mark.parametrize(
    ("loss", "parts", "absent"),
    [
        (
            Int8Loss(100, 400, 0.955, 0.012, 300, 0.5205, 0.5178),
            ("mAP50 51.8 against 52.0", "95.5 % of 400", "0.012"),
            "better use",
        ),
        (
            Int8Loss(100, 400, 0.5, 0.1, 300, 0.52, 0.50),
            ("loses more than 1 point: better use model.onnx",),
            "nothing",
        ),
        (Int8Loss(100, 0, None, None, 0, None, None), ("nothing above .3",), "mAP50"),
    ],
)
def test_the_summary_has_the_measured_figures(
    loss: Int8Loss, parts: tuple[str, ...], absent: str
) -> None:
    line = format_int8_loss(loss)
    assert all(part in line for part in parts)
    assert absent not in line


PRODUCTS = ("Conv", "Gemm")
FLOAT_OPERATORS = ("NonMaxSuppression", "TopK", "Softmax", "MatMul", "Exp", "Gather")
FLOAT_WEIGHTS = {
    "propose.tower.visual.conv1.weight",
    "propose.rpn.objectness.weight",
    "propose.rpn.deltas.weight",
    "describe.head.embed.weight",
    "describe.head.box.weight",
}


def _producers(graph: onnx.GraphProto) -> dict[str, str]:
    """Return the kind of node that makes each tensor."""
    producers = {}
    for node in graph.node:
        producers |= dict.fromkeys(node.output, node.op_type)
    return producers


def test_both_networks_compute_in_8_bits_and_what_is_around_them_in_float(
    package: Package,
) -> None:
    exact = onnx.load(package.folder / "model.onnx")
    graph = onnx.load(package.folder / "model.int8.onnx").graph
    producers = _producers(graph)
    int8_names = {
        node.name
        for node in graph.node
        if node.op_type in PRODUCTS
        and producers.get(node.input[1]) == "DequantizeLinear"
    }
    float_weights = {
        node.input[1].split("/")[-1]
        for node in exact.graph.node
        if node.op_type in PRODUCTS and node.name not in int8_names
    }
    assert float_weights == FLOAT_WEIGHTS
    float_nodes = [node for node in graph.node if node.op_type in FLOAT_OPERATORS]
    assert len(float_nodes) > 8
    for node in float_nodes:
        kinds = {producers.get(tensor) for tensor in node.input}
        assert "DequantizeLinear" not in kinds, node.name


def test_the_8_bit_file_is_smaller_and_detects_most_again(package: Package) -> None:
    exact_bytes = (package.folder / "model.onnx").read_bytes()
    int8_bytes = (package.folder / "model.int8.onnx").read_bytes()
    assert len(int8_bytes) < 0.5 * len(exact_bytes)
    exact, int8 = OnnxStudent(exact_bytes), OnnxStudent(int8_bytes)
    assert int8.classes == CLASSES
    images = [noise_image(96, 64, seed) for seed in range(30, 38)]
    loss = int8_loss(ModelPair(exact, int8), images, [], 3)
    assert loss.detections > 5
    assert loss.found_again is not None
    assert loss.found_again > 0.5


def test_without_training_images_nothing_is_quantized(package: Package) -> None:
    model = onnx.load(package.folder / "model.onnx")
    with pytest.raises(InputError, match="needs training images"):
        int8_model(model, [])


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime.quantization", None)
    with pytest.raises(ConfigError, match=r"pip install 'coin-ray\[export\]'"):
        require_extra()


def test_int8_is_requested_on_the_command_line() -> None:
    assert parse_export(["demo", "--int8"]).int8
    assert not parse_export(["demo"]).int8
