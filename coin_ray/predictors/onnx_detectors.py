"""Pretrained YOLOX and PicoDet detectors with COCO classes as ONNX files, alone or fused
by weighted boxes.

The output shapes of a file tell which of the two it is. Needs the ``onnx`` extra.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torchvision.ops import box_iou

from coin_ray.data.coco_classes import COCO_CLASSES
from coin_ray.errors import ConfigError
from coin_ray.fusion.box_clusters import greedy_clusters, score_weighted_mean
from coin_ray.predictors.scored_boxes import Floats, ScoredBoxes, select_boxes

FUSION_IOU = 0.55
YOLOX_STRIDES = (8, 16, 32)
YOLOX_PADDING = 114
PICODET_STRIDES = (8, 16, 32, 64)
PICODET_BINS = 8
PICODET_MEAN = np.array([103.53, 116.28, 123.675], np.float32)
PICODET_STD = np.array([57.375, 57.12, 58.395], np.float32)


class OnnxNetwork(Protocol):
    def predict(self, image: Image.Image) -> ScoredBoxes:
        """Return all candidates: boxes [M, 4] xyxy pixels of the image, scores [M, 80]."""


@dataclass(frozen=True)
class Yolox:
    session: Any
    side: int

    def predict(self, image: Image.Image) -> ScoredBoxes:
        scale = min(self.side / image.width, self.side / image.height)
        width = max(1, round(image.width * scale))
        height = max(1, round(image.height * scale))
        padded = np.full((self.side, self.side, 3), YOLOX_PADDING, np.float32)
        padded[:height, :width] = _bgr_pixels(image, (width, height))
        candidates = _run_session(self.session, padded)[0][0]
        offsets, log_sizes = candidates[:, :2], candidates[:, 2:4]
        objectness, class_scores = candidates[:, 4:5], candidates[:, 5:]
        cells, strides = _grid_cells(self.side, YOLOX_STRIDES, 0.0)
        centres = (offsets + cells) * strides
        half_sizes = np.exp(log_sizes) * strides / 2
        boxes = np.concatenate([centres - half_sizes, centres + half_sizes], 1)
        factors = _scale_factors(image, (width, height))
        return boxes * factors, objectness * class_scores


@dataclass(frozen=True)
class PicoDet:
    session: Any
    side: int

    def predict(self, image: Image.Image) -> ScoredBoxes:
        input_size = (self.side, self.side)
        pixels = (_bgr_pixels(image, input_size) - PICODET_MEAN) / PICODET_STD
        maps = _run_session(self.session, pixels)
        levels = len(PICODET_STRIDES)
        scores = np.concatenate([level[0] for level in maps[:levels]])
        bins = np.concatenate([level[0] for level in maps[levels:]])
        distances = _expected_distances(bins.reshape(-1, 4, PICODET_BINS))
        centres, strides = _grid_cells(self.side, PICODET_STRIDES, 0.5)
        top_left = centres - distances[:, :2]
        bottom_right = centres + distances[:, 2:]
        boxes = np.concatenate([top_left, bottom_right], 1) * strides
        return boxes * _scale_factors(image, input_size), scores


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
            predictions.append(select_boxes(boxes, requested, image.size, score_min))
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
    return OnnxDetector(networks, "+".join(names))


def fuse_weighted_boxes(predictions: Sequence[ScoredBoxes]) -> ScoredBoxes:
    """Fuse several networks' (boxes [N, 4], scores [N, K]) by weighted boxes: best
    first, greedy, regardless of class.

    A cluster's box is the mean weighted by best score, its scores are summed and
    divided by the number of networks: what only one network detected counts less.
    """
    boxes = np.concatenate([boxes for boxes, _ in predictions])
    scores = np.concatenate([scores for _, scores in predictions])
    best = scores.max(1, initial=0)
    box_tensor = torch.from_numpy(boxes)
    score_tensor = torch.from_numpy(scores)
    best_tensor = torch.from_numpy(best)
    overlapping = box_iou(box_tensor, box_tensor) > FUSION_IOU
    fused_boxes, fused_scores = [], []
    for cluster in greedy_clusters(overlapping, best_tensor):
        rows = cluster.members
        fused_boxes.append(score_weighted_mean(box_tensor[rows], best_tensor[rows]))
        network_count = max(len(predictions), len(rows))
        fused_scores.append(score_tensor[rows].sum(0) / network_count)
    if not fused_boxes:
        return boxes, scores
    box_array = torch.stack(fused_boxes).numpy()
    score_array = torch.stack(fused_scores).numpy()
    order = np.argsort(-score_array.max(1), kind="stable")
    return box_array[order], score_array[order]


def _load_network(path: str) -> OnnxNetwork:
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
    session = onnxruntime.InferenceSession(path, options, providers=providers)
    side = session.get_inputs()[0].shape[-1]
    shapes = [node.shape for node in session.get_outputs()]
    if len(shapes) == 1 and shapes[0][-1] == 5 + len(COCO_CLASSES):
        return Yolox(session, side)
    if len(shapes) == 2 * len(PICODET_STRIDES) and shapes[-1][-1] == 4 * PICODET_BINS:
        return PicoDet(session, side)
    raise ConfigError(
        f"{path} is neither a YOLOX nor a PicoDet with COCO classes; its outputs have"
        f" shapes {shapes}"
    )


def _bgr_pixels(image: Image.Image, size: tuple[int, int]) -> Floats:
    """Return pixels [height, width, 3] in 0..255, blue first."""
    resized = image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
    return np.asarray(resized, np.float32)[:, :, ::-1]


def _scale_factors(image: Image.Image, input_size: tuple[int, int]) -> Floats:
    """Return the factors [4] from boxes in the network's input to boxes in the image."""
    width, height = input_size
    return np.array([image.width / width, image.height / height] * 2, np.float32)


def _run_session(session: Any, pixels: Floats) -> list[Floats]:
    tensor = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])
    input_name = session.get_inputs()[0].name
    return list(session.run(None, {input_name: tensor}))


def _grid_cells(
    side: int, strides: Sequence[int], shift: float
) -> tuple[Floats, Floats]:
    """Return cell positions [M, 2] xy in cells and their strides [M, 1], row by row,
    level by level.
    """
    cells, sizes = [], []
    for stride in strides:
        count = -(-side // stride)
        x, y = np.meshgrid(np.arange(count), np.arange(count))
        cells.append(np.stack([x, y], -1).reshape(-1, 2) + shift)
        sizes.append(np.full((count * count, 1), stride))
    positions = np.concatenate(cells).astype(np.float32)
    return positions, np.concatenate(sizes).astype(np.float32)
