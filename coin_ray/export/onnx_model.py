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
from coin_ray.export.conv_before_roialign import (
    HALVED,
    EarlyDescribe,
    EarlyPropose,
    enters_early,
)
from coin_ray.export.graph import OPSET, Graph
from coin_ray.export.networks import PAD, halves
from coin_ray.export.pooling import Proposals, pool, rank_within
from coin_ray.export.resizing import resize
from coin_ray.models.faster_rcnn_clip.model import ClipDetector

LOWEST = -1e30
"""Below every score."""


def onnx_model(detector: ClipDetector, classes: Sequence[str]) -> ModelProto:
    """``images`` [B, H, W, 3] uint8 RGB -> ``boxes`` [N, 4], ``scores`` [N], ``labels``
    [N], ``image`` [N] in 0..B-1, ``probs`` [N, K+1].

    Rows are sorted by score over the whole batch. The class names are in the metadata,
    separated by newlines.
    """
    config = detector.config
    graph = Graph()
    view = _prepare(
        graph, config, detector.mean.flatten().tolist(), detector.std.flatten().tolist()
    )
    networks = _networks(detector)
    *features, objectness, candidates = graph.network(
        "propose", networks.propose, view.pixels, view.limits
    )
    image, proposals = _choose(graph, config, objectness, candidates)
    pooled = pool(
        graph,
        config,
        Proposals(proposals, image, view.batch),
        list(zip(features, networks.bins, strict=True)),
    )
    probs, boxes = graph.network(
        "describe", networks.describe, *pooled, proposals, view.limits
    )
    rows = _detections(graph, config, view, image, boxes, probs, len(classes))
    model = graph.model(
        "detector",
        [_info("images", TensorProto.UINT8, "B", "H", "W", 3)],
        _outputs(rows, len(classes)),
    )
    helper.set_model_props(
        model, {"classes": "\n".join(classes), "score_min": str(config.score_min)}
    )
    return model


@dataclass(frozen=True)
class _View:
    """Names of tensors. ``pixels`` [B, 3, h, w] normalised and padded, ``limits`` [4],
    ``scale`` [4] from view to image, ``batch`` [1].
    """

    pixels: str
    limits: str
    scale: str
    batch: str


def _prepare(
    graph: Graph, config: Detector, mean: list[float], std: list[float]
) -> _View:
    """Short side ``short_side``, long side at most ``long_side``; zeros at the right
    and bottom up to multiples of 32.
    """
    shape = graph.op("Shape", "images")
    batch = graph.part(shape, 0, 1, 0)
    own = graph.cast(graph.part(shape, 1, 3, 0), TensorProto.DOUBLE)
    shorter = graph.op(
        "Div", graph.f64(config.short_side), graph.op("ReduceMin", own, keepdims=1)
    )
    longer = graph.op(
        "Div", graph.f64(config.long_side), graph.op("ReduceMax", own, keepdims=1)
    )
    factor = graph.op("Min", shorter, longer)
    size = graph.op(
        "Max", graph.op("Round", graph.op("Mul", own, factor)), graph.f64(1.0)
    )
    whole = graph.cast(size, TensorProto.INT64)
    channels_first = graph.cast(
        graph.op("Transpose", "images", perm=[0, 3, 1, 2]), TensorProto.FLOAT
    )
    fits = graph.cast(
        graph.op(
            "ReduceMin",
            graph.cast(graph.op("Equal", own, size), TensorProto.INT64),
            keepdims=0,
        ),
        TensorProto.BOOL,
    )
    resized = graph.choose(
        fits,
        lambda: channels_first,
        lambda: resize(graph, channels_first, own, size),
        TensorProto.FLOAT,
        (None, 3, None, None),
    )
    scaled = graph.op("Div", resized, graph.f32(255.0))
    three = graph.i64(1, 3, 1, 1)
    centred = graph.op("Sub", scaled, graph.op("Reshape", graph.f32(*mean), three))
    normalised = graph.op("Div", centred, graph.op("Reshape", graph.f32(*std), three))
    beyond = graph.op("Mod", graph.op("Neg", whole), graph.i64(PAD))
    pads = graph.op("Concat", graph.i64(0, 0, 0, 0, 0, 0), beyond, axis=0)
    pixels = graph.op("Pad", normalised, pads)
    swapped = [graph.op("Gather", s, graph.i64(1, 0, 1, 0)) for s in (size, own)]
    return _View(
        pixels,
        graph.cast(swapped[0], TensorProto.FLOAT),
        graph.cast(graph.op("Div", swapped[1], swapped[0]), TensorProto.FLOAT),
        batch,
    )


def _choose(
    graph: Graph, config: Detector, objectness: str, candidates: str
) -> tuple[str, str]:
    """The proposals of all images: image [R] and boxes [R, 4], as ``RegionProposals``
    chooses them.
    """
    limit = config.proposals_test
    anchors = graph.op("Shape", objectness, start=1, end=2)
    count = graph.op("Min", anchors, graph.i64(6 * limit))
    scores, best = graph.op_many("TopK", 2, objectness, count, axis=1)
    boxes = graph.op(
        "GatherElements",
        candidates,
        graph.op("Tile", graph.op("Unsqueeze", best, graph.i64(2)), graph.i64(1, 1, 4)),
        axis=1,
    )
    size = graph.op("Sub", graph.part(boxes, 2, 4, 2), graph.part(boxes, 0, 2, 2))
    small = graph.op(
        "Less", graph.op("ReduceMin", size, graph.i64(2), keepdims=0), graph.f32(1.0)
    )
    large = graph.op(
        "Unsqueeze",
        graph.op("Where", small, graph.f32(2 * LOWEST), scores),
        graph.i64(1),
    )
    chosen = graph.op(
        "NonMaxSuppression",
        boxes,
        large,
        graph.i64(limit),
        graph.f32(config.rpn_nms),
        graph.f32(LOWEST),
    )
    image = graph.op("Squeeze", graph.part(chosen, 0, 1, 1), graph.i64(1))
    place = graph.op(
        "Concat", graph.part(chosen, 0, 1, 1), graph.part(chosen, 2, 3, 1), axis=1
    )
    return image, graph.op("GatherND", boxes, place)


