"""The exported student: one safetensors file and its description. Needs torch and
open_clip's code, no weights and no text encoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.modified_resnet import ModifiedResNet
from PIL import Image
from safetensors.torch import load, save
from torch import nn
from torchvision.models import mobilenet_v2
from torchvision.transforms.functional import pil_to_tensor

from coin_ray import boxes as box_ops
from coin_ray import storage
from coin_ray.config import Detector
from coin_ray.config.co_detr import CoDetr
from coin_ray.data.augmentation import fit
from coin_ray.errors import InputError
from coin_ray.models.co_detr.regional import ByRegions, RegionalDetr
from coin_ray.models.co_detr.text import TextDetr
from coin_ray.models.faster_rcnn_clip.embeddings import ClassVectors
from coin_ray.models.faster_rcnn_clip.model import ClipDetector
from coin_ray.models.faster_rcnn_clip.tower import ClipTower, MobileNetTower, Tower
from coin_ray.predictors.co_detr import FILE, CoDetrPredictor, load_co_detr
from coin_ray.structures import Detections

FORMAT = 1
Student = ClipDetector | TextDetr | ByRegions


@dataclass(frozen=True, eq=False)
class Predictor:
    """``classes``, a detector and the ``settings`` of the views it was trained on; call
    it with a PIL image.
    """

    classes: tuple[str, ...]
    detector: Student
    settings: Detector

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> Detections:
        """Detections in pixels of ``image``, best first."""
        original = pil_to_tensor(image.convert("RGB"))
        view = fit(original, self.settings.short_side, self.settings.long_side)
        found = self.detector.predict(self.detector.prepare([view]))[0]
        return found.with_boxes(
            box_ops.scale(
                found.boxes,
                original.shape[2] / view.shape[2],
                original.shape[1] / view.shape[1],
            )
        )


def write_exported(
    detector: Student,
    classes: Sequence[str],
    folder: str,
    settings: Detector | None = None,
) -> int:
    """Write the two files below ``folder`` (a URI); returns the weights' size in bytes.
    ``settings``: of the run; a ClipDetector knows them.
    """
    network, prompts = (
        (detector.student, "base.prompts.")
        if isinstance(detector, ByRegions)
        else (detector, "prompts.")
    )
    weights = {
        k: v.contiguous()
        for k, v in network.state_dict().items()
        if not k.startswith((prompts, "background"))
    }
    weights[f"{prompts}values"] = embeddings = (
        network.class_embeddings().detach().contiguous()
    )
    base = network.base if isinstance(network, RegionalDetr) else network
    settings = detector.config if isinstance(detector, ClipDetector) else settings
    assert settings is not None, "a Co-DETR does not know the settings of its views"
    description = {
        "format": FORMAT,
        "classes": list(classes),
        "embedding_size": embeddings.shape[1],
        "visual": (
            visual_shape(base.tower.visual) if isinstance(base.tower, ClipTower) else {}
        ),
        "detector": dataclasses.asdict(settings),
    }
    if isinstance(base, TextDetr):
        detects = "regions" if isinstance(detector, ByRegions) else "decoder"
        description["co_detr"] = {
            "named": base.named,
            "network": dataclasses.asdict(base.config),
            "detects": detects,
        }
    data = save(weights)
    storage.write_bytes(storage.join(folder, "model.safetensors"), data)
    storage.write_json(storage.join(folder, "model.json"), description)
    return len(data)


def load_exported(folder: str) -> Predictor | CoDetrPredictor:
    """Read an export: the folder of a student, or a Co-DETR's ``.pt`` file or the
    folder it is in.

    Raises InputError if there is none or it was written by another version.
    """
    if folder.endswith(".pt"):
        return load_co_detr(folder)
    place = storage.join(folder, "model.json")
    if not storage.exists(place) and storage.exists(storage.join(folder, FILE)):
        return load_co_detr(storage.join(folder, FILE))
    if not storage.exists(place):
        raise InputError(
            f"{folder} is no export: expected model.json and model.safetensors, as"
            f" written by pipelines/export.py, or {FILE}, as written by"
            " pipelines/train_detector.py"
        )
    return _load_student(folder, place)


def _load_student(folder: str, place: str) -> Predictor:
    description: dict[str, Any] = storage.read_json(place)
    if description["format"] != FORMAT:
        raise InputError(
            f"{place} has format {description['format']}, this version reads {FORMAT};"
            " export the model again"
        )
    # whatever was learned is in the embeddings
    fields = _fields(description["detector"]) | {"background": "prompt"}
    settings = Detector(**fields)
    classes = tuple(description["classes"])
    size = description["embedding_size"]
    prompts = ClassVectors(torch.zeros(len(classes) + 1, size), learned=False)
    tower = empty_tower(settings, description["visual"])
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    detector: Student
    if "co_detr" in description:
        network = CoDetr(**_fields(description["co_detr"]["network"]))
        named = description["co_detr"]["named"]
        base = TextDetr(
            tower, prompts, len(classes), size, network, named=named, mean=mean, std=std
        )
        regions = description["co_detr"].get("detects") == "regions"
        detector = ByRegions(RegionalDetr(base, size, settings)) if regions else base
    else:
        detector = ClipDetector(tower, prompts, len(classes), size, settings, mean, std)
    weights = load(storage.read_bytes(storage.join(folder, "model.safetensors")))
    missing, unexpected = (
        detector.student if isinstance(detector, ByRegions) else detector
    ).load_state_dict(weights, strict=False)
    if unexpected or [name for name in missing if name != "background"]:
        raise InputError(
            f"{folder}: weights and model.json do not belong together (missing"
            f" {missing[:3]}, unexpected {unexpected[:3]})"
        )
    return Predictor(classes, detector.eval(), settings)


def _fields(values: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def empty_tower(config: Detector, visual: dict[str, Any]) -> Tower:
    """A tower of the exported kind and shape, its weights still to be loaded."""
    if config.backbone == "mobilenet_v2":
        return MobileNetTower(mobilenet_v2(), config.batch_norm)
    return ClipTower(ModifiedResNet(output_dim=1, heads=1, **visual), config.batch_norm)


def visual_shape(visual: nn.Module) -> dict[str, Any]:
    """Arguments that rebuild a ModifiedResNet (of ``detector.backbone`` clip) of the
    same shape; attention pooling is not part of a detector.
    """
    stages = [getattr(visual, f"layer{i}") for i in range(1, 5)]
    size: Any = visual.image_size
    last_stem_layer: Any = visual.conv3
    return {
        "layers": [len(stage) for stage in stages],
        "width": int(last_stem_layer.out_channels),
        "image_size": size if isinstance(size, int) else size[0],
    }
