"""Accuracy that a quantized file loses against the float file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou

from coin_ray.evaluation.voc import average_precision
from coin_ray.export.equality import Predict
from coin_ray.structures import Detections
from coin_ray.tables import Truth

COMPARED_SCORE_MIN, COUNTERPART_IOU_MIN = 0.3, 0.9
MAP50_LOSS_MAX = 1.0
"""Loss of mAP50, in points, above which the file is not recommended."""


@dataclass(frozen=True)
class Int8Loss:
    """``detections``: of the float file above .3 on ``images``; ``found_again``: share
    of them that the quantized file detects with the same class and IoU >= .9;
    ``score_difference``: mean over those. ``map50``, ``map50_int8``: on ``labelled``
    images; None if there are none.
    """

    images: int
    detections: int
    found_again: float | None
    score_difference: float | None
    labelled: int
    map50: float | None
    map50_int8: float | None

    @property
    def points(self) -> float | None:
        """mAP50 lost, in points."""
        if self.map50 is None or self.map50_int8 is None:
            return None
        return round(100 * (self.map50 - self.map50_int8), 2)

    @property
    def too_large(self) -> bool:
        return self.points is not None and self.points > MAP50_LOSS_MAX

    def as_json(self) -> dict[str, int | float | bool | None]:
        return asdict(self) | {"points": self.points, "too_large": self.too_large}


@dataclass(frozen=True, eq=False)
class ModelPair:
    """The same model as float and as quantized file."""

    exact: Predict
    int8: Predict


def int8_loss(
    pair: ModelPair,
    images: Iterable[Image.Image],
    labelled: Iterable[tuple[Image.Image, Truth]],
    classes: int,
    plus_one: bool = False,
) -> Int8Loss:
    """Compare both files on ``images`` and on annotated test images; ``plus_one`` as in
    ``average_precision``.
    """
    per_image = [
        _score_differences(pair.exact(image), pair.int8(image)) for image in images
    ]
    differences = torch.cat([torch.zeros(0), *per_image])
    matched = differences[differences.isfinite()]
    truth: dict[str, Truth] = {}
    exact: dict[str, Detections] = {}
    int8: dict[str, Detections] = {}
    for number, (image, image_truth) in enumerate(labelled):
        image_id = f"{number:06d}"
        truth[image_id] = image_truth
        exact[image_id] = pair.exact(image)
        int8[image_id] = pair.int8(image)
    return Int8Loss(
        images=len(per_image),
        detections=len(differences),
        found_again=_share(len(matched), len(differences)),
        score_difference=round(float(matched.mean()), 4) if len(matched) else None,
        labelled=len(truth),
        map50=_map50(exact, truth, classes, plus_one),
        map50_int8=_map50(int8, truth, classes, plus_one),
    )


def _share(part: int, total: int) -> float | None:
    return round(part / total, 4) if total else None


def _map50(
    detections: Mapping[str, Detections],
    truth: Mapping[str, Truth],
    classes: int,
    plus_one: bool,
) -> float | None:
    if not truth:
        return None
    score = average_precision(detections, truth, classes, plus_one=plus_one).map
    return None if score != score else round(score, 4)


def _score_differences(exact: Detections, int8: Detections) -> Tensor:
    """Return for each compared detection how far the score of its best counterpart is
    off; infinite without one.
    """
    compared = exact[exact.scores > COMPARED_SCORE_MIN]
    ious = box_iou(compared.boxes, int8.boxes)
    same_label = compared.labels[:, None] == int8.labels[None]
    ious = torch.where(same_label, ious, torch.zeros(()))
    # a last column for detections without any counterpart
    no_counterpart = torch.zeros(len(compared), 1)
    best_ious, indices = torch.cat([ious, no_counterpart], 1).max(1)
    counterpart_scores = torch.cat([int8.scores, torch.tensor([torch.inf])])[indices]
    differences = (compared.scores - counterpart_scores).abs()
    return torch.where(best_ious >= COUNTERPART_IOU_MIN, differences, torch.inf)
