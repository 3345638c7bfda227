"""Comparison of an exported file's detections with the model's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou

from coin_ray.errors import InputError
from coin_ray.structures import Detections

IOU_MIN, SCORE_TOLERANCE = 0.99, 1e-3
Predict = Callable[[Image.Image], Detections]


@dataclass(frozen=True)
class ExportComparison:
    """``unmatched``: detections of one that the other lacks; those within the tolerance
    of the lowest score, which may fall on either side of it, are counted in
    ``at_limit`` instead. ``iou_min`` and ``score_difference_max``: over the matched
    ones.
    """

    images: int
    detections: int
    unmatched: int
    at_limit: int
    iou_min: float
    score_difference_max: float

    def as_json(self) -> dict[str, int | float]:
        return asdict(self)


def compare_predictions(
    reference: Predict,
    exported: Predict,
    images: Iterable[Image.Image],
    score_min: float,
) -> ExportComparison:
    """Match each image's detections: same label, IoU >= .99, scores at most .001 apart."""
    image_count = detection_count = unmatched = at_limit = 0
    iou_min, difference_max = 1.0, 0.0
    for image in images:
        expected, actual = reference(image), exported(image)
        matches = _match(expected, actual)
        image_count += 1
        detection_count += len(expected)
        scores = matches.unmatched_scores(expected, actual)
        near_limit = int((scores <= score_min + SCORE_TOLERANCE).sum())
        unmatched += len(scores) - near_limit
        at_limit += near_limit
        if bool(matches.equal.any()):
            ious, differences = matches.best_pairs()
            iou_min = min(iou_min, float(ious.min()))
            difference_max = max(difference_max, float(differences.max()))
    return ExportComparison(
        image_count,
        detection_count,
        unmatched,
        at_limit,
        round(iou_min, 6),
        round(difference_max, 7),
    )


@dataclass(frozen=True, eq=False)
class _Matches:
    """Of N expected and M actual detections: ``equal`` [N, M], ``ious`` [N, M] and
    ``differences`` of scores [N, M].
    """

    equal: Tensor
    ious: Tensor
    differences: Tensor

    def unmatched_scores(self, expected: Detections, actual: Detections) -> Tensor:
        """Return the scores of detections on either side that have no equal."""
        only_expected = expected.scores[~self.equal.any(1)]
        only_actual = actual.scores[~self.equal.any(0)]
        return torch.cat([only_expected, only_actual])

    def best_pairs(self) -> tuple[Tensor, Tensor]:
        """Return IoUs and differences of scores of each matched expected detection and
        the equal one that overlaps it most.
        """
        best = torch.where(self.equal, self.ious, torch.tensor(-1.0)).max(1)
        paired = best.values >= 0
        differences = self.differences.gather(1, best.indices[:, None])
        return best.values[paired], differences[paired]


def _match(expected: Detections, actual: Detections) -> _Matches:
    ious = box_iou(expected.boxes, actual.boxes)
    differences = (expected.scores[:, None] - actual.scores[None]).abs()
    same_label = expected.labels[:, None] == actual.labels[None]
    close = (ious >= IOU_MIN) & (differences <= SCORE_TOLERANCE)
    return _Matches(same_label & close, ious, differences)


def require_equal(name: str, comparison: ExportComparison) -> None:
    """Raise InputError if the exported file's detections differ from the model's."""
    if comparison.unmatched:
        raise InputError(
            f"{name} and the model differ: {comparison.unmatched} of"
            f" {comparison.detections} detections in {comparison.images} images have no"
            f" counterpart of the same class with IoU >= {IOU_MIN} and a score within"
            f" {SCORE_TOLERANCE}; do not use any of the written files"
        )
