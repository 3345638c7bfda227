"""A detector as one ONNX file: uint8 images in, boxes in their pixels out. Needs the
extra ``export``.

The two networks come from PyTorch's exporter; resizing, padding, the choice of
proposals, RoIAlign and class-wise suppression are ONNX's own operators. B images of one
size, A anchors, R proposals of all images, K classes; limits are (w, h, w, h).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx
import torch
from onnx import ModelProto, TensorProto, helper
from torch import nn
from torch.export import Dim

from coin_ray.config import Detector
from coin_ray.data.pixels import IntensityRange, format_range
from coin_ray.export.conv_before_roialign import (
    HALVED,
    DescribeAfterConv,
    ProposeWithConv,
    can_move_conv,
)
from coin_ray.export.graph import OPSET, OnnxGraph
from coin_ray.export.networks import PAD, split_detector
from coin_ray.export.pooling import (
    ProposalTensors,
    add_rank_within_image,
    add_roi_align,
)
from coin_ray.export.resizing import (
    add_limits_and_scale,
    add_padding,
    add_resized_images,
)
from coin_ray.models.faster_rcnn_clip.model import ClipDetector

LOWEST = -1e30
"""Below every score."""
CANDIDATES_PER_PROPOSAL = 6
SIDE_MAX = 256
"""Longest side of the network's input, in units of ``PAD``."""


def onnx_model(
    detector: ClipDetector,
    classes: Sequence[str],
    intensity_range: IntensityRange | None = None,
) -> ModelProto:
    """Return the model: ``images`` [B, H, W, 3] uint8 RGB -> ``boxes`` [N, 4],
    ``scores`` [N], ``labels`` [N], ``image`` [N] in 0..B-1, ``probs`` [N, K+1].

    Rows are sorted by score over the whole batch. The class names are in the metadata,
    separated by newlines, and the range of deep grey images that it was trained on.
    """
    config = detector.config
    graph = OnnxGraph()
    mean, std = detector.mean.flatten().tolist(), detector.std.flatten().tolist()
    network_input = _add_preprocessing(graph, config, mean, std)
    networks = _export_networks(detector)
    *features, objectness, candidates = graph.embed(
        "propose", networks.propose, network_input.pixels, network_input.limits
    )
    image, proposals = _add_proposals(graph, config, objectness, candidates)
    tensors = ProposalTensors(proposals, image, network_input.batch)
    maps = list(zip(features, networks.bins, strict=True))
    pooled = add_roi_align(graph, config, tensors, maps)
    probs, boxes = graph.embed(
        "describe", networks.describe, *pooled, proposals, network_input.limits
    )
    regions = _Regions(image, boxes, probs)
    detections = _add_detections(graph, config, network_input, regions, len(classes))
    model = graph.build(
        "detector",
        [tensor_info("images", TensorProto.UINT8, "B", "H", "W", 3)],
        _output_infos(detections, len(classes)),
    )
    metadata = {"classes": "\n".join(classes), "score_min": str(config.score_min)}
    if intensity_range is not None:
        metadata["intensity_range"] = format_range(intensity_range)
    helper.set_model_props(model, metadata)
    return model


@dataclass(frozen=True)
class _NetworkInput:
    """Names of tensors. ``pixels`` [B, 3, h, w] normalised and padded, ``limits`` [4],
    ``scale`` [4] from network input to image, ``batch`` [1].
    """

    pixels: str
    limits: str
    scale: str
    batch: str


def _add_preprocessing(
    graph: OnnxGraph, config: Detector, mean: list[float], std: list[float]
) -> _NetworkInput:
    """Add resizing to short side ``short_side``, long side at most ``long_side``, and
    zeros at the right and bottom up to multiples of 32.
    """
    resized = add_resized_images(graph, config.short_side, config.long_side)
    normalised = _add_normalisation(graph, resized.pixels, mean, std)
    pixels = graph.op("Pad", normalised, add_padding(graph, resized.size, PAD))
    limits_f32, scale = add_limits_and_scale(graph, resized)
    return _NetworkInput(pixels, limits_f32, scale, resized.batch)


