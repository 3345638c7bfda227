"""A trained Co-DETR as one file: weights, class names, sizes and the shape of its
backbone, optionally with the auxiliary heads of training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from coin_ray import boxes as box_ops
from coin_ray import storage
from coin_ray.config.co_detr import Backbone, CoDetr
from coin_ray.config.detector_training import DetectorConfig
from coin_ray.data.augmentation import resize_to_fit
from coin_ray.data.pixels import IntensityRange, upright_rgb
from coin_ray.errors import InputError
from coin_ray.models.co_detr.agreement import average_head_confidences
from coin_ray.models.co_detr.collaborative import (
    AGREEMENT,
    BASE_PREFIX,
    DECODER,
    CollaborativeDetr,
)
from coin_ray.models.co_detr.model import DeformableDetr, load_detector_weights
from coin_ray.models.co_detr.towers import describe_backbone, rebuild_backbone
from coin_ray.models.weight_files import read_tensors
from coin_ray.predictors.saved_settings import tuples_from_lists
from coin_ray.structures import Detections

CO_DETR_FILE = "co_detr.pt"
FORMAT = 1
EXPECTED = f"expected {CO_DETR_FILE}, as written by coin-ray detector"


@dataclass(frozen=True, eq=False)
class CoDetrPredictor:
    """A ``Predictor`` with a Co-DETR. ``collaborative``: the same detector with its
    auxiliary heads, if the file holds them.

    ``reported``: which confidences are returned, the decoder's or those that all heads
    agree on. ``intensity_range``: of the deep grey images that it was trained on.
    """

    classes: tuple[str, ...]
    detector: DeformableDetr
    short_side: int
    long_side: int
    collaborative: CollaborativeDetr | None = None
    reported: str = DECODER
    intensity_range: IntensityRange | None = None

    def to(self, device: torch.device) -> CoDetrPredictor:
        """Move the weights to ``device``."""
        (self.collaborative or self.detector).to(device)
        return self

    def __call__(self, image: Image.Image) -> Detections:
        """Return the detections in pixels of the upright ``image``, best first."""
        pixels = pil_to_tensor(upright_rgb(image, self.intensity_range))
        return self.predict_batch([pixels])[0]

    @torch.no_grad()
    def predict_batch(self, images: Sequence[Tensor]) -> list[Detections]:
        """Return the detections of uint8 images [3, H, W], run as one batch, on the CPU
        and in pixels of each.
        """
        if self.reported == AGREEMENT:
            return self.predict_by_head(images)[AGREEMENT]
        resized = self._resize(images)
        predicted = self.detector.predict(self.detector.prepare(resized))
        return _scale_to_images(predicted, images, resized)

    @torch.no_grad()
    def predict_by_head(self, images: Sequence[Tensor]) -> dict[str, list[Detections]]:
        """Return what ``predict_batch`` returns for every head by name, and under
        ``agreement`` the decoder's boxes with the confidences that all heads agree on.

        Raises InputError if there are no auxiliary heads in the file.
        """
        if self.collaborative is None:
            raise InputError(
                "this Co-DETR was shipped without its auxiliary heads: train with"
                " --ship heads or --ship agreement"
            )
        resized = self._resize(images)
        prepared = self.detector.prepare(resized)
        by_head = {
            head: _scale_to_images(predicted, images, resized)
            for head, predicted in self.collaborative.predict_by_head(prepared).items()
        }
        decoder, *auxiliary = by_head.values()
        agreement = []
        for index, detections in enumerate(decoder):
            others = [head[index] for head in auxiliary]
            agreement.append(average_head_confidences(detections, others))
        return by_head | {AGREEMENT: agreement}

    def _resize(self, images: Sequence[Tensor]) -> list[Tensor]:
        return [
            resize_to_fit(image, self.short_side, self.long_side) for image in images
        ]


def _scale_to_images(
    predicted: Sequence[Detections], images: Sequence[Tensor], resized: Sequence[Tensor]
) -> list[Detections]:
    """Return detections in resized images as detections in the images, on the CPU."""
    scaled = []
    for detections, image, small in zip(predicted, images, resized, strict=True):
        x_factor = image.shape[2] / small.shape[2]
        y_factor = image.shape[1] / small.shape[1]
        on_cpu = detections.to(torch.device("cpu"))
        boxes = box_ops.scale_boxes(on_cpu.boxes, x_factor, y_factor)
        scaled.append(on_cpu.with_boxes(boxes))
    return scaled


def pack_co_detr(model: CollaborativeDetr, config: DetectorConfig) -> dict[str, Any]:
    """Return the content of the file, for ``torch.save``."""
    detector = model.base
    heads: dict[str, Tensor] = {}
    if config.ship != "base":
        heads = {
            name: weight
            for name, weight in model.state_dict().items()
            if name.startswith(("pyramid.", "heads."))
        }
    content = {
        "format": FORMAT,
        "kind": "co-detr",
        "classes": list(config.classes),
        "short_side": config.short_side,
        "long_side": config.long_side,
        "co_detr": dataclasses.asdict(config.co_detr),
        "backbone": dataclasses.asdict(config.backbone),
        "tower": describe_backbone(detector.backbone),
        "weights": _on_cpu(detector.state_dict()),
        "heads": _on_cpu(heads),
        "reported": AGREEMENT if config.ship == "agreement" else DECODER,
    }
    if config.found_intensity_range is not None:
        content["intensity_range"] = list(config.found_intensity_range)
    return content


def _on_cpu(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.detach().cpu() for name, weight in weights.items()}


def load_co_detr(uri: str) -> CoDetrPredictor:
    """Read such a file. Raises InputError if it is none, or was written by another
    version.
    """
    checkpoint = _read_checkpoint(uri)
    classes = tuple(checkpoint["classes"])
    config = CoDetr(**tuples_from_lists(checkpoint["co_detr"]))
    tower = rebuild_backbone(Backbone(**checkpoint["backbone"]), checkpoint["tower"])
    sides = checkpoint["short_side"], checkpoint["long_side"]
    intensity_range = None
    if checkpoint.get("intensity_range") is not None:
        low, high = checkpoint["intensity_range"]
        intensity_range = low, high
    if not checkpoint.get("heads"):
        detector = DeformableDetr(tower, len(classes), config)
        load_detector_weights(detector, checkpoint["weights"])
        return CoDetrPredictor(
            classes, detector.eval(), *sides, intensity_range=intensity_range
        )
    without_training_parts = replace(config, positive_queries=False, denoising=0)
    collaborative = CollaborativeDetr(tower, len(classes), without_training_parts)
    weights = {f"{BASE_PREFIX}{name}": w for name, w in checkpoint["weights"].items()}
    load_detector_weights(collaborative, weights | checkpoint["heads"])
    detector = collaborative.eval().base
    reported = checkpoint["reported"]
    return CoDetrPredictor(
        classes, detector, *sides, collaborative, reported, intensity_range
    )


def _read_checkpoint(uri: str) -> dict[str, Any]:
    if not storage.exists(uri):
        raise InputError(f"no such file: {uri}; {EXPECTED}")
    try:
        checkpoint = read_tensors(storage.read_bytes(uri), uri)
    except InputError as error:
        raise InputError(f"{error}; {EXPECTED}") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("kind") != "co-detr":
        raise InputError(f"{uri} holds no Co-DETR; {EXPECTED}")
    if checkpoint["format"] != FORMAT:
        raise InputError(
            f"{uri} has format {checkpoint['format']}, this version reads {FORMAT};"
            " train or export the model again"
        )
    return checkpoint
