"""Adapt a trained detector (``coin_ray.predictors``) to the server's interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from PIL import Image

from coin_ray.data.pixels import IntensityRange, upright_rgb
from coin_ray.errors import InputError
from coin_ray.predictors.loading import open_predictor
from coin_ray.predictors.predictor import Predictor
from coin_ray.predictors.scored_boxes import DUPLICATE_IOU, ScoredBoxes, select_boxes

FILE_SUFFIXES = (".json", ".safetensors", ".onnx")


@dataclass(frozen=True)
class PredictorAdapter:
    """Serves a ``Predictor``. Class vectors are its foreground probabilities; boxes
    below the export's own ``score_min`` don't exist.
    """

    predictor: Predictor
    name: str
    batch_max: int = 1

    @property
    def classes(self) -> Sequence[str]:
        return self.predictor.classes

    @property
    def intensity_range(self) -> IntensityRange | None:
        return self.predictor.intensity_range

    def check(self, classes: Sequence[str]) -> None:
        """Raise InputError for a class that the detector has not learned, with those it
        has.
        """
        unknown = [name for name in classes if name not in self.classes]
        if unknown:
            raise InputError(
                f"{self.name} has not learned {', '.join(unknown)}; ask it about"
                f" {', '.join(self.classes)}"
            )

    def detect(
        self, image: Image.Image, classes: Sequence[str], score_min: float
    ) -> ScoredBoxes:
        """Return boxes [N, 4] xyxy pixels of the upright image and probabilities [N,
        len(classes)], best first; a box that has several classes is returned once.
        """
        image = upright_rgb(image, self.intensity_range)
        detections = self.predictor(image)
        columns = [self.classes.index(name) for name in classes]
        scores = detections.probs[:, columns].numpy()
        boxes = detections.boxes.numpy()
        return select_boxes(boxes, scores, image.size, score_min, DUPLICATE_IOU)

    def detect_batch(
        self, images: Sequence[Image.Image], classes: Sequence[str], score_min: float
    ) -> list[ScoredBoxes]:
        return [self.detect(image, classes, score_min) for image in images]


def load_served_predictor(path: str) -> PredictorAdapter:
    """Open a trained detector as ``coin_ray.load`` does; it is named after its folder,
    or a Co-DETR's file. Raises InputError if it is none.
    """
    return PredictorAdapter(open_predictor(path), _name_from_path(path))


def _name_from_path(path: str) -> str:
    pure_path = PurePath(path.rstrip("/"))
    if pure_path.suffix == ".pt":
        return pure_path.stem
    if pure_path.suffix in FILE_SUFFIXES:
        pure_path = pure_path.parent
    return pure_path.name or "student"
