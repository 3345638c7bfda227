"""A trained Co-DETR as one file: weights, class names, sizes and the shape of its
backbone. Of training's own parts at most heads are in it.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from coin_ray import boxes as box_ops
from coin_ray import storage
from coin_ray.config.co_detr import Backbone, CoDetr
from coin_ray.config.detector_training import DetectorConfig
from coin_ray.data.augmentation import fit
from coin_ray.errors import InputError
from coin_ray.models.co_detr.agreement import agreed
from coin_ray.models.co_detr.collaborative import (
    AGREEMENT,
    DECODER,
    SHIPPED,
    CollaborativeDetr,
)
from coin_ray.models.co_detr.model import DeformableDetr, load_weights
from coin_ray.models.co_detr.towers import describe, rebuild
from coin_ray.structures import Detections

FILE = "co_detr.pt"
FORMAT = 1


@dataclass(frozen=True, eq=False)
class CoDetrPredictor:
    """``classes`` and a detector; call it with a PIL image. ``whole``: the detector
    with the auxiliary heads that were shipped with it.

    ``reported``: confidences are the decoder's, or those that all heads share.
    """

    classes: tuple[str, ...]
    detector: DeformableDetr
    short_side: int
    long_side: int
    whole: CollaborativeDetr | None = None
    reported: str = DECODER

    def to(self, device: torch.device) -> CoDetrPredictor:
        (self.whole or self.detector).to(device)
        return self

    def __call__(self, image: Image.Image) -> Detections:
        """Detections in pixels of ``image``, best first."""
        return self.many([pil_to_tensor(image.convert("RGB"))])[0]

    @torch.no_grad()
    def many(self, originals: Sequence[Tensor]) -> list[Detections]:
        """Of uint8 images [3, H, W] in one batch: detections, on the CPU, in pixels of
        each.
        """
        if self.reported == AGREEMENT:
            return self.opinions(originals)[AGREEMENT]
        views = self._views(originals)
        return _in_originals(
            self.detector.predict(self.detector.prepare(views)), originals, views
        )

    @torch.no_grad()
    def opinions(self, originals: Sequence[Tensor]) -> dict[str, list[Detections]]:
        """As ``many``, of every head by name; and the decoder's boxes with the
        confidences that all heads share, as ``agreement``.

        Raises InputError if there are no auxiliary heads in the file.
        """
        if self.whole is None:
            raise InputError(
                "this Co-DETR was shipped without its auxiliary heads: train with"
                " --ship heads or --ship agreement"
            )
        views = self._views(originals)
        found = {
            n: _in_originals(d, originals, views)
            for n, d in self.whole.opinions(self.detector.prepare(views)).items()
        }
        decoder, *others = found.values()
        return found | {
            AGREEMENT: [
                agreed(own, seen) for own, *seen in zip(decoder, *others, strict=True)
            ]
        }

    def _views(self, originals: Sequence[Tensor]) -> list[Tensor]:
        return [fit(image, self.short_side, self.long_side) for image in originals]


def _in_originals(
    found: Sequence[Detections], originals: Sequence[Tensor], views: Sequence[Tensor]
) -> list[Detections]:
    return [
        d.to(torch.device("cpu")).with_boxes(
            box_ops.scale(
                d.boxes.cpu(), o.shape[2] / v.shape[2], o.shape[1] / v.shape[1]
            )
        )
        for d, o, v in zip(found, originals, views, strict=True)
    ]


def packed(model: CollaborativeDetr, config: DetectorConfig) -> dict[str, Any]:
    """The file's content, for ``torch.save``."""
    detector, heads = model.base, {}
    if config.ship != "base":
        heads = {
            name: value
            for name, value in model.state_dict().items()
            if name.startswith(("pyramid.", "heads."))
        }
    return {
        "format": FORMAT,
        "kind": "co-detr",
        "classes": list(config.classes),
        "short_side": config.short_side,
        "long_side": config.long_side,
        "co_detr": dataclasses.asdict(config.co_detr),
        "backbone": dataclasses.asdict(config.backbone),
        "tower": describe(detector.backbone),
        "weights": {
            name: value.detach().cpu() for name, value in detector.state_dict().items()
        },
        "heads": {name: value.detach().cpu() for name, value in heads.items()},
        "reported": AGREEMENT if config.ship == "agreement" else DECODER,
    }


def load_co_detr(uri: str) -> CoDetrPredictor:
    """Read such a file. Raises InputError if it is none, or was written by another
    version.
    """
    if not storage.exists(uri):
        raise InputError(
            f"no such file: {uri}; expected {FILE}, as written by"
            " pipelines/train_detector.py"
        )
    try:
        content: Any = torch.load(
            io.BytesIO(storage.read_bytes(uri)), map_location="cpu", weights_only=True
        )
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise InputError(
            f"{uri} can't be read ({str(error)[:200]}); expected {FILE}, as written by"
            " pipelines/train_detector.py"
        ) from error
    if not isinstance(content, dict) or content.get("kind") != "co-detr":
        raise InputError(
            f"{uri} holds no Co-DETR; expected {FILE}, as written by"
            " pipelines/train_detector.py"
        )
    if content["format"] != FORMAT:
        raise InputError(
            f"{uri} has format {content['format']}, this version reads {FORMAT}; train"
            " or export the model again"
        )
    backbone = Backbone(**content["backbone"])
    settings: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in content["co_detr"].items()
    }
    classes, tower, config = (
        tuple(content["classes"]),
        rebuild(backbone, content["tower"]),
        CoDetr(**settings),
    )
    sides = content["short_side"], content["long_side"]
    if not content.get("heads"):
        detector = DeformableDetr(tower, len(classes), config)
        load_weights(detector, content["weights"])
        return CoDetrPredictor(classes, detector.eval(), *sides)
    whole = CollaborativeDetr(
        tower, len(classes), replace(config, positive_queries=False, denoising=0)
    )
    load_weights(
        whole,
        {f"{SHIPPED}{name}": value for name, value in content["weights"].items()}
        | content["heads"],
    )
    return CoDetrPredictor(
        classes, whole.eval().base, *sides, whole, content["reported"]
    )
