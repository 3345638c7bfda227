"""An exported student, or a trained Co-DETR, behind the local cloud."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from PIL import Image

from coin_ray.errors import InputError
from coin_ray.predictors.co_detr import CoDetrPredictor
from coin_ray.predictors.onnx_detectors import suppressed
from coin_ray.predictors.student import Predictor, load_exported
from coin_ray.serving.batching import Found

DUPLICATE_IOU = 0.7


@dataclass(frozen=True)
class StudentDetector:
    """Class vectors are the detector's foreground probabilities. Boxes below the
    export's own ``score_min`` don't exist.
    """

    predictor: Predictor | CoDetrPredictor
    name: str
    batch_max: int = 1

    @property
    def classes(self) -> Sequence[str]:
        return self.predictor.classes

    def check(self, classes: Sequence[str]) -> None:
        """Raises InputError for a class that the student has not learned, with those it
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
    ) -> Found:
        """Boxes [N, 4] xyxy pixels and probabilities [N, len(classes)], best first; a
        box that carries several classes comes once.
        """
        found = self.predictor(image)
        scores = found.probs[:, [self.classes.index(name) for name in classes]]
        return suppressed(
            found.boxes.numpy(), scores.numpy(), image.size, score_min, DUPLICATE_IOU
        )

    def detect_batch(
        self, images: Sequence[Image.Image], classes: Sequence[str], score_min: float
    ) -> list[Found]:
        return [self.detect(image, classes, score_min) for image in images]


def load_student(place: str) -> StudentDetector:
    """The student in an export's folder (a URI), or of its model.json or
    model.safetensors; or a Co-DETR's file. Raises InputError if it is none.
    """
    if place.endswith(".pt"):
        return StudentDetector(load_exported(place), PurePath(place).stem)
    folder, _, last = place.rstrip("/").rpartition("/")
    is_file = last in ("model.json", "model.safetensors")
    place = (folder or ".") if is_file else place
    return StudentDetector(load_exported(place), PurePath(place).name or "student")
