"""Scenes of the demo and their accuracy, for the tests that overfit."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from coin_ray.demo.drawings import CLASSES, load_drawings
from coin_ray.demo.scenes import SIZE, Artwork, Scene, compose
from coin_ray.evaluation.voc import average_precision
from coin_ray.models.co_detr.collaborative import CollaborativeDetr
from coin_ray.models.co_detr.targets import DetrTargets
from coin_ray.models.co_detr.transformers_detr import CollaborativeTransformersDetr
from coin_ray.tables import Truth

SIDE = 128


def small_scenes(count: int) -> tuple[list[Tensor], list[DetrTargets]]:
    """Return source scenes of SIDE x SIDE pixels and their objects."""
    artwork = Artwork.from_drawings(load_drawings())
    scenes = [_shrink(compose(artwork, "source", seed)) for seed in range(count)]
    return [image for image, _ in scenes], [targets for _, targets in scenes]


def _shrink(scene: Scene) -> tuple[Tensor, DetrTargets]:
    image = scene.image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.asarray(image, np.uint8).copy()).permute(2, 0, 1)
    boxes = torch.from_numpy(scene.boxes) * SIDE / SIZE
    return pixels, DetrTargets(boxes, torch.from_numpy(scene.labels))


def ap50(
    model: CollaborativeDetr | CollaborativeTransformersDetr,
    images: list[Tensor],
    targets: list[DetrTargets],
) -> float:
    predicted = model.eval().predict(model.base.prepare(images))
    detections = {str(number): d for number, d in enumerate(predicted)}
    truth = {}
    for number, image_targets in enumerate(targets):
        labels = image_targets.labels
        difficult = torch.zeros(len(labels), dtype=torch.bool)
        truth[str(number)] = Truth(image_targets.boxes, labels, difficult)
    return average_precision(detections, truth, len(CLASSES)).map
