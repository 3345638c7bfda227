"""Whether an exported file finds what the model finds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from torchvision.ops import box_iou

from coin_ray.errors import InputError
from coin_ray.structures import Detections

IOU_MIN, SCORE_TOLERANCE = 0.99, 1e-3
Predict = Callable[[Image.Image], Detections]


@dataclass(frozen=True)
class Equality:
    """``unmatched``: detections of one that the other lacks; those within the tolerance
    of the lowest score, which may fall on either side of it, are counted in
    ``at_limit`` instead. ``iou_min`` and ``score_difference_max`` are of the matched
    ones.
    """

    images: int
    detections: int
    unmatched: int
    at_limit: int
    iou_min: float
    score_difference_max: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    reference: Predict,
    exported: Predict,
    images: Iterable[Image.Image],
    score_min: float,
) -> Equality:
    """Match each image's detections: same label, IoU >= .99, scores at most .001 apart."""
    count = total = unmatched = at_limit = 0
    iou_min, difference_max = 1.0, 0.0
    for image in images:
        ours, theirs = reference(image), exported(image)
        matched, ious, differences = match(ours, theirs)
        lonely = torch.cat(
            [ours.scores[~matched.any(1)], theirs.scores[~matched.any(0)]]
        )
        near = int((lonely <= score_min + SCORE_TOLERANCE).sum())
        count, total = count + 1, total + len(ours)
        unmatched, at_limit = unmatched + len(lonely) - near, at_limit + near
        if bool(matched.any()):
            best = torch.where(matched, ious, torch.tensor(-1.0)).max(1)
            paired = best.values >= 0
            iou_min = min(iou_min, float(best.values[paired].min()))
            difference_max = max(
                difference_max,
                float(differences.gather(1, best.indices[:, None])[paired].max()),
            )
    return Equality(
        count, total, unmatched, at_limit, round(iou_min, 6), round(difference_max, 7)
    )


def match(
    ours: Detections, theirs: Detections
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which are equal [N, M], their IoUs [N, M], and differences of scores [N, M]."""
    ious = box_iou(ours.boxes, theirs.boxes)
    differences = (ours.scores[:, None] - theirs.scores[None]).abs()
    same = ours.labels[:, None] == theirs.labels[None]
    return (
        same & (ious >= IOU_MIN) & (differences <= SCORE_TOLERANCE),
        ious,
        differences,
    )


def require(name: str, found: Equality) -> None:
    """Raises InputError if the exported file does not find what the model finds."""
    if found.unmatched:
        raise InputError(
            f"{name} and the model differ: {found.unmatched} of {found.detections}"
            f" detections in {found.images} images have no counterpart of the same"
            f" class with IoU >= {IOU_MIN} and a score within {SCORE_TOLERANCE};"
            " nothing that was written should be used"
        )
