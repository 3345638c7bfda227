"""transformers' RT-DETRv2 and D-FINE, trained with the ATSS head on the maps of their
encoder. Their plain model is exported.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coin_ray import boxes as box_ops
from coin_ray.config.co_detr import CoDetr
from coin_ray.errors import ConfigError, InputError
from coin_ray.models.base import Images
from coin_ray.models.co_detr.atss import Atss
from coin_ray.models.co_detr.collaborative import Objective
from coin_ray.models.co_detr.model import top_detections
from coin_ray.models.co_detr.pyramid import Maps, new_downsampling
from coin_ray.models.co_detr.targets import DetrTargets, validate_targets
from coin_ray.parallel import worker_count
from coin_ray.structures import Detections

MODEL_TYPES = {"rt-detr-v2": "rt_detr_v2", "d-fine": "d_fine"}
"""transformers' ``model_type`` of each ``--model``."""
CELL = 32
ATSS = "atss"


class TransformersDetr(nn.Module):
    """``network``: transformers' model for object detection; ``processor``: its image
    processor, which stretches images to one size.
    """

    def __init__(self, network: Any, processor: Any, detections: int = 100) -> None:
        super().__init__()
        self.network, self.processor, self.limit = network, processor, detections

    @property
    def classes(self) -> tuple[str, ...]:
        names = self.network.config.id2label
        return tuple(names[number] for number in sorted(names))

    def prepare(self, images: Sequence[Tensor]) -> Images:
        """Stretch uint8 images [3, H, W] of any sizes to one size and make them one
        batch; ``sizes`` are those before.
        """
        features = self.processor(
            images=list(images), return_tensors="pt", input_data_format="channels_first"
        )
        pixels = features["pixel_values"].to(self.network.device)
        return Images(pixels, tuple((int(i.shape[1]), int(i.shape[2])) for i in images))

    @torch.no_grad()
    def predict(self, images: Images) -> list[Detections]:
        """Return the best (query, class) pairs in the frame of each image before it was
        stretched.
        """
        predicted = self.network(pixel_values=images.pixels)
        scores = predicted.logits.float().sigmoid()
        boxes = predicted.pred_boxes.float()
        return [
            top_detections(image_scores, image_boxes, size, self.limit, 0.0)
            for image_scores, image_boxes, size in zip(
                scores, boxes, images.sizes, strict=True
            )
        ]


class CollaborativeTransformersDetr(nn.Module):
    """``base`` is the detector; the head beside it is dropped after training."""

    def __init__(self, base: TransformersDetr, config: CoDetr) -> None:
        super().__init__()
        self.base, network = base, base.network.config
        width = network.encoder_hidden_dim
        self.strides = [*network.feat_strides, 2 * network.feat_strides[-1]]
        self.weight = config.auxiliary_weight * network.decoder_layers
        self.down = new_downsampling(width) if config.auxiliary else None
        self.heads = nn.ModuleDict()
        if config.auxiliary:
            head_config = replace(config, width=width)
            self.heads[ATSS] = Atss(head_config, len(base.classes), len(self.strides))

    def predict(self, images: Images) -> list[Detections]:
        return self.base.predict(images)

    def objective(
        self,
        images: Images,
        targets: Sequence[DetrTargets],
        generator: torch.Generator | None = None,
    ) -> Objective:
        """Return the detector's own losses, and layers * lambda 2 * ATSS (arXiv
        2211.12860, eq. 6). Raises InputError as CollaborativeDetr does.

        The detector's own losses are transformers': they divide by each worker's own
        number of objects and ignore weights and ignored regions.
        """
        valid_targets = validate_targets(targets, images.sizes, len(self.base.classes))
        targets = [t.to(images.pixels.device) for t in valid_targets]
        _require_weights_of_one(targets)
        labels = [
            {"class_labels": t.labels, "boxes": t.normalised_boxes(size)}
            for t, size in zip(targets, images.sizes, strict=True)
        ]
        predicted = self.base.network(pixel_values=images.pixels, labels=labels)
        losses = {
            f"decoder_{name}": loss / worker_count()
            for name, loss in predicted.loss_dict.items()
        }
        if self.down is None:
            return Objective(losses, {})
        levels = list(predicted.encoder_last_hidden_state)
        levels.append(self.down(levels[-1]))
        input_size = int(images.pixels.shape[2]), int(images.pixels.shape[3])
        maps = Maps(levels, self.strides, (input_size,) * len(targets))
        stretched = [
            _stretch(t, size, input_size)
            for t, size in zip(targets, images.sizes, strict=True)
        ]
        outputs = self.heads[ATSS](maps, stretched, generator)
        for part, loss in outputs.losses.items():
            losses[f"{ATSS}_{part}"] = self.weight * Atss.weights[part] * loss
        return Objective(losses, {ATSS: sum(len(p) for p in outputs.positives)})


