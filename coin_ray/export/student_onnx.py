"""A student that was a detector before as one ONNX file with the signature of
``coin_ray.export.onnx_model``. Needs the extra ``export``.

The network comes from PyTorch's exporter; resizing, padding and class-wise suppression
are ONNX's own operators. B images of one size, A boxes an image, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from onnx import ModelProto, TensorProto, helper
from torch import nn
from torch.export import Dim

from coin_ray.data.pixels import IntensityRange, format_range
from coin_ray.export.graph import OnnxGraph
from coin_ray.export.onnx_model import export_network, tensor_info
from coin_ray.export.pooling import add_rank_within_image
from coin_ray.export.resizing import (
    add_limits_and_scale,
    add_padding,
    add_resized_images,
)
from coin_ray.export.student_network import StudentNetwork, export_copy
from coin_ray.models.students.base import DetectorStudent, InputFormat, PostProcess
from coin_ray.models.students.detection import BRIGHTNESS_WEIGHTS, MIN_SIDE
from coin_ray.models.students.transformers_student import without_shape_checks

SIDE_MAX = 256
"""Longest side of the network's input, in units of its ``multiple``."""


def student_onnx_model(
    student: DetectorStudent,
    classes: Sequence[str],
    intensity_range: IntensityRange | None = None,
) -> ModelProto:
    """Return the model: ``images`` [B, H, W, 3] uint8 RGB -> ``boxes`` [N, 4],
    ``scores`` [N], ``labels`` [N], ``image`` [N] in 0..B-1, ``probs`` [N, K+1], as
    ``onnx_model`` does.
    """
    graph = OnnxGraph()
    input_format, settings = student.input_format, student.post_process
    side = input_format.side
    resized = add_resized_images(graph, side, side, keep_ratio=input_format.keep_ratio)
    padding = add_padding(graph, resized.size, input_format.multiple)
    pad_value = graph.scalar_f32(input_format.pad_value)
    padded = graph.op("Pad", resized.pixels, padding, pad_value)
    pixels = _add_normalisation(graph, padded, input_format)
    boxes, scores = graph.embed("network", _export_student(student), pixels)
    limits, scale = add_limits_and_scale(graph, resized)
    above_zero = graph.op("Max", boxes, graph.f32(0.0))
    clipped = graph.op("Min", above_zero, limits)
    selected = _add_suppression(graph, clipped, scores, settings)
    detections = _add_detections(
        graph, _Candidates(clipped, scores, selected, resized.batch), settings
    )
    model = graph.build(
        "detector",
        [tensor_info("images", TensorProto.UINT8, "B", "H", "W", 3)],
        {
            graph.op("Mul", detections.boxes, scale): tensor_info(
                "boxes", TensorProto.FLOAT, "N", 4
            ),
            detections.scores: tensor_info("scores", TensorProto.FLOAT, "N"),
            detections.labels: tensor_info("labels", TensorProto.INT64, "N"),
            detections.image: tensor_info("image", TensorProto.INT64, "N"),
            detections.probs: tensor_info(
                "probs", TensorProto.FLOAT, "N", len(classes) + 1
            ),
        },
    )
    metadata = {"classes": "\n".join(classes), "score_min": str(settings.score_min)}
    if intensity_range is not None:
        metadata["intensity_range"] = format_range(intensity_range)
    helper.set_model_props(model, metadata)
    return model


def _add_normalisation(graph: OnnxGraph, pixels: str, input_format: InputFormat) -> str:
    """Add what ``normalise_pixels`` does with pixels [B, 3, h, w]."""
    if input_format.rendering != "plain":
        weights = _add_channels(graph, BRIGHTNESS_WEIGHTS)
        weighted = graph.op("Mul", pixels, weights)
        brightness = graph.op("ReduceSum", weighted, graph.i64(1), keepdims=1)
        pixels = graph.op("Expand", brightness, graph.i64(1, 3, 1, 1))
        if input_format.rendering == "inverted":
            pixels = graph.op("Sub", graph.f32(255.0), pixels)
    if any(input_format.mean) or set(input_format.std) != {1.0}:
        mean = _add_channels(graph, input_format.mean)
        std = _add_channels(graph, input_format.std)
        pixels = graph.op("Div", graph.op("Sub", pixels, mean), std)
    if input_format.bgr:
        pixels = graph.op("Gather", pixels, graph.i64(2, 1, 0), axis=1)
    return pixels


def _add_channels(graph: OnnxGraph, numbers: Sequence[float]) -> str:
    """Add a number for each channel, [1, 3, 1, 1]."""
    return graph.constant(np.array(numbers, np.float32).reshape(1, 3, 1, 1))


def _export_student(student: DetectorStudent) -> ModelProto:
    """Return pixels [B, 3, h, w] -> boxes [B, A, 4], scores [B, A, K]."""
    network = StudentNetwork(export_copy(student)).eval()
    input_format = student.input_format
    multiple = input_format.multiple
    if input_format.keep_ratio:
        sides = 3 * multiple, 4 * multiple
        shape = {
            0: Dim.DYNAMIC,
            2: multiple * Dim("rows", min=1, max=SIDE_MAX),
            3: multiple * Dim("columns", min=1, max=SIDE_MAX),
        }
    else:
        side = input_format.side + -input_format.side % multiple
        sides, shape = (side, side), {0: Dim.DYNAMIC}
    pixels = torch.zeros(2, 3, *sides)
    with without_shape_checks():
        return export_network(cast("nn.Module", network), (pixels,), (shape,))