@dataclass(frozen=True)
class _Rows:
    boxes: str
    scores: str
    labels: str
    image: str
    probs: str


def _detections(
    graph: Graph,
    config: Detector,
    view: _View,
    image: str,
    boxes: str,
    probs: str,
    classes: int,
) -> _Rows:
    """Class-wise suppression in each image: to the operator each pair of an image and a
    class is a class of its own.
    """
    own = graph.op(
        "Equal",
        graph.op(
            "Unsqueeze", graph.op("Range", *_range(graph, view.batch)), graph.i64(1)
        ),
        graph.op("Unsqueeze", image, graph.i64(0)),
    )
    foreground = graph.op("Transpose", graph.part(probs, 0, classes, 1), perm=[1, 0])
    masked = graph.op(
        "Where",
        graph.op("Unsqueeze", own, graph.i64(1)),
        graph.op("Unsqueeze", foreground, graph.i64(0)),
        graph.f32(-1.0),
    )
    scores = graph.op(
        "Reshape",
        masked,
        graph.op("Concat", graph.i64(1, -1), graph.op("Shape", image), axis=0),
    )
    everything = graph.op("Shape", image)
    kept = graph.op(
        "NonMaxSuppression",
        graph.op("Unsqueeze", boxes, graph.i64(0)),
        scores,
        everything,
        graph.f32(config.nms),
        graph.f32(config.score_min),
    )
    pair, region = (
        graph.op("Squeeze", graph.part(kept, i, i + 1, 1), graph.i64(1)) for i in (1, 2)
    )
    label = graph.op("Mod", pair, graph.i64(classes))
    score = graph.op(
        "GatherND",
        probs,
        graph.op(
            "Concat",
            *(graph.op("Unsqueeze", t, graph.i64(1)) for t in (region, label)),
            axis=1,
        ),
    )
    sorted_score, order = graph.op_many(
        "TopK", 2, score, graph.op("Shape", score), axis=0
    )
    ranked = graph.op("Gather", graph.op("Div", pair, graph.i64(classes)), order)
    first = _first_of_each(graph, config.detections, view.batch, ranked)
    order, sorted_score, ranked = (
        graph.op("Compress", t, first, axis=0) for t in (order, sorted_score, ranked)
    )
    region, label = (graph.op("Gather", t, order) for t in (region, label))
    scaled = graph.op("Mul", graph.op("Gather", boxes, region), view.scale)
    return _Rows(scaled, sorted_score, label, ranked, graph.op("Gather", probs, region))


def _first_of_each(graph: Graph, limit: int, batch: str, image: str) -> str:
    """Mask [N] of the first ``limit`` rows of each image."""
    return graph.op("Less", rank_within(graph, image, batch), graph.i64(limit))


def _range(graph: Graph, batch: str) -> tuple[str, str, str]:
    return graph.scalar(0), graph.op("Squeeze", batch), graph.scalar(1)


def _outputs(rows: _Rows, classes: int) -> dict[str, onnx.ValueInfoProto]:
    return {
        rows.boxes: _info("boxes", TensorProto.FLOAT, "N", 4),
        rows.scores: _info("scores", TensorProto.FLOAT, "N"),
        rows.labels: _info("labels", TensorProto.INT64, "N"),
        rows.image: _info("image", TensorProto.INT64, "N"),
        rows.probs: _info("probs", TensorProto.FLOAT, "N", classes + 1),
    }


def _info(name: str, kind: int, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


@dataclass(frozen=True)
class _Networks:
    """``propose`` -> maps, objectness, boxes; ``bins``: into how many a side each of
    the maps is pooled for ``describe``.
    """

    propose: ModelProto
    describe: ModelProto
    bins: tuple[int, ...]


def _networks(detector: ClipDetector) -> _Networks:
    propose, describe = halves(detector)
    side, channels = detector.config.roi_size, describe.tower.shared_channels
    if enters_early(describe.tower, detector.config):
        early = EarlyPropose(propose, describe), EarlyDescribe(describe)
        return _Networks(
            _propose_model(early[0]),
            _describe_model(early[1], early[0].shapes(side)),
            (side, side // HALVED),
        )
    return _Networks(
        _propose_model(propose), _describe_model(describe, [(channels, side)]), (side,)
    )


def _propose_model(network: nn.Module) -> ModelProto:
    examples = (
        torch.zeros(2, 3, 3 * PAD, 4 * PAD),
        torch.tensor([128.0, 96.0, 128.0, 96.0]),
    )
    shapes = (
        {
            0: Dim.DYNAMIC,
            2: PAD * Dim("rows", min=1, max=256),
            3: PAD * Dim("columns", min=1, max=256),
        },
        None,
    )
    return _exported(network.eval(), examples, shapes)


def _describe_model(
    network: nn.Module, pooled: Sequence[tuple[int, int]]
) -> ModelProto:
    """``pooled``: channels and bins a side of each input."""
    examples = (
        *(torch.zeros(5, channels, side, side) for channels, side in pooled),
        torch.zeros(5, 4),
        torch.ones(4),
    )
    regions = Dim("regions")
    return _exported(
        network.eval(), examples, (*({0: regions} for _ in pooled), {0: regions}, None)
    )


def _exported(
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
