"""``model.int8.onnx``: static quantization after training. Needs the extra ``export``."""

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

from coin_ray.data.pixels import upright_rgb
from coin_ray.errors import InputError

Pixels = NDArray[np.uint8]

NETWORK_PREFIXES = ("propose/", "describe/", "network/")
QUANTIZED_PRODUCTS = ("Conv", "Gemm")
QUANTIZED_BETWEEN = ("Relu", "AveragePool")
"""Operators that pass 8-bit numbers on from one product to the next."""
FLOAT_WEIGHTS = (
    "rpn.objectness.weight",
    "rpn.deltas.weight",
    "head.embed.weight",
    "head.box.weight",
    *(
        f"head.{part}_preds.{level}.weight"
        for part in ("cls", "reg", "obj")
        for level in range(3)
    ),
)
"""Weights of the last layers, which stay float32 as the first convolution does: they
take little time and move boxes and scores most."""


def int8_model(model: ModelProto, images: Iterable[Image.Image]) -> bytes:
    """Return ``model`` with the convolutions and linear layers of both networks in 8
    bits, weights by channel; what is around them stays float32.

    ``images``: training images; the mean range of their activations fixes the scales.
    Raises InputError if there are none.
    """
    pixels = (np.asarray(upright_rgb(image))[None] for image in images)
    first_image = next(pixels, None)
    if first_image is None:
        raise InputError(
            "model.int8.onnx needs training images, whose activations fix the ranges of"
            " the 8-bit numbers; this run has none"
        )
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save(model, source)
        quantize_static(
            source,
            target,
            _CalibrationImages(chain([first_image], pixels)),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=[*QUANTIZED_PRODUCTS, *QUANTIZED_BETWEEN, "Add"],
            nodes_to_quantize=quantized_nodes(model.graph),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"CalibMovingAverage": True},
        )
        return target.read_bytes()


def quantized_nodes(graph: GraphProto) -> list[str]:
    """Return the names of the networks' convolutions and linear layers except the first
    and the last ones, and of the operators between them.
    """
    relu_inputs = {node.input[0] for node in graph.node if node.op_type == "Relu"}
    nodes = [node for node in graph.node if node.name.startswith(NETWORK_PREFIXES)]
    first_conv = next(node.name for node in nodes if node.op_type == "Conv")
    products, sums, between = [], [], []
    for node in nodes:
        if node.op_type in QUANTIZED_PRODUCTS:
            stays_float = node.input[1].endswith(FLOAT_WEIGHTS)
            if node.name != first_conv and not stays_float:
                products.append(node.name)
        elif node.op_type == "Add" and node.output[0] in relu_inputs:
            sums.append(node.name)
        elif node.op_type in QUANTIZED_BETWEEN:
            between.append(node.name)
    return [*products, *sums, *between]


class _CalibrationImages(CalibrationDataReader):  # type: ignore[misc]
    """One image at a time, as the file's input."""

    def __init__(self, pixels: Iterator[Pixels]) -> None:
        self._pixels = pixels

    def get_next(self) -> dict[str, Pixels] | None:
        pixels = next(self._pixels, None)
        return None if pixels is None else {"images": pixels}
