"""Detectors as ONNX files, alone or fused by weighted boxes.

YOLOX and PicoDet with COCO's classes, as they are published, are told by their output
shapes. Any other detector with one output is described in FILE.onnx.json beside it
(``onnx_signature``). Each file is tried once when it is loaded. Needs the ``onnx`` extra.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from coin_ray.data.coco_classes import COCO_CLASSES
from coin_ray.errors import ConfigError
from coin_ray.fusion.box_clusters import (
    greedy_clusters,
    pairwise_ious,
    score_weighted_mean,
)
from coin_ray.predictors.onnx_signature import OnnxSignature, read_signature
from coin_ray.predictors.scored_boxes import Floats, ScoredBoxes, select_boxes

FUSION_IOU = 0.55
PUBLISHED = OnnxSignature()
LARGEST_BOX = 16
"""Sides of the network's input that a box of the trial image may have."""
HALF, SINGLE = "tensor(float16)", "tensor(float)"
YOLOX_COLUMNS = 5 + len(COCO_CLASSES)
TRIAL_COLOUR = (114, 114, 114)
PICODET_STRIDES = (8, 16, 32, 64)
PICODET_BINS = 8
PICODET_SIDE = 416
PICODET_MEAN = np.array([103.53, 116.28, 123.675], np.float32)
PICODET_STD = np.array([57.375, 57.12, 58.395], np.float32)


class OnnxNetwork(Protocol):
    @property
    def signature(self) -> OnnxSignature: ...

    def predict(self, image: Image.Image) -> ScoredBoxes:
        """Return all candidates: boxes [M, 4] xyxy pixels of the image, scores [M, K]."""


@dataclass(frozen=True)
class DescribedDetector:
    """A detector with one output, read as its signature says.

    ``input_size``: (width, height) of the network's input.
    """

    session: Any
    signature: OnnxSignature
    input_size: tuple[int, int]

    def predict(self, image: Image.Image) -> ScoredBoxes:
        signature, input_size = self.signature, self.input_size
        width, height = input_size
        if signature.resize == "stretch":
            resized_size, left, top = input_size, 0, 0
        else:
            scale = min(width / image.width, height / image.height)
            resized_size = (
                max(1, round(image.width * scale)),
                max(1, round(image.height * scale)),
            )
            is_centred = signature.resize == "letterbox_centre"
            left = (width - resized_size[0]) // 2 if is_centred else 0
            top = (height - resized_size[1]) // 2 if is_centred else 0
        pixels = _bgr_pixels(image, resized_size)
        if signature.channels == "rgb":
            pixels = pixels[:, :, ::-1]
        padded = np.full((height, width, 3), signature.padding, np.float32)
        bottom, right = top + resized_size[1], left + resized_size[0]
        padded[top:bottom, left:right] = pixels
        mean = np.asarray(signature.mean, np.float32)
        std = np.asarray(signature.std, np.float32)
        normalized: Floats = (padded - mean) / std
        [output] = _run_session(self.session, normalized)
        boxes, scores = self.read_output(output)
        offset = np.array([left, top, left, top], np.float32)
        return (boxes - offset) * _scale_factors(image, resized_size), scores

    def read_output(self, output: Floats) -> ScoredBoxes:
        """Return boxes [M, 4] xyxy pixels of the network's input and scores [M, K].
        Raises ConfigError for an output of another shape than the signature says.
        """
        signature = self.signature
        expected = signature.output_shape(self.input_size)
        fits = len(output.shape) == 3 and all(
            size is None or size == actual
            for size, actual in zip(expected, output.shape, strict=True)
        )
        if not fits:
            width, height = self.input_size
            shape = [size or "any" for size in expected]
            raise ConfigError(
                f"expected an output of shape {shape} for an input of {width} x {height}"
                f" ({signature.summary()}), got {list(output.shape)}; describe the model"
                " in FILE.onnx.json (docs/cloud.md)"
            )
        candidates = output[0].astype(np.float32)
        if signature.layout == "columns":
            candidates = candidates.T
        if signature.boxes == "raw":
            cells, strides = _grid_cells(self.input_size, signature.strides, 0.0)
            centres = (candidates[:, :2] + cells) * strides
            sizes = np.exp(candidates[:, 2:4]) * strides
            boxes = np.concatenate([centres - sizes / 2, centres + sizes / 2], 1)
        elif signature.boxes == "cxcywh":
            centres, half_sizes = candidates[:, :2], candidates[:, 2:4] / 2
            boxes = np.concatenate([centres - half_sizes, centres + half_sizes], 1)
        else:
            boxes = candidates[:, :4]
        scores = candidates[:, 4:]
        if signature.objectness:
            scores = scores[:, :1] * scores[:, 1:]
        return boxes, scores


