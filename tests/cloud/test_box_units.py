"""Boxes in another unit, of no use or too many: never "no objects", never a matrix of
gigabytes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from operations import count_calls

from coin_ray.cloud.adapters.parsing import (
    BOXES_MAX,
    BoxFormat,
    ParsedBox,
    map_detections,
)
from coin_ray.cloud.adapters.prompts import XYXY_1000, XYXY_PIXELS
from coin_ray.cloud.adapters.reference import ReferenceAdapter
from coin_ray.cloud.adapters.rekognition import RekognitionAdapter
from coin_ray.cloud.protocol import BoxCounts, Frame, Query, RawDetections
from coin_ray.errors import UnusableBoxes

from .cases import CASES, CLASSES, SIZE, Case, Truth
from .conftest import detection_json, response_json

QUERY = Query("default", CLASSES, 0.05)
FRAME = Frame((600, 400), (1200, 800))
GOOD: dict[BoxFormat, list[float]] = {
    "xyxy": [60, 40, 300, 200],
    "xywh": [60, 40, 240, 160],
    "cxcywh": [180, 120, 240, 160],
    "ltwh_ratio": [0.1, 0.1, 0.4, 0.4],
    "xyxy_ratio": [0.1, 0.1, 0.5, 0.5],
    "yxyx_1000": [100, 100, 500, 500],
    "xyxy_1000": [100, 100, 500, 500],
}
SWAPPED: dict[BoxFormat, list[float]] = {
    "xyxy": [300, 40, 60, 200],
    "xywh": [300, 200, -240, -160],
    "cxcywh": [180, 120, -240, 160],
    "ltwh_ratio": [0.5, 0.1, -0.4, 0.4],
    "xyxy_ratio": [0.5, 0.5, 0.1, 0.1],
    "yxyx_1000": [500, 500, 100, 100],
    "xyxy_1000": [100, 500, 500, 100],
}
OTHER_UNITS: list[tuple[BoxFormat, list[float]]] = [
    ("xyxy", GOOD["xyxy_ratio"]),
    ("xywh", GOOD["ltwh_ratio"]),
    ("cxcywh", [0.3, 0.3, 0.4, 0.4]),
    ("xyxy_1000", GOOD["xyxy_ratio"]),
    ("yxyx_1000", GOOD["xyxy_ratio"]),
    ("xyxy", [100, 100, 900, 500]),
    ("xyxy", [100, 100, 500, 790]),
    ("xywh", [400, 100, 400, 100]),
    ("xyxy_1000", [100, 100, 1500, 500]),
    ("ltwh_ratio", [10, 10, 40, 40]),
    ("xyxy_ratio", [10, 10, 50, 50]),
    ("xyxy_ratio", [60, 40, 300, 200]),
    ("ltwh_ratio", [100, 100, 400, 400]),
]


def _map(box_format: BoxFormat, *boxes: list[float]) -> RawDetections:
    parsed_boxes = [
        ParsedBox(box, ["car"], 0.9 - 0.1 * i) for i, box in enumerate(boxes)
    ]
    return map_detections(parsed_boxes, box_format, QUERY, FRAME, "label")


@pytest.mark.parametrize("box_format", GOOD)
def test_corners_the_other_way_round_are_put_right_and_counted(
    box_format: BoxFormat,
) -> None:
    assert np.allclose(_map(box_format, GOOD[box_format]).boxes, [[120, 80, 600, 400]])
    raw = _map(box_format, GOOD[box_format], SWAPPED[box_format])
    assert np.allclose(raw.boxes, [[120, 80, 600, 400]] * 2)
    assert raw.counts == BoxCounts(swapped=1)


@pytest.mark.parametrize(("box_format", "box"), OTHER_UNITS)
def test_another_unit_is_an_error_that_says_what_was_expected(
    box_format: BoxFormat, box: list[float]
) -> None:
    with pytest.raises(UnusableBoxes, match=r"another unit.*are these coordinates"):
        _map(box_format, box)
    if max(box) > 1:
        with pytest.raises(UnusableBoxes):
            _map(box_format, GOOD[box_format], box)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_adapter_takes_shares_or_reversed_boxes_for_no_objects(case: Case) -> None:
    """Shares where an adapter reads pixels or thousandths, and the other way round."""
    headers = {"content-type": case.content_type}
    car = case.names["car"]
    for box in ((300, 200, 60, 40), (0.1, 0.1, 0.5, 0.5), (6000.0, 4000.0, 3e4, 2e4)):
        body = json.dumps(case.answer([Truth(car, box)], SIZE)).encode()
        try:
            raw = case.adapter.decode(headers, body, case.query(), Frame(SIZE, SIZE))
        except UnusableBoxes:
            assert box != (300, 200, 60, 40)
            continue
        assert isinstance(raw, RawDetections)
        assert box == (300, 200, 60, 40)
        assert np.allclose(raw.boxes, [[60, 40, 300, 200]], atol=1)


def test_percent_of_a_language_model() -> None:
    percent = '[{"bbox_2d": [28.1, 50.2, 52, 70], "label": "car"}]'
    for notation in (XYXY_1000, XYXY_PIXELS):
        with pytest.raises(UnusableBoxes, match="percent"):
            notation.parse_detections(percent, QUERY, FRAME)
    small = '[{"bbox_2d": [28, 50, 52, 70], "label": "car"}]'
    assert len(XYXY_1000.parse_detections(small, QUERY, FRAME)) == 1


def test_boxes_that_can_not_be_used_are_counted_beside_good_ones() -> None:
    raw = _map(
        "xyxy", GOOD["xyxy"], [601, 10, 620, 50], [10, 10, 10.2, 50], [0, 0, 0, 0]
    )
    assert len(raw) == 1
    assert raw.counts == BoxCounts(thin=1, outside=2)
    with pytest.raises(UnusableBoxes, match="1 thinner than a pixel"):
        _map("xyxy", [10, 10, 10.2, 50])


def test_a_box_in_the_margin_of_a_rendering_is_no_object() -> None:
    frame = Frame((600, 400), (400, 260), (400, 260))
    parsed_box = ParsedBox([450, 300, 550, 380], ["car"], 0.5)
    raw = map_detections([parsed_box], "xyxy", QUERY, frame, "label")
    assert len(raw) == 0
    assert raw.counts == BoxCounts(outside=1)


def test_many_boxes_are_bounded_where_they_are_read() -> None:
    count = 30 * BOXES_MAX
    detections = [
        detection_json(box=[1, 2, 3 + i % 50, 30], score=i / count)
        for i in range(count)
    ]
    body = json.dumps(response_json(*detections)).encode()
    headers = {"content-type": "application/json"}
    raw = ReferenceAdapter().decode(headers, body, QUERY, Frame((60, 40), (60, 40)))
    assert len(raw) == BOXES_MAX
    assert raw.counts == BoxCounts(surplus=count - BOXES_MAX)
    assert raw.class_scores.max() == np.float32((count - 1) / count)
    assert raw.class_scores.max(1).min() == np.float32((count - BOXES_MAX) / count)


def _decode_labels(count: int) -> RawDetections:
    """Decode one box under many labels, and as often under one."""
    box = {"Left": 0.1, "Top": 0.1, "Width": 0.5, "Height": 0.5}
    instance = {"BoundingBox": box, "Confidence": 90}
    labels: list[dict[str, Any]] = [
        {"Name": f"name {i}", "Instances": [instance]} for i in range(count)
    ]
    labels.append({"Name": "Car", "Instances": [instance] * count})
    body = json.dumps({"Labels": labels}).encode()
    return RekognitionAdapter().decode(
        {}, body, Query("default", ("car",), 0.05), Frame((600, 400), (600, 400))
    )


def test_the_work_for_one_box_under_many_labels_is_not_quadratic() -> None:
    raw = _decode_labels(3 * BOXES_MAX)
    assert len(raw) == BOXES_MAX
    assert raw.counts == BoxCounts(surplus=2 * BOXES_MAX, unmapped=3 * BOXES_MAX)
    few, many = (
        count_calls(lambda factor=factor: _decode_labels(factor * BOXES_MAX))
        for factor in (1, 3)
    )
    assert many < 3.3 * few
