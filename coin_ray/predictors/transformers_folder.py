"""A trained RT-DETRv2 or D-FINE, read from the folder that its training wrote."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from coin_ray import storage
from coin_ray.models.co_detr.transformers_detr import (
    TransformersDetr,
    open_transformers_detr,
)
from coin_ray.structures import Detections

TRANSFORMERS_FOLDER = "network"


@dataclass(frozen=True, eq=False)
class TransformersPredictor:
    detector: TransformersDetr

    def to(self, device: torch.device) -> TransformersPredictor:
        """Move the weights to ``device``."""
        self.detector.to(device)
        return self

    @torch.no_grad()
    def predict_batch(self, images: Sequence[Tensor]) -> list[Detections]:
        """Return the detections of uint8 images [3, H, W], run as one batch, on the CPU
        and in pixels of each.
        """
        predicted = self.detector.predict(self.detector.prepare(images))
        return [detections.to(torch.device("cpu")) for detections in predicted]


def load_transformers_predictor(
    folder: str, model: str, detections_max: int
) -> TransformersPredictor:
    """Read a trained ``model`` (rt-detr-v2 or d-fine) from ``folder``, a URI; it returns
    at most ``detections_max`` boxes per image.
    """
    with tempfile.TemporaryDirectory() as local_folder:
        for name, file_bytes in read_files(folder).items():
            (Path(local_folder) / name).write_bytes(file_bytes)
        detector = open_transformers_detr(local_folder, model, detections_max)
        return TransformersPredictor(detector.eval())


def read_files(folder: str) -> Mapping[str, bytes]:
    """Return the read_files in a folder (a URI) by name."""
    uris = storage.list_files(folder)
    return {uri.rpartition("/")[2]: storage.read_bytes(uri) for uri in uris}
