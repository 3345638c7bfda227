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
from tests.builders import CLASSES, Row, detections, tiny_detector

pytest.importorskip("onnxscript", reason="needs the extra export")
onnx = pytest.importorskip("onnx")

from coin_ray.export.int8 import int8_model
from coin_ray.export.onnx_model import onnx_model
from coin_ray.export.package import require_extra
from coin_ray.predictors.onnx_student import OnnxStudent
from tests.export.pictures import picture

IMAGE = Image.new("RGB", (9, 9))
BOX = (0, 0, 10, 10)
FOUND = (BOX, 0, 0.9)


def always(*rows: Row) -> Callable[[Image.Image], Detections]:
    return lambda _: detections(*rows)


def truth(label: int) -> Truth:
    return Truth(
        torch.tensor([BOX], dtype=torch.float32),
        torch.tensor([label]),
        torch.tensor([False]),
    )


@pytest.mark.parametrize(
    ("int8", "again", "difference"),
    [
        ([FOUND], 1.0, 0.0),
        ([(BOX, 0, 0.8)], 1.0, 0.1),
        ([((0, 0, 10, 9.5), 0, 0.05)], 1.0, 0.85),
        ([((0, 0, 10, 8.5), 0, 0.9)], 0.0, None),
        ([(BOX, 1, 0.9)], 0.0, None),
        ([], 0.0, None),
    ],
)
def test_what_counts_as_found_again(
    int8: list[Row], again: float, difference: float | None
) -> None:
    loss = int8_loss(
        ModelPair(always(FOUND, ((20, 20, 30, 30), 0, 0.29)), always(*int8)), [IMAGE], [], 3
    )
    assert (loss.images, loss.detections, loss.found_again) == (1, 1, again)
    assert loss.score_difference == pytest.approx(difference, abs=1e-4)
    assert (
        loss.labelled,
        loss.map50,
        loss.map50_int8,
        loss.points,
        loss.too_large,
    ) == (0, None, None, None, False)


def test_the_loss_of_map50_is_of_the_annotated_images() -> None:
    loss = int8_loss(
        ModelPair(always(FOUND), always((BOX, 1, 0.9))),
        [],
        [(IMAGE, truth(0)), (IMAGE, truth(0))],
        3,
    )
    assert (
        loss.labelled,
        loss.map50,
        loss.map50_int8,
        loss.points,
        loss.too_large,
    ) == (2, 1.0, 0.0, 100.0, True)
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
def test_the_summary_tells_what_was_measured(
    loss: Int8Loss, parts: tuple[str, ...], absent: str
) -> None:
    line = format_int8_loss(loss)
    assert all(part in line for part in parts)
    assert absent not in line


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return onnx_model(tiny_detector().eval(), CLASSES)


def test_both_networks_compute_in_8_bits_and_what_stands_around_them_in_float(
    model: onnx.ModelProto,
) -> None:
    data = int8_model(model, [picture(96, 64, seed) for seed in range(4)])
    assert len(data) < 0.5 * model.ByteSize()
    graph = onnx.load_from_string(data).graph
    producers = {output: node.op_type for node in graph.node for output in node.output}
    products = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    in_8_bits = {
        n.name
        for n in graph.node
        if n.op_type in ("Conv", "Gemm")
        and producers.get(n.input[1]) == "DequantizeLinear"
    }
    exact = {
        node.input[1].split("/")[-1] for node in products if node.name not in in_8_bits
    }
    assert exact == {
        "propose.tower.visual.conv1.weight",
        "propose.rpn.objectness.weight",
        "propose.rpn.deltas.weight",
        "describe.head.embed.weight",
        "describe.head.box.weight",
    }
    around = [
        n
        for n in graph.node
        if n.op_type
        in (
            "NonMaxSuppression",
            "TopK",
            "Softmax",
            "MatMul",
            "Exp",
            "Gather",
        )
    ]
    assert len(around) > 8
    assert not [
        n.name
        for n in around
        if "DequantizeLinear" in {producers.get(i) for i in n.input}
    ]
    student = OnnxStudent(data)
    assert student.classes == CLASSES
    loss = int8_loss(
        ModelPair(OnnxStudent(model.SerializeToString()), student),
        [picture(96, 64, seed) for seed in range(30, 38)],
        [],
        3,
    )
    assert loss.detections > 5
    assert loss.found_again is not None
    assert loss.found_again > 0.5


def test_without_training_images_nothing_is_quantized(model: onnx.ModelProto) -> None:
    with pytest.raises(InputError, match="needs training images"):
        int8_model(model, [])


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime.quantization", None)
    with pytest.raises(ConfigError, match=r"pip install 'coin-ray\[export\]'"):
        require_extra()


def test_int8_is_asked_for_on_the_command_line() -> None:
    assert parse_export(["demo", "--int8"]).int8
    assert not parse_export(["demo"]).int8
