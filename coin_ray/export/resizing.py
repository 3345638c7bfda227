"""PyTorch's antialiased bilinear resizing of 8-bit images as two matrix products: to
the last bit, or nearly.

Sums over many old pixels exceed the 24 bits of float32: of images made five to twelve
times smaller, one pixel in 10,000 to 100,000 is one grey level off.

ONNX's own Resize rounds other pixels up or down; where a score is steep, one grey level
in three thousand pixels moves it by .002. PyTorch resizes rows, rounds, resizes
columns, rounds; its weights are integers over a power of two
(``upsample_bilinear2d_aa``, uint8).
"""

from __future__ import annotations

from onnx import TensorProto

from coin_ray.export.graph import Graph

WEIGHT_BITS = 15
PRECISION_MAX = 22.0


def resize(graph: Graph, images: str, own: str, view: str) -> str:
    """``images`` float32 [B, 3, H, W] of whole numbers, ``own`` and ``view`` float64
    [2] (height, width) -> whole numbers [B, 3, h, w].
    """
    across = _weights(graph, graph.part(own, 1, 2, 0), graph.part(view, 1, 2, 0))
    down = _weights(graph, graph.part(own, 0, 1, 0), graph.part(view, 0, 1, 0))
    rows = _rounded(
        graph, graph.op("MatMul", images, graph.op("Transpose", across, perm=[1, 0]))
    )
    return _rounded(graph, graph.op("MatMul", down, rows))


def _rounded(graph: Graph, values: str) -> str:
    return graph.op(
        "Clip",
        graph.op("Floor", graph.op("Add", values, graph.f32(0.5))),
        graph.scalar_f32(0.0),
        graph.scalar_f32(255.0),
    )


def _weights(graph: Graph, own: str, view: str) -> str:
    """float32 [view, own]: triangle around each new pixel's centre, as wide as a new
    pixel but not less than an old one.
    """
    half, one = graph.f64(0.5), graph.f64(1.0)
    scale = graph.op("Div", own, view)
    places = graph.op(
        "Unsqueeze", graph.op("Add", _count(graph, own), half), graph.i64(0)
    )
    centres = graph.op(
        "Unsqueeze",
        graph.op("Mul", graph.op("Add", _count(graph, view), half), scale),
        graph.i64(1),
    )
    distance = graph.op(
        "Div",
        graph.op("Abs", graph.op("Sub", places, centres)),
        graph.op("Max", scale, one),
    )
    triangle = graph.op("Max", graph.op("Sub", one, distance), graph.f64(0.0))
    weights = graph.op(
        "Div", triangle, graph.op("ReduceSum", triangle, graph.i64(1), keepdims=1)
    )
    power = _power(graph, graph.op("ReduceMax", weights, keepdims=0))
    whole = graph.op("Floor", graph.op("Add", graph.op("Mul", weights, power), half))
    return graph.cast(graph.op("Div", whole, power), TensorProto.FLOAT)


def _power(graph: Graph, largest: str) -> str:
    """The largest power of two, up to 2 ** 22, with which the largest weight still fits
    into 16 bits with its sign.
    """
    room = graph.op("Div", graph.f64(2**WEIGHT_BITS - 0.5), largest)
    bits = graph.op(
        "Sub",
        graph.op(
            "Ceil",
            graph.op("Div", graph.op("Log", room), graph.op("Log", graph.f64(2.0))),
        ),
        graph.f64(1.0),
    )
    return graph.op(
        "Pow", graph.f64(2.0), graph.op("Min", bits, graph.f64(PRECISION_MAX))
    )


def _count(graph: Graph, length: str) -> str:
    """0, 1, ... up to a float64 length [1]."""
    numbers = graph.op(
        "Range",
        graph.scalar(0),
        graph.op("Squeeze", graph.cast(length, TensorProto.INT64)),
        graph.scalar(1),
    )
    return graph.cast(numbers, TensorProto.DOUBLE)
