from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from coin_ray.evaluation.coco import coco_average_precision
from coin_ray.evaluation.voc import average_precision
from coin_ray.structures import Detections
from coin_ray.tables import Truth

GRID = torch.tensor(
    [[x, y, x + 20, y + 20] for x in (0, 40, 80) for y in (0, 40, 80)],
    dtype=torch.float32,
)


def _draw_grid_case(
    seed: int, images: int = 40, num_classes: int = 3
) -> tuple[dict[str, Detections], dict[str, Truth]]:
    """Truth boxes that don't touch, so that VOC and COCO match alike; no equal scores."""
    generator = torch.Generator().manual_seed(seed)
    predictions, annotated = {}, {}
    for image in range(images):
        labels = torch.randint(num_classes, (len(GRID),), generator=generator)
        annotated[str(image)] = Truth(
            GRID, labels, torch.zeros(len(GRID), dtype=torch.bool)
        )
        boxes = GRID + torch.rand(GRID.shape, generator=generator) * 9
        probs = torch.full((len(GRID), num_classes + 1), 1 / (num_classes + 1))
        flip = torch.rand(len(GRID), generator=generator) < 0.3
        guess = torch.where(flip, (labels + 1) % num_classes, labels)
        predictions[str(image)] = Detections(
            boxes, torch.rand(len(GRID), generator=generator), guess, probs
        )
    return predictions, annotated


@pytest.mark.parametrize("seed", range(3))
def test_ap50_agrees_with_voc(seed: int) -> None:
    case = _draw_grid_case(seed)
    # 101 recall points against all points: a grid of .01 in recall
    np.testing.assert_allclose(
        coco_average_precision(*case, 3).ap50,
        average_precision(*case, 3).ap,
        atol=0.012,
    )


def test_perfect_and_missing_class() -> None:
    labels = torch.arange(9) % 2
    perfect = Detections(
        GRID, torch.linspace(0.1, 0.9, 9), labels, torch.full((9, 4), 0.25)
    )
    report = coco_average_precision(
        {"a": perfect}, {"a": Truth(GRID, labels, torch.zeros(9, dtype=torch.bool))}, 3
    )
    assert report.ap[:2] == pytest.approx([1, 1])
    assert math.isnan(report.ap[2])
    assert report.map == pytest.approx(1)
    assert report.map50 == pytest.approx(1)


def test_tight_boxes_are_rewarded_only_by_ap() -> None:
    labels = torch.zeros(9, dtype=torch.int64)
    loose = Detections(
        GRID + torch.tensor([0.0, 0, 5, 0]),
        torch.linspace(0.1, 0.9, 9),
        labels,
        torch.full((9, 2), 0.5),
    )
    report = coco_average_precision(
        {"a": loose}, {"a": Truth(GRID, labels, torch.zeros(9, dtype=torch.bool))}, 1
    )
    assert report.ap50[0] == pytest.approx(1)
    # IoU 20 / 25 = .8 passes .5, .55, ..., .8: 7 of the 10 limits
    assert report.ap[0] == pytest.approx(0.7)


@pytest.mark.parametrize("predictions", [{}, {"a": Detections.empty(2)}])
def test_nothing_found(predictions: dict[str, Detections]) -> None:
    truth = Truth(
        GRID, torch.zeros(9, dtype=torch.int64), torch.zeros(9, dtype=torch.bool)
    )
    report = coco_average_precision(predictions, {"a": truth}, 2)
    assert report.ap50[0] == 0
    assert math.isnan(report.ap50[1])


def test_difficult_is_not_required_and_does_no_harm() -> None:
    labels, difficult = torch.zeros(9, dtype=torch.int64), torch.arange(9) >= 5
    predictions = Detections(
        GRID, torch.linspace(0.1, 0.9, 9), labels, torch.full((9, 2), 0.5)
    )
    assert coco_average_precision(
        {"a": predictions}, {"a": Truth(GRID, labels, difficult)}, 1
    ).ap50[0] == pytest.approx(1)
    assert coco_average_precision(
        {"a": predictions[:5]}, {"a": Truth(GRID, labels, difficult)}, 1
    ).ap50[0] == pytest.approx(1)


def test_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    coco_average_precision(*_draw_grid_case(0, images=2), 3)
    assert capfd.readouterr() == ("", "")
