"""transformers' RT-DETRv2 and D-FINE, trained with the ATSS head on the maps of their
encoder. What is shipped is their plain model.
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
from coin_ray.models.co_detr.model import best_pairs
from coin_ray.models.co_detr.pyramid import Maps, one_below
from coin_ray.models.co_detr.targets import Targets, checked
from coin_ray.parallel import worker_count
from coin_ray.structures import Detections

KINDS = {"rt-detr-v2": "rt_detr_v2", "d-fine": "d_fine"}
"""What transformers calls them."""
CELL = 32
ATSS = "atss"


class FastDetector(nn.Module):
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
        """uint8 images [3, H, W] of any sizes -> one batch, all stretched to one size;
        ``sizes`` are those before.
        """
        made = self.processor(
            images=list(images), return_tensors="pt", input_data_format="channels_first"
        )
        return Images(
            made["pixel_values"].to(self.network.device),
            tuple((int(i.shape[1]), int(i.shape[2])) for i in images),
        )

    @torch.no_grad()
    def predict(self, images: Images) -> list[Detections]:
        """The best (query, class) pairs in the frame of each image before it was
        stretched.
        """
        seen = self.network(pixel_values=images.pixels)
        scores, boxes = seen.logits.float().sigmoid(), seen.pred_boxes.float()
        return [
            best_pairs(s, b, size, self.limit, 0.0)
            for s, b, size in zip(scores, boxes, images.sizes, strict=True)
        ]


class CoTrained(nn.Module):
    """``base`` is the detector; the head beside it is left behind after training."""

    def __init__(self, base: FastDetector, config: CoDetr) -> None:
        super().__init__()
        self.base, own = base, base.network.config
        self.strides = [*own.feat_strides, 2 * own.feat_strides[-1]]
        self.weight = config.auxiliary_weight * own.decoder_layers
        self.down = one_below(own.encoder_hidden_dim) if config.auxiliary else None
        shape = replace(config, width=own.encoder_hidden_dim)
        self.heads = nn.ModuleDict(
            {ATSS: Atss(shape, len(base.classes), len(self.strides))}
            if config.auxiliary
            else {}
        )

    def predict(self, images: Images) -> list[Detections]:
        return self.base.predict(images)

    def objective(
        self,
        images: Images,
        targets: Sequence[Targets],
        generator: torch.Generator | None = None,
    ) -> Objective:
        """The detector's own losses, and layers * lambda 2 * ATSS (arXiv 2211.12860,
        eq. 6). Raises InputError as CollaborativeDetr does.

        The detector's own losses are transformers': they count each worker's objects by
        themselves, know no weights and no ignored regions.
        """
        targets = [
            t.to(images.pixels.device)
            for t in checked(targets, images.sizes, len(self.base.classes))
        ]
        _check_weights(targets)
        labels = [
            {"class_labels": t.labels, "boxes": t.normalised(size)}
            for t, size in zip(targets, images.sizes, strict=True)
        ]
        seen = self.base.network(pixel_values=images.pixels, labels=labels)
        losses = {
            f"decoder_{name}": value / worker_count()
            for name, value in seen.loss_dict.items()
        }
        if self.down is None:
            return Objective(losses, {})
        levels = list(seen.encoder_last_hidden_state)
        side = int(images.pixels.shape[2]), int(images.pixels.shape[3])
        maps = Maps(
            [*levels, self.down(levels[-1])], self.strides, (side,) * len(targets)
        )
        found = self.heads[ATSS](
            maps,
            [
                _stretched(t, size, side)
                for t, size in zip(targets, images.sizes, strict=True)
            ],
            generator,
        )
        losses |= {
            f"{ATSS}_{part}": self.weight * Atss.weights[part] * value
            for part, value in found.losses.items()
        }
        return Objective(losses, {ATSS: sum(len(p) for p in found.positives)})


def _stretched(
    targets: Targets, size: tuple[int, int], side: tuple[int, int]
) -> Targets:
    """Boxes in pixels of an image of ``size`` as pixels of ``side`` (height, width)."""
    y, x = side[0] / size[0], side[1] / size[1]
    return Targets(
        box_ops.scale_boxes(targets.boxes, x, y),
        targets.labels,
        targets.weights,
        box_ops.scale_boxes(targets.left_out, x, y),
    )


def _check_weights(targets: Sequence[Targets]) -> None:
    if any(bool((t.certainty != 1).any()) for t in targets):
        raise InputError(
            "the losses of RT-DETRv2 and D-FINE know no weights of objects: give all 1,"
            " or train a Co-DETR"
        )


def load_fast(
    name: str, model: str, classes: Sequence[str], detections: int = 100
) -> FastDetector:
    """A detector by its name on the hub or its folder; classifiers of other classes are
    drawn anew.

    Raises ConfigError without transformers and for another kind of model, InputError if
    it can't be had.
    """
    transformers = _transformers(model)
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(_unavailable(name, error)) from None
    if config.model_type != KINDS[model]:
        raise ConfigError(
            f"--network {name} is a {config.model_type} model; --model {model} trains"
            f" {KINDS[model]} models"
        )
    config.id2label = dict(enumerate(classes))
    config.label2id = {label: number for number, label in config.id2label.items()}
    return _opened(
        transformers, name, detections, config=config, ignore_mismatched_sizes=True
    )


def open_fast(folder: str, model: str, detections: int = 100) -> FastDetector:
    """As ``saved`` wrote it into a local folder."""
    return _opened(_transformers(model), folder, detections)


def saved(detector: FastDetector) -> dict[str, bytes]:
    """The files of transformers' own folder: ``save_pretrained`` of the model and of
    its image processor.
    """
    with tempfile.TemporaryDirectory() as folder:
        detector.network.save_pretrained(folder)
        detector.processor.save_pretrained(folder)
        return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}


def _opened(
    transformers: Any, name: str, detections: int, **options: Any
) -> FastDetector:
    try:
        network = transformers.AutoModelForObjectDetection.from_pretrained(
            name, **options
        )
        processor = transformers.AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(_unavailable(name, error)) from None
    size, padded = dict(processor.size), bool(processor.do_pad)
    if (
        padded
        or not processor.do_resize
        or not all(
            size.get(side) and size[side] % CELL == 0 for side in ("height", "width")
        )
    ):
        raise InputError(
            f"{name}: the image processor must stretch images to one height and width,"
            f" multiples of {CELL}; got size {size}, do_resize {processor.do_resize},"
            f" do_pad {padded}. Change preprocessor_config.json"
        )
    return FastDetector(network.float(), processor, detections)


def _transformers(model: str) -> Any:
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            f"--model {model} needs transformers: pip install 'coin-ray[teachers]'"
        ) from None
    return transformers


def _unavailable(name: str, error: Exception) -> str:
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
