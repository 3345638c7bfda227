"""The exported student: one safetensors file and its description. Needs torch and
open_clip's code, no downloaded weights and no text encoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from open_clip.modified_resnet import ModifiedResNet
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor, nn
from torchvision.models import mobilenet_v2
from torchvision.transforms.functional import pil_to_tensor

from coin_ray import boxes as box_ops
from coin_ray import storage
from coin_ray.config import Detector
from coin_ray.config.co_detr import CoDetr
from coin_ray.data.augmentation import resize_to_fit
from coin_ray.data.pixels import IntensityRange, upright_rgb
from coin_ray.errors import InputError
from coin_ray.models.co_detr.regional import DetrWithRegionHead, RegionalDetr
from coin_ray.models.co_detr.text import TextDetr
from coin_ray.models.faster_rcnn_clip.embeddings import ClassVectors
from coin_ray.models.faster_rcnn_clip.model import ClipDetector
from coin_ray.models.faster_rcnn_clip.tower import ClipTower, MobileNetTower, Tower
from coin_ray.models.students.base import DetectorStudent
from coin_ray.models.students.building import (
    describe_student,
    is_detector_student,
    student_from_description,
)
from coin_ray.predictors.saved_settings import tuples_from_lists
from coin_ray.structures import Detections

FORMAT = 1
STUDENT_FILES = ("model.json", "model.safetensors")
RegionDetector = ClipDetector | TextDetr | DetrWithRegionHead
StudentDetector = ClipDetector | TextDetr | DetrWithRegionHead | DetectorStudent


@dataclass(frozen=True, eq=False)
class StudentPredictor:
    """A ``Predictor`` with a student; ``settings`` hold the input sizes it was trained
    on, ``intensity_range`` is that of the deep grey images it was trained on.
    """

    classes: tuple[str, ...]
    detector: StudentDetector
    settings: Detector
    intensity_range: IntensityRange | None = None

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> Detections:
        """Return the detections in pixels of the upright ``image``, best first."""
        settings = self.settings
        pixels = pil_to_tensor(upright_rgb(image, self.intensity_range))
        if is_detector_student(self.detector):
            return self.detector.predict([pixels])[0]
        resized = resize_to_fit(pixels, settings.short_side, settings.long_side)
        detections = self.detector.predict(self.detector.prepare([resized]))[0]
        x_factor = pixels.shape[2] / resized.shape[2]
        y_factor = pixels.shape[1] / resized.shape[1]
        boxes = box_ops.scale_boxes(detections.boxes, x_factor, y_factor)
        return detections.with_boxes(boxes)


def write_exported_student(
    detector: StudentDetector,
    classes: Sequence[str],
    folder: str,
    settings: Detector | None = None,
    intensity_range: IntensityRange | None = None,
) -> int:
    """Write both files below ``folder`` (a URI); return the size of the weights in bytes.

    ``settings``: the run's, with the input sizes; a ClipDetector has its own.
    ``intensity_range``: of the run's deep grey images.
    """
    description: dict[str, Any] = {"format": FORMAT, "classes": list(classes)}
    if is_detector_student(detector):
        weights = {
            name: tensor.detach().clone()  # a file holds no tensor twice
            for name, tensor in detector.state_dict().items()
        }
        description["student"] = describe_student(detector)
    else:
        settings = detector.config if isinstance(detector, ClipDetector) else settings
        assert settings is not None, (
            "a Co-DETR does not hold the settings of its input size"
        )
        weights, description["embedding_size"] = _exported_weights(detector)
        description |= _describe_network(detector, settings)
    if intensity_range is not None:
        description["intensity_range"] = list(intensity_range)
    file_bytes = save(weights)
    storage.write_bytes(storage.join(folder, "model.safetensors"), file_bytes)
    storage.write_json(storage.join(folder, "model.json"), description)
    return len(file_bytes)


def _exported_weights(detector: RegionDetector) -> tuple[dict[str, Tensor], int]:
    """Return the weights with the class embeddings computed, and the embedding size."""
    network: ClipDetector | TextDetr | RegionalDetr
    if isinstance(detector, DetrWithRegionHead):
        network, prompts = detector.student, "base.prompts."
    else:
        network, prompts = detector, "prompts."
    weights = {
        name: weight.contiguous()
        for name, weight in network.state_dict().items()
        if not name.startswith((prompts, "background"))
    }
    embeddings = network.class_embeddings().detach().contiguous()
    weights[f"{prompts}values"] = embeddings
    return weights, embeddings.shape[1]


def _describe_network(
    detector: RegionDetector, settings: Detector
) -> dict[str, object]:
    by_regions = isinstance(detector, DetrWithRegionHead)
    base = (
        detector.student.base if isinstance(detector, DetrWithRegionHead) else detector
    )
    visual: dict[str, int | list[int]] = {}
    if isinstance(base.tower, ClipTower):
        visual = visual_shape(base.tower.visual)
    description: dict[str, object] = {
        "visual": visual,
        "detector": dataclasses.asdict(settings),
    }
    if isinstance(base, TextDetr):
        description["co_detr"] = {
            "named": base.has_text_classes,
            "network": dataclasses.asdict(base.config),
            "detects": "regions" if by_regions else "decoder",
        }
    return description


def load_exported_student(folder: str) -> StudentPredictor:
    """Read the student in an export's folder (a URI). Raises InputError if there is none
    or it was written by another version.
    """
    uri = storage.join(folder, "model.json")
    if not storage.exists(uri):
        raise InputError(
            f"{folder} holds no exported student: expected {' and '.join(STUDENT_FILES)},"
            " as written by coin-ray adapt and coin-ray export"
        )
    description: dict[str, Any] = storage.read_json(uri)
    if description["format"] != FORMAT:
        raise InputError(
            f"{uri} has format {description['format']}, this version reads {FORMAT};"
            " export the model again"
        )
    weights = load(storage.read_bytes(storage.join(folder, "model.safetensors")))
    intensity_range = None
    if description.get("intensity_range") is not None:
        low, high = description["intensity_range"]
        intensity_range = low, high
    classes = tuple(description["classes"])
    if "student" in description:
        student = student_from_description(description["student"], len(classes))
        _load_weights(cast("nn.Module", student), weights, folder)
        student.eval()
        return StudentPredictor(classes, student, Detector(), intensity_range)
    # whatever was learned is in the embeddings
    fields = tuples_from_lists(description["detector"]) | {"background": "prompt"}
    settings = Detector(**fields)
    detector = _empty_detector(description, settings)
    network = detector.student if isinstance(detector, DetrWithRegionHead) else detector
    _load_weights(network, weights, folder)
    return StudentPredictor(classes, detector.eval(), settings, intensity_range)


def _load_weights(
    network: nn.Module, weights: Mapping[str, Tensor], folder: str
) -> None:
    """Raise InputError if the weights are not those of the described network."""
    try:
        missing, unexpected = network.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise InputError(
            f"{folder}: weights and model.json do not belong together ({error})"
        ) from error
    if unexpected or [name for name in missing if name != "background"]:
        raise InputError(
            f"{folder}: weights and model.json do not belong together (missing"
            f" {missing[:3]}, unexpected {unexpected[:3]})"
        )


def _empty_detector(
    description: Mapping[str, Any], settings: Detector
) -> RegionDetector:
    """Build the described detector, its weights still to be loaded."""
    count = len(description["classes"])
    size = description["embedding_size"]
    prompts = ClassVectors(torch.zeros(count + 1, size), learned=False)
    tower = empty_tower(settings, description["visual"])
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if "co_detr" not in description:
        return ClipDetector(tower, prompts, count, size, settings, mean, std)
    co_detr = description["co_detr"]
    network = CoDetr(**tuples_from_lists(co_detr["network"]))
    base = TextDetr(
        tower,
        prompts,
        count,
        size,
        network,
        has_text_classes=co_detr["named"],
        mean=mean,
        std=std,
    )
    if co_detr.get("detects") == "regions":
        return DetrWithRegionHead(RegionalDetr(base, size, settings))
    return base


def empty_tower(config: Detector, visual: Mapping[str, Any]) -> Tower:
    """Build a tower of the exported kind and shape, its weights still to be loaded."""
    if config.backbone == "mobilenet_v2":
        return MobileNetTower(mobilenet_v2(), config.batch_norm)
    network = ModifiedResNet(output_dim=1, heads=1, **visual)
    return ClipTower(network, config.batch_norm)


def visual_shape(visual: nn.Module) -> dict[str, int | list[int]]:
    """Return the arguments that rebuild a ModifiedResNet (of ``detector.backbone`` clip)
    of the same shape; attention pooling is not part of a detector.
    """
    stages = [getattr(visual, f"layer{number}") for number in range(1, 5)]
    size: Any = visual.image_size
    last_stem_layer: Any = visual.conv3
    return {
        "layers": [len(stage) for stage in stages],
        "width": int(last_stem_layer.out_channels),
        "image_size": size if isinstance(size, int) else size[0],
    }
