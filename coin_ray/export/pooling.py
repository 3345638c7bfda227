"""RoIAlign in the ONNX file: one matrix product per image on small maps, where it is several times faster, ONNX's operator on large ones."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import TensorProto

from coin_ray.config import Detector
from coin_ray.export.graph import Graph
from coin_ray.export.networks import PAD
from coin_ray.models.faster_rcnn_clip.model import STRIDE
from coin_ray.models.faster_rcnn_clip.pooling import SMALL_MAP


@dataclass(frozen=True)
class Proposals:
    """Names of tensors: ``boxes`` [R, 4], ``image`` [R] ascending, ``batch`` [1]."""

    boxes: str
    image: str
    batch: str


def pool(graph: Graph, config: Detector, features: str, proposals: Proposals) -> str:
    """features [B, C, h, w] -> [R, C, s, s], as ``pool_regions`` does."""
    short, long = (-(-side // PAD) * PAD // STRIDE for side in (config.short_side, config.long_side))
    if config.roi_samples and short * long <= SMALL_MAP:
        return _products(graph, config, features, proposals)
    return graph.op(
        "RoiAlign",
        features,
        proposals.boxes,
        proposals.image,
        output_height=config.roi_size,
        output_width=config.roi_size,
        sampling_ratio=config.roi_samples,
        spatial_scale=1 / STRIDE,
        mode="avg",
        coordinate_transformation_mode="half_pixel",
    )


def _products(graph: Graph, config: Detector, features: str, proposals: Proposals) -> str:
    """Each image's proposals in rows of its own, P for all images: weights [B, P s s, h w] times features [B, h w, C]."""
    side, limit = config.roi_size, config.proposals_test
    place = graph.op(
        "Concat",
        *(graph.op("Unsqueeze", t, graph.i64(1)) for t in (proposals.image, rank_within(graph, proposals.image, proposals.batch))),
        axis=1,
    )
    empty = graph.op("Expand", graph.f32(0.0), graph.op("Concat", proposals.batch, graph.i64(limit, 4), axis=0))
    cells = graph.op("Sub", graph.op("Div", graph.op("ScatterND", empty, place, proposals.boxes), graph.f32(STRIDE)), graph.f32(0.5))
    shape = graph.op("Shape", features)
    height, width, channels = graph.part(shape, 2, 3, 0), graph.part(shape, 3, 4, 0), graph.part(shape, 1, 2, 0)
    rows = graph.op("Unsqueeze", _bins(graph, cells, 1, height, config), graph.i64(3, 5))
    columns = graph.op("Unsqueeze", _bins(graph, cells, 0, width, config), graph.i64(2, 4))
    area = graph.op("Mul", height, width)
    flat = graph.op("Concat", proposals.batch, graph.i64(limit * side * side), area, axis=0)
    weights = graph.op("Reshape", graph.op("Mul", rows, columns), flat)
    maps = graph.op("Reshape", features, graph.op("Concat", proposals.batch, channels, area, axis=0))
    pooled = graph.op("MatMul", weights, graph.op("Transpose", maps, perm=[0, 2, 1]))
    apart = graph.op("Reshape", pooled, graph.op("Concat", proposals.batch, graph.i64(limit, side, side), channels, axis=0))
    return graph.op("Transpose", graph.op("GatherND", apart, place), perm=[0, 3, 1, 2])


def _bins(graph: Graph, cells: str, axis: int, size: str, config: Detector) -> str:
    """[B, P, s, size]: how much of each cell along one axis a bin of each box takes, by linear interpolation at its samples."""
    side, samples = config.roi_size, config.roi_samples
    start, end = graph.part(cells, axis, axis + 1, 2), graph.part(cells, axis + 2, axis + 3, 2)
    steps = graph.f32(*((i + 0.5) / (side * samples) for i in range(side * samples)))
    place = graph.op("Add", start, graph.op("Mul", graph.op("Sub", end, start), steps))
    last = graph.op("Sub", graph.cast(size, TensorProto.FLOAT), graph.f32(1.0))
    nearest = graph.op("Unsqueeze", graph.op("Max", graph.op("Min", place, last), graph.f32(0.0)), graph.i64(3))
    numbers = graph.cast(graph.op("Range", graph.scalar(0), graph.op("Squeeze", size), graph.scalar(1)), TensorProto.FLOAT)
    near = graph.op("Relu", graph.op("Sub", graph.f32(1.0), graph.op("Abs", graph.op("Sub", nearest, numbers))))
    inside = graph.op("LessOrEqual", graph.op("Abs", graph.op("Sub", place, graph.op("Mul", last, graph.f32(0.5)))), _reach(graph, last))
    used = graph.op("Mul", near, graph.op("Unsqueeze", graph.cast(inside, TensorProto.FLOAT), graph.i64(3)))
    apart = graph.op("Reshape", used, graph.op("Concat", graph.i64(0, 0, side, samples), size, axis=0))
    return graph.op("ReduceMean", apart, graph.i64(3), keepdims=0)


def _reach(graph: Graph, last: str) -> str:
    """Half the width of -1 .. size, in which samples count."""
    return graph.op("Add", graph.op("Mul", last, graph.f32(0.5)), graph.f32(1.0))


def rank_within(graph: Graph, image: str, batch: str) -> str:
    """[N]: how many rows before each one belong to the same image."""
    numbers = graph.op("Unsqueeze", graph.op("Range", graph.scalar(0), graph.op("Squeeze", batch), graph.scalar(1)), graph.i64(0))
    mine = graph.cast(graph.op("Equal", graph.op("Unsqueeze", image, graph.i64(1)), numbers), TensorProto.INT64)
    before = graph.op("CumSum", mine, graph.scalar(0), exclusive=1)
    return graph.op("ReduceSum", graph.op("Mul", before, mine), graph.i64(1), keepdims=0)
