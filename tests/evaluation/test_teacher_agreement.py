from __future__ import annotations

import pyarrow as pa
import torch

from coin_ray.evaluation.teacher_agreement import ckg_agreement_rates, teacher_confusion
from coin_ray.tables import NO_LABEL, SEPARATION

CAR, DOG, NOTHING = [0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]
UNSURE = [0.35, 0.05, 0.6]
"""Of a box that is called a car and may well be nothing."""


def test_confusion_counts_boxes_of_both_teachers_by_both_labels() -> None:
    row = {
        "image_id": "a",
        "boxes": [[0.0] * 4] * 4,
        "kind": ["consistent", "inconsistent", "inconsistent", "private"],
        "cloud_labels": [0, 0, 1, 0],
        "clip_labels": [0, 2, 0, NO_LABEL],
        "cloud_probs": [UNSURE, CAR, DOG, CAR],
    }
    table = pa.Table.from_pylist(
        [row | {"clip_probs": [UNSURE, NOTHING, CAR, [0.0, 0, 0]]}], schema=SEPARATION
    )
    counts = teacher_confusion([table, SEPARATION.empty_table()], 2)
    assert counts.tolist() == [[1, 0, 1], [1, 0, 0], [0, 0, 0]]


def test_agreement_rates_of_ckg_with_each_teacher_and_how_often_it_is_right() -> None:
    cloud, clip = (
        torch.tensor([UNSURE, CAR, UNSURE, CAR, DOG]),
        torch.tensor([CAR, DOG, DOG, DOG, NOTHING]),
    )
    fused = torch.tensor([DOG, CAR, CAR, DOG, CAR])
    # on the first box the teachers agree
    rates = ckg_agreement_rates(cloud, clip, fused, torch.tensor([0, 0, 1, 1, 1]))
    assert rates == {
        "cloud": {"share": 0.5, "right": 0.5},
        "clip": {"share": 0.25, "right": 1.0},
        "neither": {"share": 0.25, "right": 0.0},
    }


def test_a_label_never_taken_is_neither_right_nor_wrong() -> None:
    car = torch.tensor([CAR])
    assert ckg_agreement_rates(car, torch.tensor([DOG]), car, torch.tensor([0])) == {
        "cloud": {"share": 1.0, "right": 1.0},
        "clip": {"share": 0.0},
        "neither": {"share": 0.0},
    }
    assert ckg_agreement_rates(car, car, car, torch.tensor([0])) == {}
    assert (
        ckg_agreement_rates(
            torch.zeros(0, 1),
            torch.zeros(0, 1),
            torch.zeros(0, 1),
            torch.zeros(0, dtype=torch.int64),
        )
        == {}
    )
