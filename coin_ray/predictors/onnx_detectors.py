"""ONNX detectors behind the local cloud: YOLOX and PicoDet with COCO classes, alone or
fused by weighted boxes.

Which of the two a file is, its output shapes say. Needs the ``onnx`` extra.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.ops import box_iou, nms

from coin_ray.data.coco_classes import COCO_CLASSES
from coin_ray.errors import ConfigError

Floats = NDArray[np.float32]

NMS_IOU = 0.5
FUSION_IOU = 0.55
DETECTIONS_MAX = 100
YOLOX_STRIDES = (8, 16, 32)
YOLOX_PADDING = 114
PICODET_STRIDES = (8, 16, 32, 64)
PICODET_BINS = 8
PICODET_MEAN = np.array([103.53, 116.28, 123.675], np.float32)
PICODET_STD = np.array([57.375, 57.12, 58.395], np.float32)


class Detector(Protocol):
    """What the local cloud serves. ``classes``: its closed vocabulary."""

    @property
    def name(self) -> str: ...

    @property
    def classes(self) -> Sequence[str]: ...

    def detect(
        self, image: Image.Image, classes: Sequence[str], score_min: float
    ) -> tuple[Floats, Floats]:
        """Boxes [N, 4] xyxy pixels of the RGB image and independent scores [N,
        len(classes)], best first.
        """


class _OnnxModel(Protocol):
    def predict(self, image: Image.Image) -> tuple[Floats, Floats]:
        """All candidates: boxes [M, 4] xyxy pixels of the image, scores [M, 80]."""


@dataclass(frozen=True)
class Yolox:
    session: Any
    side: int

    def predict(self, image: Image.Image) -> tuple[Floats, Floats]:
        scale = min(self.side / image.width, self.side / image.height)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        padded = np.full((self.side, self.side, 3), YOLOX_PADDING, np.float32)
        padded[: size[1], : size[0]] = _bgr(image, size)
        output = _run(self.session, padded)[0][0]
        centres, strides = _grid(self.side, YOLOX_STRIDES, 0.0)
        middle, half = (
            (output[:, :2] + centres) * strides,
            np.exp(output[:, 2:4]) * strides / 2,
        )
        boxes = np.concatenate([middle - half, middle + half], 1)
        factors = np.array(
            [image.width / size[0], image.height / size[1]] * 2, np.float32
        )
        return boxes * factors, output[:, 4:5] * output[:, 5:]


@dataclass(frozen=True)
class PicoDet:
    session: Any
    side: int

    def predict(self, image: Image.Image) -> tuple[Floats, Floats]:
        outputs = _run(
            self.session,
            (_bgr(image, (self.side, self.side)) - PICODET_MEAN) / PICODET_STD,
        )
        levels = len(PICODET_STRIDES)
        scores = np.concatenate([o[0] for o in outputs[:levels]])
        bins = np.concatenate([o[0] for o in outputs[levels:]]).reshape(
            -1, 4, PICODET_BINS
        )
        weights = np.exp(bins - bins.max(-1, keepdims=True))
        distances = (weights / weights.sum(-1, keepdims=True)) @ np.arange(
            PICODET_BINS, dtype=np.float32
        )
        centres, strides = _grid(self.side, PICODET_STRIDES, 0.5)
        boxes = (
            np.concatenate([centres - distances[:, :2], centres + distances[:, 2:]], 1)
            * strides
        )
        factors = np.array(
            [image.width / self.side, image.height / self.side] * 2, np.float32
        )
        return boxes * factors, scores


@dataclass(frozen=True)
class OnnxDetector:
    """One or several ONNX models, restricted to the classes asked for."""

    models: tuple[_OnnxModel, ...]
    name: str
    classes: Sequence[str] = COCO_CLASSES

    def detect(
        self, image: Image.Image, classes: Sequence[str], score_min: float
    ) -> tuple[Floats, Floats]:
        """Boxes [N, 4] xyxy pixels and scores [N, len(classes)], best first."""
        columns = [list(self.classes).index(name) for name in classes]
        candidates = [model.predict(image) for model in self.models]
        results = [
            suppressed(boxes, scores[:, columns], image.size, score_min)
            for boxes, scores in candidates
        ]
        boxes, scores = (
            results[0] if len(results) == 1 else fuse_weighted_boxes(results)
        )
        kept = scores.max(1, initial=0) >= score_min
        return boxes[kept], scores[kept]


def load_detector(paths: Sequence[str]) -> OnnxDetector:
    """The detector of one ONNX file, or the fusion of several. Raises ``ConfigError``
    for an unknown kind of model.
    """
    names = [path.rpartition("/")[2].removesuffix(".onnx") for path in paths]
    return OnnxDetector(tuple(_load(path) for path in paths), "+".join(names))


def fuse_weighted_boxes(
    results: Sequence[tuple[Floats, Floats]],
) -> tuple[Floats, Floats]:
    """Weighted boxes fusion of several models' (boxes [N, 4], scores [N, K]): best
    first, greedy, regardless of class.

    A cluster's box is the mean weighted by best score, its scores are summed and
    divided by the number of models: what only one model saw counts less.
    """
    boxes, scores = (
        np.concatenate([r[0] for r in results]),
        np.concatenate([r[1] for r in results]),
    )
    best = scores.max(1, initial=0)
    overlap = (
        box_iou(torch.from_numpy(boxes), torch.from_numpy(boxes)).numpy() > FUSION_IOU
    )
    free = np.ones(len(boxes), bool)
    fused_boxes, fused_scores = [], []
    for i in np.argsort(-best, kind="stable"):
        if not free[i]:
            continue
        cluster = overlap[i] & free
        cluster[i] = True
        free &= ~cluster
        fused_boxes.append(np.average(boxes[cluster], axis=0, weights=best[cluster]))
        fused_scores.append(scores[cluster].sum(0) / max(len(results), cluster.sum()))
    order = np.argsort([-s.max() for s in fused_scores], kind="stable")
    shape = scores.shape[1]
    return (
        np.array(fused_boxes, np.float32).reshape(-1, 4)[order],
        np.array(fused_scores, np.float32).reshape(-1, shape)[order],
    )


def _load(path: str) -> _OnnxModel:
    try:
        import onnxruntime
    except ImportError:
        raise ConfigError(
            "cloud.serve onnx needs onnxruntime: pip install 'coin-ray[onnx]'"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        path, options, providers=["CPUExecutionProvider"]
    )
    side, outputs = (
        session.get_inputs()[0].shape[-1],
        [o.shape for o in session.get_outputs()],
    )
    if len(outputs) == 1 and outputs[0][-1] == 5 + len(COCO_CLASSES):
        return Yolox(session, side)
    if len(outputs) == 2 * len(PICODET_STRIDES) and outputs[-1][-1] == 4 * PICODET_BINS:
        return PicoDet(session, side)
    raise ConfigError(
        f"{path} is neither a YOLOX nor a PicoDet with COCO classes; its outputs have"
        f" shapes {outputs}"
    )


def suppressed(
    boxes: Floats,
    scores: Floats,
    size: tuple[int, int],
    score_min: float,
    iou: float = NMS_IOU,
) -> tuple[Floats, Floats]:
    """The best of candidates [M, 4] with scores [M, K] after class-agnostic NMS,
    clipped to an image of ``size`` (width, height).
    """
    kept = scores.max(1, initial=0) >= score_min
    boxes = np.clip(boxes[kept], 0, [*size, *size]).astype(np.float32)
    scores = np.clip(scores[kept], 0, 1).astype(np.float32)
    order = nms(
        torch.from_numpy(boxes), torch.from_numpy(scores.max(1, initial=0)), iou
    )[:DETECTIONS_MAX].numpy()
    return boxes[order], scores[order]


def _bgr(image: Image.Image, size: tuple[int, int]) -> Floats:
    """[height, width, 3] in 0..255."""
    pixels = np.asarray(
        image.convert("RGB").resize(size, Image.Resampling.BILINEAR), np.float32
    )
    return pixels[:, :, ::-1]


def _run(session: Any, pixels: Floats) -> list[Floats]:
    tensor = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])
    return list(session.run(None, {session.get_inputs()[0].name: tensor}))


def _grid(side: int, strides: Sequence[int], shift: float) -> tuple[Floats, Floats]:
    """Cell positions [M, 2] xy in cells and their strides [M, 1], row by row, level by
    level.
    """
    cells, sizes = [], []
    for stride in strides:
        count = -(-side // stride)
        x, y = np.meshgrid(np.arange(count), np.arange(count))
        cells.append(np.stack([x, y], -1).reshape(-1, 2) + shift)
        sizes.append(np.full((count * count, 1), stride))
    return np.concatenate(cells).astype(np.float32), np.concatenate(sizes).astype(
        np.float32
    )
