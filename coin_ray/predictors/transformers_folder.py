"""A trained RT-DETRv2 or D-FINE, read from the folder of a run as any transformers
model is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from coin_ray import storage
from coin_ray.models.co_detr.transformers_detr import FastDetector, open_fast
from coin_ray.structures import Detections

FOLDER = "network"


@dataclass(frozen=True, eq=False)
class FastPredictor:
    detector: FastDetector

    def to(self, device: torch.device) -> FastPredictor:
        self.detector.to(device)
        return self

    @torch.no_grad()
    def many(self, originals: Sequence[Tensor]) -> list[Detections]:
        """Of uint8 images [3, H, W] in one batch: detections, on the CPU, in pixels of
        each.
        """
        return [
            d.to(torch.device("cpu"))
            for d in self.detector.predict(self.detector.prepare(originals))
        ]


def load_fast_predictor(folder: str, model: str, detections: int) -> FastPredictor:
    """``folder``: a URI."""
    with tempfile.TemporaryDirectory() as local:
        for name, data in files(folder).items():
            (Path(local) / name).write_bytes(data)
        return FastPredictor(open_fast(local, model, detections).eval())


def files(folder: str) -> Mapping[str, bytes]:
    return {
        uri.rpartition("/")[2]: storage.read_bytes(uri)
        for uri in storage.list_files(folder)
    }
