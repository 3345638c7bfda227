"""A student from MLflow's model registry:
``mlflow.pyfunc.load_model("models:/NAME@champion").predict(images)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from PIL import Image

from coin_ray.data.canonical import decode_rgb
from coin_ray.data.pixels import IntensityRange
from coin_ray.predictors.predictor import Predictor
from coin_ray.predictors.student import load_exported_student
from coin_ray.storage import read_bytes

ImageSource = Image.Image | bytes | str


class NamedDetections(TypedDict):
    """Detections of one image: ``boxes`` xyxy in pixels, ``labels`` as class names."""

    boxes: list[list[float]]
    scores: list[float]
    labels: list[str]


@dataclass(frozen=True)
class MlflowModel:
    """MLflow's Python model: detects in PIL images, bytes of image files and URIs."""

    predictor: Predictor

    def predict(
        self,
        images: Sequence[ImageSource],
        params: Mapping[str, object] | None = None,
    ) -> list[NamedDetections]:
        return [self._detect(image) for image in images]

    def _detect(self, source: ImageSource) -> NamedDetections:
        image = _as_image(source, self.predictor.intensity_range)
        detections = self.predictor(image)
        labels = detections.labels.tolist()
        return {
            "boxes": detections.boxes.tolist(),
            "scores": detections.scores.tolist(),
            "labels": [self.predictor.classes[label] for label in labels],
        }


def _as_image(
    source: ImageSource, intensity_range: IntensityRange | None
) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    raw = source if isinstance(source, bytes) else read_bytes(source)
    return decode_rgb(raw, intensity_range)


def _load_pyfunc(path: str) -> MlflowModel:
    """Load the model from the folder of an export; MLflow calls this by its name."""
    return MlflowModel(load_exported_student(path))