def _add_normalisation(
    graph: OnnxGraph, pixels: str, mean: list[float], std: list[float]
) -> str:
    scaled = graph.op("Div", pixels, graph.f32(255.0))
    channel_shape = graph.i64(1, 3, 1, 1)
    channel_mean = graph.op("Reshape", graph.f32(*mean), channel_shape)
    centred = graph.op("Sub", scaled, channel_mean)
    channel_std = graph.op("Reshape", graph.f32(*std), channel_shape)
    return graph.op("Div", centred, channel_std)


def _add_proposals(
    graph: OnnxGraph, config: Detector, objectness: str, candidates: str
) -> tuple[str, str]:
    """Add the proposals of all images, image [R] and boxes [R, 4], chosen as
    ``RegionProposalNetwork`` does.
    """
    limit = config.proposals_test
    anchors = graph.op("Shape", objectness, start=1, end=2)
    count = graph.op("Min", anchors, graph.i64(CANDIDATES_PER_PROPOSAL * limit))
    scores, best = graph.op_many("TopK", 2, objectness, count, axis=1)
    best_column = graph.unsqueeze(best, 2)
    best_rows = graph.op("Tile", best_column, graph.i64(1, 1, 4))
    boxes = graph.op("GatherElements", candidates, best_rows, axis=1)
    bottom_right = graph.slice_axis(boxes, 2, 4, 2)
    size = graph.op("Sub", bottom_right, graph.slice_axis(boxes, 0, 2, 2))
    shortest = graph.op("ReduceMin", size, graph.i64(2), keepdims=0)
    is_small = graph.op("Less", shortest, graph.f32(1.0))
    excluded = graph.f32(2 * LOWEST)
    large_scores = graph.unsqueeze(graph.op("Where", is_small, excluded, scores), 1)
    selected = graph.op(
        "NonMaxSuppression",
        boxes,
        large_scores,
        graph.i64(limit),
        graph.f32(config.rpn_nms),
        graph.f32(LOWEST),
    )
    image = graph.squeeze(graph.slice_axis(selected, 0, 1, 1), 1)
    image_column = graph.slice_axis(selected, 0, 1, 1)
    box_column = graph.slice_axis(selected, 2, 3, 1)
    indices = graph.concat(image_column, box_column, axis=1)
    return image, graph.op("GatherND", boxes, indices)


@dataclass(frozen=True)
class _Regions:
    """Names of tensors. ``image`` [R], ``boxes`` [R, 4], ``probs`` [R, K+1]."""

    image: str
    boxes: str
    probs: str


@dataclass(frozen=True)
class _DetectionTensors:
    """Names of the output tensors."""

    boxes: str
    scores: str
    labels: str
    image: str
    probs: str


def _add_detections(
    graph: OnnxGraph,
    config: Detector,
    network_input: _NetworkInput,
    regions: _Regions,
    classes: int,
) -> _DetectionTensors:
    """Add class-wise suppression in each image: to the operator each pair of an image
    and a class is a class of its own.
    """
    selected = _add_suppression(graph, config, network_input, regions, classes)
    pair = graph.squeeze(graph.slice_axis(selected, 1, 2, 1), 1)
    region = graph.squeeze(graph.slice_axis(selected, 2, 3, 1), 1)
    label = graph.op("Mod", pair, graph.i64(classes))
    region_column, label_column = graph.unsqueeze(region, 1), graph.unsqueeze(label, 1)
    indices = graph.concat(region_column, label_column, axis=1)
    score = graph.op("GatherND", regions.probs, indices)
    count = graph.op("Shape", score)
    sorted_scores, order = graph.op_many("TopK", 2, score, count, axis=0)
    image = graph.op("Div", pair, graph.i64(classes))
    sorted_image = graph.op("Gather", image, order)
    rank = add_rank_within_image(graph, sorted_image, network_input.batch)
    is_within = graph.op("Less", rank, graph.i64(config.detections))
    order = graph.op("Compress", order, is_within, axis=0)
    scores = graph.op("Compress", sorted_scores, is_within, axis=0)
    images = graph.op("Compress", sorted_image, is_within, axis=0)
    region = graph.op("Gather", region, order)
    labels = graph.op("Gather", label, order)
    boxes = graph.op("Gather", regions.boxes, region)
    scaled = graph.op("Mul", boxes, network_input.scale)
    probs = graph.op("Gather", regions.probs, region)
    return _DetectionTensors(scaled, scores, labels, images, probs)


