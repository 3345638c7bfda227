"""RoIAlign in the ONNX file: one matrix product per image on small maps, where it is
several times faster, ONNX's operator on large ones.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def pool(
    graph: Graph,
    config: Detector,
    proposals: Proposals,
    maps: Sequence[tuple[str, int]],
) -> list[str]:
    """Each of ``maps``, features [B, C, h, w] of one size and a number of bins s that
    divides ``roi_size`` -> [R, C, s, s].

    At ``roi_size`` bins that is ``pool_regions``; of fewer ones each holds as many more
    samples, so it is the mean of several.
    """
    short, long = (
        -(-side // PAD) * PAD // STRIDE
        for side in (config.short_side, config.long_side)
    )
    if config.roi_samples and short * long <= SMALL_MAP:
        return _products(graph, config, proposals, maps)
    return [
        _operator(graph, config, proposals, features, side) for features, side in maps
    ]


def _operator(
    graph: Graph, config: Detector, proposals: Proposals, features: str, side: int
) -> str:
    return graph.op(
        "RoiAlign",
        features,
        proposals.boxes,
        proposals.image,
        output_height=side,
        output_width=side,
        sampling_ratio=config.roi_samples * config.roi_size // side,
        spatial_scale=1 / STRIDE,
        mode="avg",
        coordinate_transformation_mode="half_pixel",
    )


def _products(
    graph: Graph,
    config: Detector,
    proposals: Proposals,
    maps: Sequence[tuple[str, int]],
) -> list[str]:
    """Each image's proposals in rows of its own, P for all images: weights [B, P s s, h
    w] times features [B, h w, C].
    """
    place = graph.op(
        "Concat",
        *(
            graph.op("Unsqueeze", t, graph.i64(1))
            for t in (
                proposals.image,
                rank_within(graph, proposals.image, proposals.batch),
            )
        ),
        axis=1,
    )
    empty = graph.op(
        "Expand",
        graph.f32(0.0),
        graph.op(
            "Concat", proposals.batch, graph.i64(config.proposals_test, 4), axis=0
        ),
    )
    cells = graph.op(
        "Sub",
        graph.op(
            "Div",
            graph.op("ScatterND", empty, place, proposals.boxes),
            graph.f32(STRIDE),
        ),
        graph.f32(0.5),
    )
    shape = graph.op("Shape", maps[0][0])
    height, width = graph.part(shape, 2, 3, 0), graph.part(shape, 3, 4, 0)
    rows, columns = (
        _samples(graph, cells, 1, height, config),
        _samples(graph, cells, 0, width, config),
    )
    pooled = []
    for features, side in maps:
        down, across = (
            graph.op("Unsqueeze", _bins(graph, t, side), graph.i64(*axes))
            for t, axes in ((rows, (3, 5)), (columns, (2, 4)))
        )
        flat = graph.op(
            "Concat",
            proposals.batch,
            graph.i64(config.proposals_test * side * side, -1),
            axis=0,
        )
        weights = graph.op("Reshape", graph.op("Mul", down, across), flat)
        per_bin = graph.op(
            "MatMul",
            weights,
            graph.op(
                "Transpose",
                graph.op("Reshape", features, graph.i64(0, 0, -1)),
                perm=[0, 2, 1],
            ),
        )
        apart = graph.op(
            "Reshape",
            per_bin,
            graph.op(
                "Concat",
                proposals.batch,
                graph.i64(config.proposals_test, side, side, -1),
                axis=0,
            ),
        )
        pooled.append(
            graph.op("Transpose", graph.op("GatherND", apart, place), perm=[0, 3, 1, 2])
        )
    return pooled


def _samples(graph: Graph, cells: str, axis: int, size: str, config: Detector) -> str:
    """[B, P, samples, size]: how much of each cell along one axis a sample takes, by
    linear interpolation; samples of all bins.
    """
    count = config.roi_size * config.roi_samples
    start, end = (
        graph.part(cells, axis, axis + 1, 2),
        graph.part(cells, axis + 2, axis + 3, 2),
    )
    steps = graph.f32(*((i + 0.5) / count for i in range(count)))
    place = graph.op("Add", start, graph.op("Mul", graph.op("Sub", end, start), steps))
    last = graph.op("Sub", graph.cast(size, TensorProto.FLOAT), graph.f32(1.0))
    nearest = graph.op(
        "Unsqueeze",
        graph.op("Max", graph.op("Min", place, last), graph.f32(0.0)),
        graph.i64(3),
    )
    numbers = graph.cast(
        graph.op("Range", graph.scalar(0), graph.op("Squeeze", size), graph.scalar(1)),
        TensorProto.FLOAT,
    )
    near = graph.op(
        "Relu",
        graph.op(
            "Sub", graph.f32(1.0), graph.op("Abs", graph.op("Sub", nearest, numbers))
        ),
    )
    inside = graph.op(
        "LessOrEqual",
        graph.op("Abs", graph.op("Sub", place, graph.op("Mul", last, graph.f32(0.5)))),
        _reach(graph, last),
    )
    return graph.op(
        "Mul",
        near,
        graph.op("Unsqueeze", graph.cast(inside, TensorProto.FLOAT), graph.i64(3)),
    )


def _bins(graph: Graph, samples: str, side: int) -> str:
    """[B, P, samples, size] -> [B, P, side, size]: the mean of each bin's samples."""
    shape = graph.op(
        "Concat",
        graph.op("Shape", samples, start=0, end=2),
        graph.i64(side, -1),
        graph.op("Shape", samples, start=3),
        axis=0,
    )
    return graph.op(
        "ReduceMean", graph.op("Reshape", samples, shape), graph.i64(3), keepdims=0
    )


def _reach(graph: Graph, last: str) -> str:
    """Half the width of -1 .. size, in which samples count."""
    return graph.op("Add", graph.op("Mul", last, graph.f32(0.5)), graph.f32(1.0))


def rank_within(graph: Graph, image: str, batch: str) -> str:
    """[N]: how many rows before each one belong to the same image."""
    numbers = graph.op(
        "Unsqueeze",
        graph.op("Range", graph.scalar(0), graph.op("Squeeze", batch), graph.scalar(1)),
        graph.i64(0),
    )
    mine = graph.cast(
        graph.op("Equal", graph.op("Unsqueeze", image, graph.i64(1)), numbers),
        TensorProto.INT64,
    )
    before = graph.op("CumSum", mine, graph.scalar(0), exclusive=1)
    return graph.op(
        "ReduceSum", graph.op("Mul", before, mine), graph.i64(1), keepdims=0
    )
