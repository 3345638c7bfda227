"""Describe how an ONNX detector with one output is shown images and read.

The description is FILE.onnx.json beside the model, with the fields of ``OnnxSignature``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from coin_ray import storage
from coin_ray.data.coco_classes import COCO_CLASSES
from coin_ray.errors import ConfigError
from coin_ray.predictors.scored_boxes import NMS_IOU

SHOWN_PROBLEMS = 3


@dataclass(frozen=True)
class OnnxSignature:
    """The defaults are those of YOLOX as published. Unknown fields are errors."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    classes: tuple[str, ...] = COCO_CLASSES
    boxes: Literal["raw", "cxcywh", "xyxy"] = "raw"
    """Offsets and logarithms of sizes in the cells of a grid; or decoded, in pixels of
    the network's input."""
    objectness: bool = True
    """A column with the score of any object precedes the scores of the classes."""
    layout: Literal["rows", "columns"] = "rows"
    """A candidate is a row of the output, or a column, as in YOLOv8."""
    strides: tuple[int, ...] = (8, 16, 32)
    input_size: tuple[int, int] = (640, 640)
    """Width and height where the model leaves them free."""
    resize: Literal["letterbox_corner", "letterbox_centre", "stretch"] = (
        "letterbox_corner"
    )
    padding: float = 114.0
    channels: Literal["bgr", "rgb"] = "bgr"
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Subtracted from pixels in 0..255, and what they are then divided by, in the order
    of ``channels``; 255 gives pixels in 0..1."""
    nms: Literal["class_wise", "class_agnostic"] = "class_wise"
    nms_iou: float = NMS_IOU

    def output_shape(
        self, input_size: tuple[int, int]
    ) -> tuple[int, int | None, int | None]:
        """Return the shape of the output for an input of (width, height); None: any."""
        values = 4 + int(self.objectness) + len(self.classes)
        candidates = None
        if self.boxes == "raw":
            width, height = input_size
            candidates = sum(-(-width // s) * -(-height // s) for s in self.strides)
        if self.layout == "columns":
            return 1, values, candidates
        return 1, candidates, values

    def summary(self) -> str:
        """Describe the signature in a few words."""
        objectness = "with" if self.objectness else "without"
        return (
            f"{len(self.classes)} classes, boxes {self.boxes}, {objectness} objectness"
        )


SIGNATURE = TypeAdapter(OnnxSignature)


def read_signature(path: str) -> OnnxSignature | None:
    """Read the description beside the model; None if there is none. Raises ConfigError
    for one that can't be read.
    """
    description = f"{path}.json"
    if not storage.exists(description):
        return None
    try:
        signature = SIGNATURE.validate_json(storage.read_bytes(description))
    except ValidationError as error:
        problems = []
        for problem in error.errors()[:SHOWN_PROBLEMS]:
            location = ".".join(str(part) for part in problem["loc"])
            problems.append(f"{location}: {problem['msg']}".lstrip(": "))
        raise ConfigError(
            f"{description} is no description of a detector: {'; '.join(problems)}"
        ) from None
    if not signature.classes or min(signature.std) <= 0 or min(signature.strides) < 1:
        raise ConfigError(
            f"{description} needs classes, and std and strides above 0; got"
            f" {len(signature.classes)} classes, std {signature.std}, strides"
            f" {signature.strides}"
        )
    return signature