def _add_suppression(
    graph: OnnxGraph,
    config: Detector,
    network_input: _NetworkInput,
    regions: _Regions,
    classes: int,
) -> str:
    """Add the selected (0, image x K + class, region) [M, 3]."""
    image_numbers = graph.unsqueeze(graph.arange(network_input.batch), 1)
    region_images = graph.unsqueeze(regions.image, 0)
    belongs = graph.op("Equal", image_numbers, region_images)
    class_probs = graph.slice_axis(regions.probs, 0, classes, 1)
    foreground = graph.op("Transpose", class_probs, perm=[1, 0])
    condition = graph.unsqueeze(belongs, 1)
    scores = graph.unsqueeze(foreground, 0)
    masked = graph.op("Where", condition, scores, graph.f32(-1.0))
    leading = graph.i64(1, -1)
    shape = graph.concat(leading, graph.op("Shape", regions.image), axis=0)
    pair_scores = graph.op("Reshape", masked, shape)
    no_limit = graph.op("Shape", regions.image)
    return graph.op(
        "NonMaxSuppression",
        graph.unsqueeze(regions.boxes, 0),
        pair_scores,
        no_limit,
        graph.f32(config.nms),
        graph.f32(config.score_min),
    )


def _output_infos(
    detections: _DetectionTensors, classes: int
) -> dict[str, onnx.ValueInfoProto]:
    return {
        detections.boxes: tensor_info("boxes", TensorProto.FLOAT, "N", 4),
        detections.scores: tensor_info("scores", TensorProto.FLOAT, "N"),
        detections.labels: tensor_info("labels", TensorProto.INT64, "N"),
        detections.image: tensor_info("image", TensorProto.INT64, "N"),
        detections.probs: tensor_info("probs", TensorProto.FLOAT, "N", classes + 1),
    }


def tensor_info(name: str, kind: int, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


@dataclass(frozen=True)
class _Networks:
    """``propose`` -> maps, objectness, boxes; ``bins``: into how many a side each of
    the maps is pooled for ``describe``.
    """

    propose: ModelProto
    describe: ModelProto
    bins: tuple[int, ...]


def _export_networks(detector: ClipDetector) -> _Networks:
    propose, describe = split_detector(detector)
    side, channels = detector.config.roi_size, describe.tower.shared_channels
    if can_move_conv(describe.tower, detector.config):
        propose_with_conv = ProposeWithConv(propose, describe)
        describe_after_conv = DescribeAfterConv(describe)
        pooled_shapes = propose_with_conv.pooled_shapes(side)
        return _Networks(
            _export_propose(propose_with_conv),
            _export_describe(describe_after_conv, pooled_shapes),
            (side, side // HALVED),
        )
    return _Networks(
        _export_propose(propose),
        _export_describe(describe, [(channels, side)]),
        (side,),
    )


def _export_propose(network: nn.Module) -> ModelProto:
    pixels = torch.zeros(2, 3, 3 * PAD, 4 * PAD)
    limits = torch.tensor([128.0, 96.0, 128.0, 96.0])
    pixel_shape = {
        0: Dim.DYNAMIC,
        2: PAD * Dim("rows", min=1, max=SIDE_MAX),
        3: PAD * Dim("columns", min=1, max=SIDE_MAX),
    }
    return export_network(network.eval(), (pixels, limits), (pixel_shape, None))


def _export_describe(
    network: nn.Module, pooled_shapes: Sequence[tuple[int, int]]
) -> ModelProto:
    """Export with ``pooled_shapes``: channels and bins a side of each input."""
    pooled = [torch.zeros(5, channels, side, side) for channels, side in pooled_shapes]
    examples = (*pooled, torch.zeros(5, 4), torch.ones(4))
    regions = Dim("regions")
    shapes = (*({0: regions} for _ in pooled), {0: regions}, None)
    return export_network(network.eval(), examples, shapes)


def export_network(
    network: nn.Module, examples: tuple[torch.Tensor, ...], shapes: tuple[object, ...]
) -> ModelProto:
    program = torch.onnx.export(
        network,
        examples,
        dynamic_shapes=shapes,
        dynamo=True,
        opset_version=OPSET,
        verbose=False,
    )
    assert program is not None
    return program.model_proto
