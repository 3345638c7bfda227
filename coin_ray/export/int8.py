"""``model.int8.onnx``: static quantization after training, and what it costs. Needs the
extra ``export``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from PIL import Image

from coin_ray.errors import InputError

NETWORKS = ("propose/", "describe/")
PRODUCTS, BETWEEN = ("Conv", "Gemm"), ("Relu", "AveragePool")
"""Operators that are quantized, and those that then pass 8-bit numbers on."""
EXACT = (
    "rpn.objectness.weight",
    "rpn.deltas.weight",
    "head.embed.weight",
    "head.box.weight",
)
"""Weights of the last layers, which stay float32 as the first convolution does: they
take little time and move boxes and scores most."""


def int8_model(model: ModelProto, images: Iterable[Image.Image]) -> bytes:
    """``model`` with the convolutions and linear layers of both networks in 8 bits,
    weights by channel; what is around them stays float32.

    ``images``: training images; the mean range of their activations fixes the scales.
    Raises InputError if there are none.
    """
    pixels = (np.asarray(image.convert("RGB"))[None] for image in images)
    first = next(pixels, None)
    if first is None:
        raise InputError(
            "model.int8.onnx needs training images, whose activations say what 8 bits"
            " must hold; this run has none"
        )
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save(model, source)
        quantize_static(
            source,
            target,
            _Images(chain([first], pixels)),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=[*PRODUCTS, *BETWEEN, "Add"],
            nodes_to_quantize=quantized_nodes(model.graph),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"CalibMovingAverage": True},
        )
        return target.read_bytes()


def quantized_nodes(graph: GraphProto) -> list[str]:
    """Names of the networks' convolutions and linear layers but the first and the last
    ones, and of what stands between them.
    """
    before_relu = {node.input[0] for node in graph.node if node.op_type == "Relu"}
    nodes = [node for node in graph.node if node.name.startswith(NETWORKS)]
    first = next(node.name for node in nodes if node.op_type == "Conv")
    products = [
        n.name
        for n in nodes
        if n.op_type in PRODUCTS and n.name != first and not n.input[1].endswith(EXACT)
    ]
    sums = [n.name for n in nodes if n.op_type == "Add" and n.output[0] in before_relu]
    return [*products, *sums, *(n.name for n in nodes if n.op_type in BETWEEN)]


class _Images(CalibrationDataReader):  # type: ignore[misc]
    """One image at a time, as the file's input."""

    def __init__(self, pixels: Iterator[NDArray[np.uint8]]) -> None:
        self._pixels = pixels

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        found = next(self._pixels, None)
        return None if found is None else {"images": found}
