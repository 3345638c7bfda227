from __future__ import annotations

import math

import pytest
import torch

from coin_ray.losses import supervised


def _table(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_anchor_objectness() -> None:
    logits = torch.tensor([0.0, math.log(3), math.log(3)], dtype=torch.float64)
    loss = supervised.anchor_objectness(logits, torch.tensor([1.0, 1.0, 0.0]))
    assert float(loss) == pytest.approx(
        (math.log(2) + math.log(4 / 3) + math.log(4)) / 3
    )


ANCHOR, BOX = _table([0, 0, 10, 20]), _table([-3, 4, 17, 14])
DELTAS = [2.0, -0.5, 5 * math.log(2), 5 * math.log(0.5)]
"""What moves ANCHOR onto BOX (see test_boxes)."""


def test_anchor_boxes_are_divided_by_all_sampled_anchors() -> None:
    off = _table([2.5, -0.5, 5 * math.log(2) - 1, 5 * math.log(0.5)])
    assert float(supervised.anchor_boxes(off, ANCHOR, BOX, 8)) == pytest.approx(1.5 / 8)
    assert float(
        supervised.anchor_boxes(_table(DELTAS), ANCHOR, BOX, 8)
    ) == pytest.approx(0)


def test_anchor_boxes_in_detectron2s_own_scale() -> None:
    """The deltas with weights of 1 are (.2, -.05, log 2, log .5)."""
    off = _table([0.2, -0.05 + 0.3, math.log(2), math.log(0.5) - 0.1])
    assert float(
        supervised.anchor_boxes(off, ANCHOR, BOX, 4, (1.0, 1.0, 1.0, 1.0))
    ) == pytest.approx(0.4 / 4)


@pytest.mark.parametrize(
    ("weight", "second"), [(1.0, math.log(2)), (0.9, 0.9 * math.log(2)), (0.0, 0.0)]
)
def test_region_class_background_weight_scales_the_term_only(
    weight: float, second: float
) -> None:
    """Class 0 at probability 1/3, background at 1/2; both rows count in the
    denominator."""
    logits = _table([0, 0, 0], [0, 0, math.log(2)])
    assert float(
        supervised.region_class(logits, torch.tensor([0, 2]), weight)
    ) == pytest.approx((math.log(3) + second) / 2, rel=1e-6)


def test_region_class_survives_large_logits() -> None:
    assert float(
        supervised.region_class(_table([100, 0, 0]), torch.tensor([1]), 1.0)
    ) == pytest.approx(100)


def test_region_soft_class() -> None:
    loss = supervised.region_soft_class(
        _table([0, 0, 0], [math.log(2), 0, 0]), _table([0.5, 0.5, 0], [1, 0, 0])
    )
    assert float(loss) == pytest.approx((math.log(3) + math.log(2)) / 2, rel=1e-6)


def test_region_boxes_l1() -> None:
    off = _table([2.0, -0.5, 5 * math.log(2) + 1, 5 * math.log(0.5)])
    assert float(supervised.region_boxes(off, ANCHOR, BOX, 4, "l1")) == pytest.approx(
        1 / 4, rel=1e-5
    )


def test_region_boxes_giou() -> None:
    """Unmoved [0,0,10,10] against [0,0,10,20]: IoU .5, hull = union: loss .5. Against
    [20,0,30,10]: IoU 0, hull 300, union 200: 4/3."""
    proposals, boxes = (
        _table([0, 0, 10, 10], [0, 0, 10, 10]),
        _table([0, 0, 10, 20], [20, 0, 30, 10]),
    )
    loss = supervised.region_boxes(
        torch.zeros(2, 4, dtype=torch.float64), proposals, boxes, 5, "giou"
    )
    assert float(loss) == pytest.approx((0.5 + 4 / 3) / 5, rel=1e-5)


def test_a_loss_of_nothing_is_zero_with_a_gradient() -> None:
    deltas, logits = (
        torch.zeros(0, 4, requires_grad=True),
        torch.zeros(0, 3, requires_grad=True),
    )
    none, labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    parts = [
        supervised.anchor_objectness(logits[:, 0], none[:, 0]),
        supervised.anchor_boxes(deltas, none, none, 0),
        supervised.region_class(logits, labels, 0.9),
        supervised.region_soft_class(logits, torch.zeros(0, 3)),
        supervised.region_boxes(deltas, none, none, 0, "l1"),
        supervised.region_boxes(deltas, none, none, 7, "giou"),
    ]
    torch.stack(parts).sum().backward()
    assert [float(p.detach()) for p in parts] == [0] * 6