@dataclass(frozen=True)
class PicoDet:
    session: Any
    input_size: tuple[int, int]
    signature: OnnxSignature = PUBLISHED

    def predict(self, image: Image.Image) -> ScoredBoxes:
        pixels = (_bgr_pixels(image, self.input_size) - PICODET_MEAN) / PICODET_STD
        maps = _run_session(self.session, pixels)
        levels = len(PICODET_STRIDES)
        scores = np.concatenate([level[0] for level in maps[:levels]])
        bins = np.concatenate([level[0] for level in maps[levels:]])
        centres, strides = _grid_cells(self.input_size, PICODET_STRIDES, 0.5)
        if scores.shape != (len(centres), len(COCO_CLASSES)) or len(bins) != len(
            centres
        ):
            width, height = self.input_size
            raise ConfigError(
                f"expected {len(centres)} rows of {len(COCO_CLASSES)} scores for a"
                f" PicoDet of {width} x {height}, got {list(scores.shape)} and"
                f" {len(bins)} boxes"
            )
        distances = _expected_distances(
            bins.reshape(-1, 4, PICODET_BINS).astype(np.float32)
        )
        top_left = centres - distances[:, :2]
        bottom_right = centres + distances[:, 2:]
        boxes = np.concatenate([top_left, bottom_right], 1) * strides
        return boxes * _scale_factors(image, self.input_size), scores


def _expected_distances(bins: Floats) -> Floats:
    """Return the mean distance [M, 4] in cells under the softmax of logits [M, 4, bins]."""
    weights = np.exp(bins - bins.max(-1, keepdims=True))
    probabilities = weights / weights.sum(-1, keepdims=True)
    distances: Floats = probabilities @ np.arange(PICODET_BINS, dtype=np.float32)
    return distances


@dataclass(frozen=True)
class OnnxDetector:
    """One or several ONNX networks, restricted to the requested classes."""

    networks: tuple[OnnxNetwork, ...]
    name: str
    classes: Sequence[str] = COCO_CLASSES

    def detect(
        self, image: Image.Image, classes: Sequence[str], score_min: float
    ) -> ScoredBoxes:
        """Return boxes [N, 4] xyxy pixels and scores [N, len(classes)], best first."""
        columns = [list(self.classes).index(name) for name in classes]
        predictions = []
        for network in self.networks:
            boxes, scores = network.predict(image)
            requested = scores[:, columns]
            signature = network.signature
            predictions.append(
                select_boxes(
                    boxes,
                    requested,
                    image.size,
                    score_min,
                    signature.nms_iou,
                    class_wise=signature.nms == "class_wise",
                )
            )
        if len(predictions) == 1:
            boxes, scores = predictions[0]
        else:
            boxes, scores = fuse_weighted_boxes(predictions)
        above = scores.max(1, initial=0) >= score_min
        return boxes[above], scores[above]


def load_onnx_detector(paths: Sequence[str]) -> OnnxDetector:
    """Load one ONNX file, or several whose boxes are fused. Raises ``ConfigError`` for
    an unknown kind of model.
    """
    names = [path.rpartition("/")[2].removesuffix(".onnx") for path in paths]
    networks = tuple(_load_network(path) for path in paths)
    classes = networks[0].signature.classes
    for path, network in zip(paths, networks, strict=True):
        if network.signature.classes != classes:
            raise ConfigError(
                f"{path} has other classes than {paths[0]}: only detectors of the same"
                " classes, in one order, can be fused"
            )
    return OnnxDetector(networks, "+".join(names), classes)


def fuse_weighted_boxes(predictions: Sequence[ScoredBoxes]) -> ScoredBoxes:
    """Fuse several networks' (boxes [N, 4], scores [N, K]) by weighted boxes: best
    first, greedy, regardless of class.

    A cluster's box is the mean weighted by best score, its scores are summed and
    divided by the number of networks: what only one network detected counts less.
    """
    boxes = np.concatenate([boxes for boxes, _ in predictions])
    scores = np.concatenate([scores for _, scores in predictions])
    best = scores.max(1, initial=0)
    overlapping = pairwise_ious(boxes) > FUSION_IOU
    fused_boxes, fused_scores = [], []
    for cluster in greedy_clusters(overlapping, best):
        rows = cluster.members
        fused_boxes.append(score_weighted_mean(boxes[rows], best[rows]))
        network_count = max(len(predictions), len(rows))
        fused_scores.append(scores[rows].sum(0) / network_count)
    if not fused_boxes:
        return boxes, scores
    box_array, score_array = np.stack(fused_boxes), np.stack(fused_scores)
    order = np.argsort(-score_array.max(1), kind="stable")
    return box_array[order], score_array[order]


