"""Judge trained students of one run without labels: by the boxes on which both teachers
agree.

Such a box stands for truth. Boxes on which the teachers disagree, or that only one of
them has, are neither required nor wrong. So a student is not preferred for having
learned from one teacher more than from the other. The score ranks the students of one
run; it is not an accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from coin_ray.evaluation.voc import average_precision
from coin_ray.structures import Detections
from coin_ray.tables import Truth

AGREED_KINDS = frozenset({"consistent", "reviewed"})


def agreed_boxes(separation: Iterable[Mapping[str, Any]]) -> dict[str, Truth]:
    """Return by image id the boxes of ``SEPARATION`` rows as truth: required where both
    teachers, or a person, gave box and label; difficult where not. Images without a
    required box are left out, since an empty image may be one that both overlooked.
    """
    truth: dict[str, Truth] = {}
    for row in separation:
        is_agreed = torch.tensor([kind in AGREED_KINDS for kind in row["kind"]])
        if not is_agreed.any():
            continue
        boxes = torch.tensor(row["boxes"], dtype=torch.float32).reshape(-1, 4)
        labels = torch.tensor(row["cloud_labels"], dtype=torch.int64)
        truth[row["image_id"]] = Truth(boxes, labels, ~is_agreed)
    return truth


def agreement_score(
    detections: Mapping[str, Detections],
    agreed: Mapping[str, Truth],
    num_classes: int,
) -> float:
    """Return a student's mAP50 in 0..1 on ``agreed_boxes``; 0 if there are none."""
    mean_ap = average_precision(detections, agreed, num_classes).map
    return 0.0 if math.isnan(mean_ap) else mean_ap
