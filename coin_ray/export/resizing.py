"""PyTorch's antialiased bilinear resizing of 8-bit images as two matrix products, equal
to the last bit or nearly so.

Sums over many source pixels exceed the 24 bits of float32: in images made five to twelve
times smaller, one pixel in 10,000 to 100,000 is one grey level off.

ONNX's own Resize rounds other pixels up or down; where a score is steep, one grey level
in three thousand pixels moves it by .002. PyTorch resizes rows, rounds, resizes
columns, rounds; its weights are integers over a power of two
(``upsample_bilinear2d_aa``, uint8).
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx import TensorProto

from coin_ray.export.graph import OnnxGraph

WEIGHT_BITS = 15
PRECISION_MAX = 22.0


@dataclass(frozen=True)
class ResizedImages:
    """Names of tensors. ``pixels`` float32 [B, 3, h, w] of whole numbers, ``batch``
    [1]; ``image_size`` and ``size`` float64 [2] (height, width) before and after.
    """

    pixels: str
    batch: str
    image_size: str
    size: str


def add_resized_images(
    graph: OnnxGraph, short_side: int, long_side: int, *, keep_ratio: bool = True
) -> ResizedImages:
    """Add resizing of the input ``images`` uint8 [B, H, W, 3] to short side
    ``short_side``, long side at most ``long_side``; without ``keep_ratio`` to a square
    of ``long_side``.
    """
    shape = graph.op("Shape", "images")
    batch = graph.slice_axis(shape, 0, 1, 0)
    image_size = graph.cast(graph.slice_axis(shape, 1, 3, 0), TensorProto.DOUBLE)
    if keep_ratio:
        size = _add_resized_size(graph, short_side, long_side, image_size)
    else:
        size = graph.f64(long_side, long_side)
    transposed = graph.op("Transpose", "images", perm=[0, 3, 1, 2])
    channels_first = graph.cast(transposed, TensorProto.FLOAT)
    is_equal = graph.cast(graph.op("Equal", image_size, size), TensorProto.INT64)
    all_equal = graph.op("ReduceMin", is_equal, keepdims=0)
    resized = graph.if_else(
        graph.cast(all_equal, TensorProto.BOOL),
        lambda: channels_first,
        lambda: add_resize(graph, channels_first, image_size, size),
        TensorProto.FLOAT,
        (None, 3, None, None),
    )
    return ResizedImages(resized, batch, image_size, size)


def add_padding(graph: OnnxGraph, size: str, multiple: int) -> str:
    """Add the pads [8] that bring images of ``size`` (float64 [2]) at the right and
    bottom to multiples of ``multiple``.
    """
    whole_size = graph.cast(size, TensorProto.INT64)
    beyond = graph.op("Mod", graph.op("Neg", whole_size), graph.i64(multiple))
    return graph.concat(graph.i64(0, 0, 0, 0, 0, 0), beyond, axis=0)


def add_limits_and_scale(graph: OnnxGraph, resized: ResizedImages) -> tuple[str, str]:
    """Add the limits (w, h, w, h) of boxes in the resized image, and their scale to the
    image, float32 [4] each.
    """
    limits = graph.op("Gather", resized.size, graph.i64(1, 0, 1, 0))
    image_limits = graph.op("Gather", resized.image_size, graph.i64(1, 0, 1, 0))
    limits_f32 = graph.cast(limits, TensorProto.FLOAT)
    scale = graph.cast(graph.op("Div", image_limits, limits), TensorProto.FLOAT)
    return limits_f32, scale


def _add_resized_size(
    graph: OnnxGraph, short_side: int, long_side: int, image_size: str
) -> str:
    """Add the size [2] of the resized image, as float64."""
    shortest = graph.op("ReduceMin", image_size, keepdims=1)
    short_factor = graph.op("Div", graph.f64(short_side), shortest)
    longest = graph.op("ReduceMax", image_size, keepdims=1)
    long_factor = graph.op("Div", graph.f64(long_side), longest)
    factor = graph.op("Min", short_factor, long_factor)
    rounded = graph.op("Round", graph.op("Mul", image_size, factor))
    return graph.op("Max", rounded, graph.f64(1.0))


def add_resize(
    graph: OnnxGraph, images: str, source_size: str, target_size: str
) -> str:
    """Add ``images`` float32 [B, 3, H, W] of whole numbers -> whole numbers [B, 3, h,
    w]; sizes are float64 [2] (height, width).
    """
    across = _add_weights(
        graph,
        graph.slice_axis(source_size, 1, 2, 0),
        graph.slice_axis(target_size, 1, 2, 0),
    )
    down = _add_weights(
        graph,
        graph.slice_axis(source_size, 0, 1, 0),
        graph.slice_axis(target_size, 0, 1, 0),
    )
    transposed = graph.op("Transpose", across, perm=[1, 0])
    rows = _add_rounding(graph, graph.op("MatMul", images, transposed))
    return _add_rounding(graph, graph.op("MatMul", down, rows))


def _add_rounding(graph: OnnxGraph, pixels: str) -> str:
    rounded = graph.op("Floor", graph.op("Add", pixels, graph.f32(0.5)))
    return graph.op("Clip", rounded, graph.scalar_f32(0.0), graph.scalar_f32(255.0))


def _add_weights(graph: OnnxGraph, source: str, target: str) -> str:
    """Add weights float32 [target, source] for two lengths: a triangle around each
    target pixel's centre, as wide as a target pixel but not less than a source pixel.
    """
    half, unit = graph.f64(0.5), graph.f64(1.0)
    scale = graph.op("Div", source, target)
    source_centres = graph.op("Add", _add_count(graph, source), half)
    source_row = graph.unsqueeze(source_centres, 0)
    target_centres = graph.op("Add", _add_count(graph, target), half)
    target_column = graph.unsqueeze(graph.op("Mul", target_centres, scale), 1)
    distance = graph.op("Abs", graph.op("Sub", source_row, target_column))
    relative = graph.op("Div", distance, graph.op("Max", scale, unit))
    triangle = graph.op("Max", graph.op("Sub", unit, relative), graph.f64(0.0))
    total = graph.op("ReduceSum", triangle, graph.i64(1), keepdims=1)
    weights = graph.op("Div", triangle, total)
    power = _add_power(graph, graph.op("ReduceMax", weights, keepdims=0))
    rounded = graph.op("Add", graph.op("Mul", weights, power), half)
    whole = graph.op("Floor", rounded)
    return graph.cast(graph.op("Div", whole, power), TensorProto.FLOAT)


def _add_power(graph: OnnxGraph, largest: str) -> str:
    """Add the largest power of two, up to 2 ** 22, with which the largest weight still
    fits into 16 bits with its sign.
    """
    limit = graph.op("Div", graph.f64(2**WEIGHT_BITS - 0.5), largest)
    numerator = graph.op("Log", limit)
    log2 = graph.op("Div", numerator, graph.op("Log", graph.f64(2.0)))
    bits = graph.op("Sub", graph.op("Ceil", log2), graph.f64(1.0))
    base = graph.f64(2.0)
    exponent = graph.op("Min", bits, graph.f64(PRECISION_MAX))
    return graph.op("Pow", base, exponent)


def _add_count(graph: OnnxGraph, length: str) -> str:
    """Add 0, 1, ... up to a float64 length [1]."""
    start = graph.scalar(0)
    limit = graph.squeeze(graph.cast(length, TensorProto.INT64))
    numbers = graph.op("Range", start, limit, graph.scalar(1))
    return graph.cast(numbers, TensorProto.DOUBLE)
