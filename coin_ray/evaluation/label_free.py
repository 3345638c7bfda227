"""How good a student is, judged without labels: by what its teachers' fusion is sure
of, in images it was not trained on.

Such a box stands for truth. What the fusion is not sure of is neither required nor
wrong. This sorts students; it is not their accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torchvision.ops import box_iou

from coin_ray.evaluation.voc import average_precision
from coin_ray.structures import Detections
from coin_ray.tables import Truth

IOU = 0.5
CONFIDENT_SCORE = 0.5
"""Score from which a teacher's detection is expected of the student too."""
BINS = 10
WEIGHTS = {"agreement": 4, "disagreement": -1, "miscalibration": -1}
Results = Mapping[str, Detections]


def label_free_score(
    student: Results, teacher: Results, expected: Mapping[str, Truth], num_classes: int
) -> dict[str, float]:
    """``agreement`` (AP50 on expected boxes), ``disagreement`` of student and teacher,
    ``miscalibration``, and the ``score`` of all three, each in 0..1.

    ``expected``: by image, from ``confident_detections`` of the teachers' fusion; all three
    are measured over its images.
    """
    nothing = Detections.empty(num_classes)
    teachers = {
        image: confident_detections(teacher.get(image, nothing)) for image in expected
    }
    parts = {
        "agreement": _known(average_precision(student, expected, num_classes).map, 0.0),
        "disagreement": (
            1 - _known(average_precision(student, teachers, num_classes).map, 0.0)
        ),
        "miscalibration": miscalibration(student, expected),
    }
    score = sum(
        abs(w) * (parts[name] if w > 0 else 1 - parts[name])
        for name, w in WEIGHTS.items()
    )
    return {"score": score / sum(abs(w) for w in WEIGHTS.values()), **parts}


def confident_detections(found: Detections) -> Truth:
    """What is expected of a student of an image in which a teacher, or both together,
    ``found`` this: the boxes of which it is sure. The others are neither required nor
    wrong, under their name.
    """
    sure = found.scores >= CONFIDENT_SCORE
    boxes, labels = (
        torch.cat([values[sure], values[~sure]])
        for values in (found.boxes, found.labels)
    )
    return Truth(boxes, labels, torch.arange(len(found)) >= int(sure.sum()))


def miscalibration(student: Results, expected: Mapping[str, Truth]) -> float:
    """Expected calibration error over ten bins: |mean score - share confirmed by an
    expected box|. 1 without detections to judge.
    """
    judged = [
        _judged(student[image], truth)
        for image, truth in expected.items()
        if image in student
    ]
    scores = torch.cat([s for s, _ in judged] or [torch.zeros(0)])
    confirmed = torch.cat([c for _, c in judged] or [torch.zeros(0)])
    if not len(scores):
        return 1.0  # else a student that sees nothing would be praised for it
    bins = (scores * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS).index_add_(0, bins, scores - confirmed)
    return float(gaps.abs().sum() / len(scores))


def _judged(found: Detections, truth: Truth) -> tuple[Tensor, Tensor]:
    """Scores and verdicts (1: confirmed) of the detections that lie on no box which is
    neither required nor wrong.
    """
    same = found.labels[:, None] == truth.labels[None]
    hits = (box_iou(found.boxes, truth.boxes) > IOU) & same
    confirmed, open_ = hits[:, ~truth.difficult].any(1), hits[:, truth.difficult].any(1)
    judged = confirmed | ~open_
    return found.scores[judged], confirmed[judged].float()


def _known(value: float, otherwise: float) -> float:
    return otherwise if value != value else value