def _load_network(path: str) -> DescribedDetector | PicoDet:
    """Load a file and try it on one image. Raises ConfigError if it does not answer as
    described.
    """
    try:
        import onnxruntime
    except ImportError:
        raise ConfigError(
            "cloud.serve onnx needs onnxruntime: pip install 'coin-ray[onnx]'"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    providers = ["CPUExecutionProvider"]
    try:
        session = onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # onnxruntime's errors have no common base of their own
        raise ConfigError(
            f"{path} is no ONNX model that onnxruntime can load: {str(error)[:200]}"
        ) from error
    network = _describe_network(path, session)
    width, height = network.input_size
    try:
        boxes, _ = network.predict(Image.new("RGB", (width, height), TRIAL_COLOUR))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except Exception as error:
        raise ConfigError(
            f"{path} can't answer an image of {width} x {height}: {str(error)[:200]}"
        ) from error
    sizes = boxes[:, 2:] - boxes[:, :2]
    largest = LARGEST_BOX * max(width, height)
    if not np.isfinite(boxes).all() or (sizes < 0).any() or (sizes > largest).any():
        raise ConfigError(
            f"{path}: an empty image gave boxes of sizes {sizes.min():g} to"
            f" {sizes.max():g} pixels, so its boxes are not"
            f" {network.signature.boxes!r}: describe them in {path}.json (docs/cloud.md)"
        )
    return network


def _describe_network(path: str, session: Any) -> DescribedDetector | PicoDet:
    """Return the detector that FILE.onnx.json describes, or the published one that the
    shapes of the outputs tell.
    """
    shapes = [node.shape for node in session.get_outputs()]
    signature = read_signature(path)
    if signature is None and len(shapes) == 1 and _last(shapes[0]) == YOLOX_COLUMNS:
        signature = PUBLISHED
    if signature is not None:
        if len(shapes) != 1:
            raise ConfigError(
                f"{path} has {len(shapes)} outputs; a described detector has one"
            )
        size = _input_size(path, session, signature.input_size)
        return DescribedDetector(session, signature, size)
    if (
        len(shapes) == 2 * len(PICODET_STRIDES)
        and _last(shapes[-1]) == 4 * PICODET_BINS
    ):
        size = _input_size(path, session, (PICODET_SIDE, PICODET_SIDE))
        return PicoDet(session, size)
    raise ConfigError(
        f"{path} is neither a YOLOX nor a PicoDet with COCO classes; its outputs have"
        f" shapes {shapes}: describe it in {path}.json (docs/cloud.md)"
    )


def _last(shape: Sequence[object]) -> object:
    return shape[-1] if shape else None


def _input_size(path: str, session: Any, free_size: tuple[int, int]) -> tuple[int, int]:
    """Return (width, height) of the network's input; ``free_size`` replaces free sides.
    Raises ConfigError for an input that is not one image of three channels.
    """
    inputs = session.get_inputs()
    shape = inputs[0].shape
    batch, channels = (shape[0], shape[1]) if len(shape) == 4 else (None, None)
    is_image = len(inputs) == 1 and len(shape) == 4 and channels in (3, None)
    is_image = is_image or (len(shape) == 4 and isinstance(channels, str))
    if not is_image or inputs[0].type not in (SINGLE, HALF):
        raise ConfigError(
            f"{path}: expected one input [1, 3, height, width] of float32 or float16, got"
            f" {[(node.shape, node.type) for node in inputs]}"
        )
    if isinstance(batch, int) and batch != 1:
        raise ConfigError(
            f"{path}: expected a batch of 1 or a free one, got {batch}: export the model"
            " for one image"
        )
    height, width = (side if isinstance(side, int) else None for side in shape[2:])
    return width or free_size[0], height or free_size[1]


def _bgr_pixels(image: Image.Image, size: tuple[int, int]) -> Floats:
    """Return pixels [height, width, 3] in 0..255, blue first."""
    resized = image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
    return np.asarray(resized, np.float32)[:, :, ::-1]


def _scale_factors(image: Image.Image, input_size: tuple[int, int]) -> Floats:
    """Return the factors [4] from boxes in the network's input to boxes in the image."""
    width, height = input_size
    return np.array([image.width / width, image.height / height] * 2, np.float32)


def _run_session(session: Any, pixels: Floats) -> list[Floats]:
    network_input = session.get_inputs()[0]
    dtype = np.float16 if network_input.type == HALF else np.float32
    tensor = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], dtype)
    return list(session.run(None, {network_input.name: tensor}))


def _grid_cells(
    input_size: tuple[int, int], strides: Sequence[int], shift: float
) -> tuple[Floats, Floats]:
    """Return cell positions [M, 2] xy in cells and their strides [M, 1], row by row,
    level by level.
    """
    cells, sizes = [], []
    for stride in strides:
        columns, rows = (-(-side // stride) for side in input_size)
        x, y = np.meshgrid(np.arange(columns), np.arange(rows))
        cells.append(np.stack([x, y], -1).reshape(-1, 2) + shift)
        sizes.append(np.full((columns * rows, 1), stride))
    positions = np.concatenate(cells).astype(np.float32)
    return positions, np.concatenate(sizes).astype(np.float32)