@dataclass(frozen=True)
class _Candidates:
    """Names of tensors. ``boxes`` [B, A, 4], ``scores`` [B, A, K], ``selected`` [M, 3]
    (image, class, box), ``batch`` [1].
    """

    boxes: str
    scores: str
    selected: str
    batch: str


@dataclass(frozen=True)
class _DetectionTensors:
    """Names of the output tensors; ``boxes`` in the resized image."""

    boxes: str
    scores: str
    labels: str
    image: str
    probs: str


def _add_suppression(
    graph: OnnxGraph, boxes: str, scores: str, settings: PostProcess
) -> str:
    """Add the selected (image, class, box) [M, 3] of class-wise suppression."""
    limits = (
        graph.op("Shape", scores, start=1, end=2),
        graph.f32(settings.nms),
        graph.f32(settings.score_min),
    )
    has_area = _add_has_area(graph, boxes)
    if not settings.best_class_only:
        column = graph.unsqueeze(has_area, 2)
        likely = graph.op("Where", column, scores, graph.f32(0.0))
        by_class = graph.op("Transpose", likely, perm=[0, 2, 1])
        return graph.op("NonMaxSuppression", boxes, by_class, *limits)
    # one class a box: boxes of different classes are moved apart, which is much faster
    label = graph.op("ArgMax", scores, axis=2, keepdims=1)
    best = graph.op("ReduceMax", scores, graph.i64(2), keepdims=0)
    best = graph.op("Where", has_area, best, graph.f32(0.0))
    farthest = graph.op("ReduceMax", boxes, keepdims=0)
    distance = graph.op("Add", farthest, graph.scalar_f32(1.0))
    offset = graph.op("Mul", graph.cast(label, TensorProto.FLOAT), distance)
    apart = graph.op("Add", boxes, offset)
    selected = graph.op("NonMaxSuppression", apart, graph.unsqueeze(best, 1), *limits)
    image = graph.slice_axis(selected, 0, 1, 1)
    box = graph.slice_axis(selected, 2, 3, 1)
    rows = graph.concat(image, box, axis=1)
    return graph.concat(image, graph.op("GatherND", label, rows), box, axis=1)


def _add_has_area(graph: OnnxGraph, boxes: str) -> str:
    """Add whether boxes [B, A, 4] have sides of at least ``MIN_SIDE``, [B, A]."""
    corners = graph.slice_axis(boxes, 2, 4, 2), graph.slice_axis(boxes, 0, 2, 2)
    sides = graph.op("Sub", *corners)
    shortest = graph.op("ReduceMin", sides, graph.i64(2), keepdims=0)
    return graph.op("GreaterOrEqual", shortest, graph.f32(MIN_SIDE))


def _add_detections(
    graph: OnnxGraph, candidates: _Candidates, settings: PostProcess
) -> _DetectionTensors:
    """Add the best detections of each image, sorted by score over the whole batch."""
    image, label, box = (
        graph.squeeze(graph.slice_axis(candidates.selected, k, k + 1, 1), 1)
        for k in range(3)
    )
    image_column, label_column, box_column = (
        graph.unsqueeze(tensor, 1) for tensor in (image, label, box)
    )
    indices = graph.concat(image_column, box_column, label_column, axis=1)
    score = graph.op("GatherND", candidates.scores, indices)
    count = graph.op("Shape", score)
    sorted_scores, order = graph.op_many("TopK", 2, score, count, axis=0)
    sorted_image = graph.op("Gather", image, order)
    rank = add_rank_within_image(graph, sorted_image, candidates.batch)
    is_within = graph.op("Less", rank, graph.i64(settings.detections))
    order = graph.op("Compress", order, is_within, axis=0)
    rows = graph.op("Gather", graph.concat(image_column, box_column, axis=1), order)
    class_scores = graph.op("GatherND", candidates.scores, rows)
    return _DetectionTensors(
        graph.op("GatherND", candidates.boxes, rows),
        graph.op("Compress", sorted_scores, is_within, axis=0),
        graph.op("Gather", label, order),
        graph.op("Compress", sorted_image, is_within, axis=0),
        _add_distributions(graph, class_scores),
    )


def _add_distributions(graph: OnnxGraph, scores: str) -> str:
    """Add ``class_distributions`` of scores [N, K]."""
    total = graph.op("ReduceSum", scores, graph.i64(1), keepdims=1)
    foreground = graph.op("Div", scores, graph.op("Max", total, graph.f32(1.0)))
    total = graph.op("ReduceSum", foreground, graph.i64(1), keepdims=1)
    background = graph.op("Sub", graph.f32(1.0), total)
    return graph.concat(foreground, graph.op("Max", background, graph.f32(0.0)), axis=1)
