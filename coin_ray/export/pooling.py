"""RoIAlign in the ONNX file: one matrix product per image on small maps, where it is
several times faster, ONNX's operator on large ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnx import TensorProto

from coin_ray.config import Detector
from coin_ray.export.graph import OnnxGraph
from coin_ray.export.networks import PAD
from coin_ray.models.faster_rcnn_clip.model import STRIDE
from coin_ray.models.faster_rcnn_clip.pooling import SMALL_MAP


@dataclass(frozen=True)
class ProposalTensors:
    """Names of tensors: ``boxes`` [R, 4], ``image`` [R] ascending, ``batch`` [1]."""

    boxes: str
    image: str
    batch: str


def add_roi_align(
    graph: OnnxGraph,
    config: Detector,
    proposals: ProposalTensors,
    maps: Sequence[tuple[str, int]],
) -> list[str]:
    """Add the pooling of each of ``maps``, features [B, C, h, w] of one size and a
    number of bins s that divides ``roi_size`` -> [R, C, s, s].

    With ``roi_size`` bins that is ``pool_regions``; with fewer, each bin has as many
    more samples, so it is the mean of several.
    """
    short, long = (
        -(-side // PAD) * PAD // STRIDE
        for side in (config.short_side, config.long_side)
    )
    if config.roi_samples and short * long <= SMALL_MAP:
        return _add_products(graph, config, proposals, maps)
    return [
        _add_operator(graph, config, proposals, features, side)
        for features, side in maps
    ]


def _add_operator(
    graph: OnnxGraph,
    config: Detector,
    proposals: ProposalTensors,
    features: str,
    side: int,
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


@dataclass(frozen=True)
class _SampleWeights:
    """Names of tensors: ``rows`` [B, P, samples, h], ``columns`` [B, P, samples, w],
    ``indices`` [R, 2] of each proposal's image and its rank there, ``batch`` [1].
    """

    rows: str
    columns: str
    indices: str
    batch: str


def _add_products(
    graph: OnnxGraph,
    config: Detector,
    proposals: ProposalTensors,
    maps: Sequence[tuple[str, int]],
) -> list[str]:
    """Add the pooling as products: each image's proposals in rows of its own, P for all
    images, and weights [B, P s s, h w] times features [B, h w, C].
    """
    rank = add_rank_within_image(graph, proposals.image, proposals.batch)
    image_column = graph.unsqueeze(proposals.image, 1)
    indices = graph.concat(image_column, graph.unsqueeze(rank, 1), axis=1)
    zero = graph.f32(0.0)
    shape = graph.concat(proposals.batch, graph.i64(config.proposals_test, 4), axis=0)
    no_boxes = graph.op("Expand", zero, shape)
    boxes = graph.op("ScatterND", no_boxes, indices, proposals.boxes)
    in_cells = graph.op("Div", boxes, graph.f32(STRIDE))
    cells = graph.op("Sub", in_cells, graph.f32(0.5))
    map_shape = graph.op("Shape", maps[0][0])
    height = graph.slice_axis(map_shape, 2, 3, 0)
    width = graph.slice_axis(map_shape, 3, 4, 0)
    rows = _add_samples(graph, cells, 1, height, config)
    columns = _add_samples(graph, cells, 0, width, config)
    weights = _SampleWeights(rows, columns, indices, proposals.batch)
    return [
        _add_product(graph, config, weights, features, side) for features, side in maps
    ]


def _add_product(
    graph: OnnxGraph,
    config: Detector,
    weights: _SampleWeights,
    features: str,
    side: int,
) -> str:
    down = graph.unsqueeze(_add_bins(graph, weights.rows, side), 3, 5)
    across = graph.unsqueeze(_add_bins(graph, weights.columns, side), 2, 4)
    bin_count = config.proposals_test * side * side
    flat_shape = graph.concat(weights.batch, graph.i64(bin_count, -1), axis=0)
    bin_weights = graph.op("Reshape", graph.op("Mul", down, across), flat_shape)
    flat_features = graph.op("Reshape", features, graph.i64(0, 0, -1))
    channels_last = graph.op("Transpose", flat_features, perm=[0, 2, 1])
    per_bin = graph.op("MatMul", bin_weights, channels_last)
    sides = graph.i64(config.proposals_test, side, side, -1)
    proposal_shape = graph.concat(weights.batch, sides, axis=0)
    per_proposal = graph.op("Reshape", per_bin, proposal_shape)
    gathered = graph.op("GatherND", per_proposal, weights.indices)
    return graph.op("Transpose", gathered, perm=[0, 3, 1, 2])


def _add_samples(
    graph: OnnxGraph, cells: str, axis: int, size: str, config: Detector
) -> str:
    """Add [B, P, samples, size]: the weight of each cell along one axis in each sample,
    by linear interpolation; samples of all bins.
    """
    count = config.roi_size * config.roi_samples
    start = graph.slice_axis(cells, axis, axis + 1, 2)
    end = graph.slice_axis(cells, axis + 2, axis + 3, 2)
    steps = graph.f32(*((i + 0.5) / count for i in range(count)))
    extent = graph.op("Sub", end, start)
    positions = graph.op("Add", start, graph.op("Mul", extent, steps))
    last = graph.op("Sub", graph.cast(size, TensorProto.FLOAT), graph.f32(1.0))
    not_beyond = graph.op("Min", positions, last)
    clamped = graph.unsqueeze(graph.op("Max", not_beyond, graph.f32(0.0)), 3)
    cell_numbers = graph.cast(graph.arange(size), TensorProto.FLOAT)
    unit = graph.f32(1.0)
    distance = graph.op("Abs", graph.op("Sub", clamped, cell_numbers))
    weights = graph.op("Relu", graph.op("Sub", unit, distance))
    centre = graph.op("Mul", last, graph.f32(0.5))
    from_centre = graph.op("Abs", graph.op("Sub", positions, centre))
    is_inside = graph.op("LessOrEqual", from_centre, _add_reach(graph, last))
    mask = graph.unsqueeze(graph.cast(is_inside, TensorProto.FLOAT), 3)
    return graph.op("Mul", weights, mask)


def _add_bins(graph: OnnxGraph, samples: str, side: int) -> str:
    """Add [B, P, samples, size] -> [B, P, side, size]: the mean of each bin's samples."""
    leading = graph.op("Shape", samples, start=0, end=2)
    bins = graph.i64(side, -1)
    shape = graph.concat(leading, bins, graph.op("Shape", samples, start=3), axis=0)
    per_bin = graph.op("Reshape", samples, shape)
    return graph.op("ReduceMean", per_bin, graph.i64(3), keepdims=0)


def _add_reach(graph: OnnxGraph, last: str) -> str:
    """Add half the width of -1 .. size, in which samples count."""
    half = graph.op("Mul", last, graph.f32(0.5))
    return graph.op("Add", half, graph.f32(1.0))


def add_rank_within_image(graph: OnnxGraph, image: str, batch: str) -> str:
    """Add [N]: how many earlier rows belong to the same image."""
    image_numbers = graph.unsqueeze(graph.arange(batch), 0)
    is_same = graph.op("Equal", graph.unsqueeze(image, 1), image_numbers)
    belongs = graph.cast(is_same, TensorProto.INT64)
    earlier = graph.op("CumSum", belongs, graph.scalar(0), exclusive=1)
    ranks = graph.op("Mul", earlier, belongs)
    return graph.op("ReduceSum", ranks, graph.i64(1), keepdims=0)
