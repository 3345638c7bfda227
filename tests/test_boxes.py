from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from coin_ray import boxes as box_ops


def rows(*boxes: list[float]) -> Tensor:
    return torch.tensor(boxes, dtype=torch.float64)


sides = st.integers(1, 300)
box_lists = st.lists(
    st.tuples(st.integers(-50, 300), st.integers(-50, 300), sides, sides),
    min_size=1,
    max_size=6,
).map(
    lambda rows: torch.tensor(
        [[x, y, x + w, y + h] for x, y, w, h in rows], dtype=torch.float64
    )
)


def test_mirror() -> None:
    assert box_ops.mirror_boxes(rows([10, 5, 30, 25]), 100).tolist() == [
        [70, 5, 90, 25]
    ]


@given(box_lists)
def test_mirror_twice_is_nothing(boxes: Tensor) -> None:
    assert torch.equal(
        box_ops.mirror_boxes(box_ops.mirror_boxes(boxes, 640), 640), boxes
    )


def test_scale() -> None:
    assert box_ops.scale_boxes(rows([1, 2, 3, 4]), 2, 10).tolist() == [[2, 20, 6, 40]]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((1, 1), [5, 5, 15, 15]),
        ((3, 1), [2.5, 2.5, 12.5, 12.5]),
        ((0, 2), [10, 10, 20, 20]),
    ],
)
def test_weighted_mean(weights: tuple[float, float], expected: list[float]) -> None:
    a, b = rows([0, 0, 10, 10]), rows([10, 10, 20, 20])
    assert box_ops.weighted_mean_boxes(
        a, b, torch.tensor([float(weights[0])]), torch.tensor([float(weights[1])])
    ).tolist() == [expected]


def test_encode_by_hand() -> None:
    """Centre moves by (2, -1) of sides (10, 20): .2 and -.05; sides grow by 2 and 1/2."""
    expected = [10 * 0.2, 10 * -0.05, 5 * math.log(2), 5 * math.log(0.5)]
    assert box_ops.encode_boxes(rows([-3, 4, 17, 14]), rows([0, 0, 10, 20])).tolist()[
        0
    ] == pytest.approx(expected)


@given(box_lists, box_lists)
def test_decode_inverts_encode(boxes: Tensor, anchors: Tensor) -> None:
    count = min(len(boxes), len(anchors))
    boxes, anchors = boxes[:count], anchors[:count]
    possible = (
        (boxes[:, 2:] - boxes[:, :2]) / (anchors[:, 2:] - anchors[:, :2])
    ).log().max() < box_ops.LARGEST_LOG_SCALE
    back = box_ops.decode_boxes(box_ops.encode_boxes(boxes, anchors), anchors)
    assert not possible or torch.allclose(back, boxes, atol=1e-6)


def test_growth_is_limited() -> None:
    grown = box_ops.decode_boxes(rows([0, 0, 1000, 0]), rows([0, 0, 16, 16]))[0]
    assert float(grown[2] - grown[0]) == pytest.approx(1000, rel=1e-3)
    assert float(grown[3] - grown[1]) == pytest.approx(16)


def test_no_boxes_overlap_nothing() -> None:
    none = torch.zeros(0, 4)
    for boxes in (
        box_ops.mirror_boxes(none, 9),
        box_ops.scale_boxes(none, 2, 2),
        box_ops.encode_boxes(none, none),
        box_ops.decode_boxes(none, none),
    ):
        assert boxes.shape == (0, 4)
