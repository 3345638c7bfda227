"""A student from MLflow's model registry:
``mlflow.pyfunc.load_model("models:/NAME@champion").predict(images)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from coin_ray.data.canonical import decode_rgb
from coin_ray.predictors.student import Predictor, load_exported
from coin_ray.storage import read_bytes


class Registered:
    """Detections in images given as PIL images, files' bytes or URIs: one dict of
    ``boxes`` (xyxy, pixels), ``scores`` and ``labels`` (names) each.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor

    def predict(
        self,
        images: Sequence[Image.Image | bytes | str],
        params: dict[str, Any] | None = None,
    ) -> list[dict[str, list[Any]]]:
        return [self._found(image) for image in images]

    def _found(self, image: Image.Image | bytes | str) -> dict[str, list[Any]]:
        if not isinstance(image, Image.Image):
            image = decode_rgb(image if isinstance(image, bytes) else read_bytes(image))
        found = self.predictor(image)
        names = [self.predictor.classes[label] for label in found.labels.tolist()]
        return {
            "boxes": found.boxes.tolist(),
            "scores": found.scores.tolist(),
            "labels": names,
        }


def _load_pyfunc(path: str) -> Registered:
    """Called by MLflow with the folder of an export."""
    predictor = load_exported(path)
    assert isinstance(predictor, Predictor)
    return Registered(predictor)