def _stretch(
    targets: DetrTargets, size: tuple[int, int], input_size: tuple[int, int]
) -> DetrTargets:
    """Scale boxes in an image of ``size`` to ``input_size`` (height, width)."""
    y, x = input_size[0] / size[0], input_size[1] / size[1]
    return DetrTargets(
        box_ops.scale_boxes(targets.boxes, x, y),
        targets.labels,
        targets.weights,
        box_ops.scale_boxes(targets.ignored_boxes, x, y),
    )


def _require_weights_of_one(targets: Sequence[DetrTargets]) -> None:
    if any(bool((t.object_weights != 1).any()) for t in targets):
        raise InputError(
            "the losses of RT-DETRv2 and D-FINE do not support weights of objects: give"
            " weights of 1, or train a Co-DETR"
        )


def load_transformers_detr(
    name: str, model: str, classes: Sequence[str], detections: int = 100
) -> TransformersDetr:
    """Load a detector by its name on the hub or its folder; classifiers of other
    classes are initialised anew.

    Raises ConfigError without transformers and for another kind of model, InputError if
    it can't be loaded.
    """
    transformers = _transformers(model)
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(_unavailable_message(name, error)) from None
    if config.model_type != MODEL_TYPES[model]:
        raise ConfigError(
            f"--network {name} is a {config.model_type} model; --model {model} trains"
            f" {MODEL_TYPES[model]} models"
        )
    config.id2label = dict(enumerate(classes))
    config.label2id = {label: number for number, label in config.id2label.items()}
    return _load_pretrained_detr(
        transformers, name, detections, config=config, ignore_mismatched_sizes=True
    )


def open_transformers_detr(
    folder: str, model: str, detections: int = 100
) -> TransformersDetr:
    """Open a local folder of the files that ``pack_transformers_detr`` returns."""
    return _load_pretrained_detr(_transformers(model), folder, detections)


def pack_transformers_detr(detector: TransformersDetr) -> dict[str, bytes]:
    """Return the files of transformers' own folder: ``save_pretrained`` of the model
    and of its image processor.
    """
    with tempfile.TemporaryDirectory() as folder:
        detector.network.save_pretrained(folder)
        detector.processor.save_pretrained(folder)
        return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}


def _load_pretrained_detr(
    transformers: Any, name: str, detections: int, **options: Any
) -> TransformersDetr:
    model_class = transformers.AutoModelForObjectDetection
    try:
        network = model_class.from_pretrained(name, **options)
        processor = transformers.AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(_unavailable_message(name, error)) from None
    size, pads = dict(processor.size), bool(processor.do_pad)
    sides = [size.get("height"), size.get("width")]
    has_fixed_size = all(side and side % CELL == 0 for side in sides)
    if pads or not processor.do_resize or not has_fixed_size:
        raise InputError(
            f"{name}: the image processor must stretch images to one height and width,"
            f" multiples of {CELL}; got size {size}, do_resize {processor.do_resize},"
            f" do_pad {pads}. Change preprocessor_config.json"
        )
    return TransformersDetr(network.float(), processor, detections)


def _transformers(model: str) -> Any:
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            f"--model {model} needs transformers: pip install 'coin-ray[teachers]'"
        ) from None
    return transformers


def _unavailable_message(name: str, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0][:200]
    if os.path.isdir(name):
        return (
            f"{name} is no model folder of transformers (expected config.json,"
            f" model.safetensors, preprocessor_config.json): {reason}"
        )
    return (
        f"{name} is neither a local folder nor in the cache, and could not be"
        f" downloaded ({reason}). Offline? Give a folder: --network FOLDER"
    )
