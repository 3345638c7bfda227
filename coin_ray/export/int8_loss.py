"""What a quantized file loses against the one it was made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from torchvision.ops import box_iou

from coin_ray.evaluation.voc import average_precision
from coin_ray.export.equality import Predict
from coin_ray.structures import Detections
from coin_ray.tables import Truth

SHOWN, IOU_MIN = 0.3, 0.9
POINTS_MAX = 1.0
"""Loss of mAP50, in points, above which the file is not recommended."""


@dataclass(frozen=True)
class Int8Loss:
    """``detections``: of the float file above .3 on ``images``; ``found_again``: share
    of them that the quantized one finds with the same class and IoU >= .9;
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
        return (
            None
            if self.map50 is None or self.map50_int8 is None
            else round(100 * (self.map50 - self.map50_int8), 2)
        )

    @property
    def too_large(self) -> bool:
        return self.points is not None and self.points > POINTS_MAX

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"points": self.points, "too_large": self.too_large}


@dataclass(frozen=True, eq=False)
class Pair:
    exact: Predict
    int8: Predict


def int8_loss(
    pair: Pair,
    images: Iterable[Image.Image],
    labelled: Iterable[tuple[Image.Image, Truth]],
    classes: int,
    plus_one: bool = False,
) -> Int8Loss:
    """Both files on ``images`` and on annotated test images; ``plus_one`` as in
    ``average_precision``.
    """
    answers = [(pair.exact(image), pair.int8(image)) for image in images]
    differences = torch.cat(
        [torch.zeros(0), *(_differences(exact, int8) for exact, int8 in answers)]
    )
    again = differences[differences.isfinite()]
    truth, exact, int8 = {}, {}, {}
    for number, (image, annotated) in enumerate(labelled):
        name = f"{number:06d}"
        truth[name], exact[name], int8[name] = (
            annotated,
            pair.exact(image),
            pair.int8(image),
        )
    scores = [
        (
            average_precision(found, truth, classes, plus_one=plus_one).map
            if truth
            else None
        )
        for found in (exact, int8)
    ]
    return Int8Loss(
        len(answers),
        len(differences),
        round(len(again) / len(differences), 4) if len(differences) else None,
        round(float(again.mean()), 4) if len(again) else None,
        len(truth),
        *(None if s is None or s != s else round(s, 4) for s in scores),
    )


def _differences(exact: Detections, int8: Detections) -> torch.Tensor:
    """Of each shown detection: how far the score of its best counterpart is off;
    infinite without one.
    """
    shown = exact.scores > SHOWN
    scores, ious = exact.scores[shown], box_iou(exact.boxes[shown], int8.boxes)
    ious = torch.where(
        exact.labels[shown][:, None] == int8.labels[None], ious, torch.zeros(())
    )
    best, place = torch.cat([ious, torch.zeros(len(scores), 1)], 1).max(1)
    theirs = torch.cat([int8.scores, torch.tensor([torch.inf])])[place]
    return torch.where(best >= IOU_MIN, (scores - theirs).abs(), torch.inf)
