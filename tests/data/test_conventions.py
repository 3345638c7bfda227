"""Boxes in another convention or unit than the format's are an error where the set can
tell, and a set in the format's own is never one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from coin_ray.data.check import check_datasets
from coin_ray.data.formats import read_dataset
from coin_ray.data.formats.conventions import (
    CENTRE_SIZE,
    CONVENTIONS,
    CORNERS,
    LEFT_TOP_SIZE,
    ROWS_FIRST,
    check_boxes,
    edges_of,
)
from coin_ray.errors import InputError

SIZE = (400, 240)
NAMES = ("a", "b", "c", "d")
Array = NDArray[np.float64]


def _make_edges() -> list[Array]:
    """Boxes of four images, from border to border."""
    draw = np.random.default_rng(0)
    starts = draw.uniform(0, 0.7, (len(NAMES), 6, 2))
    ends = starts + draw.uniform(0.05, 0.3, starts.shape)
    ends[:, 0] = 1
    edges = np.concatenate([starts, ends], axis=2) * np.tile(SIZE, 2)
    return list(edges.round(2))


def _numbers_of(edges: Array, convention: str) -> Array:
    starts, ends = edges[:, :2], edges[:, 2:]
    first = (starts + ends) / 2 if convention == CENTRE_SIZE else starts
    if convention in (CENTRE_SIZE, LEFT_TOP_SIZE):
        return np.concatenate([first, ends - starts], axis=1)
    return edges[:, [1, 0, 3, 2]] if convention == ROWS_FIRST else edges


def _write_images(folder: Path) -> None:
    folder.mkdir(parents=True)
    for number, name in enumerate(NAMES):
        Image.new("RGB", SIZE, (50 * number, 9, 9)).save(folder / f"{name}.png")


def _write_texts(folder: Path, text_by_name: dict[str, str], suffix: str) -> None:
    folder.mkdir(parents=True)
    for name, text in text_by_name.items():
        (folder / f"{name}{suffix}").write_text(text)


def _write_yolo(folder: Path, numbers: Sequence[Array]) -> None:
    _write_images(folder / "images")
    texts = {
        name: "\n".join(
            f"0 {' '.join(map(str, row / np.tile(SIZE, 2)))}" for row in rows
        )
        for name, rows in zip(NAMES, numbers, strict=True)
    }
    _write_texts(folder / "labels", texts, ".txt")
    (folder / "data.yaml").write_text("names: [cat]\ntrain: images\n")


def _write_coco(folder: Path, numbers: Sequence[Array]) -> None:
    _write_images(folder / "images")
    sides = {"width": SIZE[0], "height": SIZE[1]}
    labels = {
        "images": [
            sides | {"id": n, "file_name": f"{name}.png"}
            for n, name in enumerate(NAMES)
        ],
        "annotations": [
            {"image_id": n, "category_id": 1, "bbox": row}
            for n, rows in enumerate(numbers)
            for row in rows.tolist()
        ],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (folder / "annotations.json").write_text(json.dumps(labels))


def _write_voc(folder: Path, numbers: Sequence[Array]) -> None:
    _write_images(folder / "JPEGImages")
    texts = {}
    for name, rows in zip(NAMES, numbers, strict=True):
        objects = [
            f"<object><name>cat</name><bndbox><xmin>{a + 1}</xmin><ymin>{b + 1}</ymin>"
            f"<xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>"
            for a, b, c, d in rows.tolist()
        ]
        texts[name] = f"<annotation>{''.join(objects)}</annotation>"
    _write_texts(folder / "Annotations", texts, ".xml")


def _write_kitti(folder: Path, numbers: Sequence[Array]) -> None:
    _write_images(folder / "training" / "image_2")
    texts = {
        name: "\n".join(
            f"cat 0 0 0 {' '.join(map(str, row))} 0 0 0 0 0 0 0"
            for row in rows.tolist()
        )
        for name, rows in zip(NAMES, numbers, strict=True)
    }
    _write_texts(folder / "training" / "label_2", texts, ".txt")


def _write_bdd100k(folder: Path, numbers: Sequence[Array]) -> None:
    _write_images(folder / "images" / "100k" / "train")
    frames = [
        {
            "name": f"{name}.png",
            "labels": [
                {
                    "category": "car",
                    "box2d": dict(zip(("x1", "y1", "x2", "y2"), row, strict=True)),
                }
                for row in rows.tolist()
            ],
        }
        for name, rows in zip(NAMES, numbers, strict=True)
    ]
    path = folder / "labels" / "det_20" / "det_train.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(frames))


Writer = Callable[[Path, Sequence[Array]], None]
FORMATS: dict[str, tuple[Writer, str]] = {
    "yolo": (_write_yolo, CENTRE_SIZE),
    "coco": (_write_coco, LEFT_TOP_SIZE),
    "voc": (_write_voc, CORNERS),
    "kitti": (_write_kitti, CORNERS),
    "bdd100k": (_write_bdd100k, CORNERS),
}


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("format", FORMATS)
def test_a_set_in_another_convention_is_an_error_that_names_both(
    tmp_path: Path, format: str, convention: str
) -> None:
    write, own_convention = FORMATS[format]
    edges = _make_edges()
    numbers = [_numbers_of(boxes, convention) for boxes in edges]
    if (format, convention) == ("yolo", ROWS_FIRST):
        numbers = [
            rows * np.tile([SIZE[0] / SIZE[1], SIZE[1] / SIZE[0]], 2)
            for rows in numbers
        ]
    write(tmp_path / "set", numbers)
    if convention == own_convention:
        records = read_dataset(str(tmp_path / "set")).records
        for record, boxes in zip(records, edges, strict=True):
            np.testing.assert_allclose(record.boxes, boxes, atol=1e-9)
        return
    with pytest.raises(InputError) as error:
        read_dataset(str(tmp_path / "set"))
    # shares have no larger side, so rows and columns can't be told apart
    seen = CORNERS if (format, convention) == ("yolo", ROWS_FIRST) else convention
    message = str(error.value)
    assert f"expected boxes as {own_convention}, got {seen}: read as" in message
    [fault] = check_datasets([str(tmp_path / "set")])
    assert fault.kind == "can't be read"


@pytest.mark.parametrize(("unit", "name"), [(1, "shares"), (100, "percent")])
@pytest.mark.parametrize("format", ["coco", "kitti", "bdd100k"])
def test_a_set_in_another_unit_is_an_error_that_names_it(
    tmp_path: Path, format: str, unit: int, name: str
) -> None:
    write, convention = FORMATS[format]
    numbers = [
        _numbers_of(edges / np.tile(SIZE, 2) * unit, convention)
        for edges in _make_edges()
    ]
    write(tmp_path / "set", numbers)
    with pytest.raises(InputError, match=f"expected boxes in pixels, got {name} of"):
        read_dataset(str(tmp_path / "set"))


SIZES = np.tile([400.0, 240.0], (12, 1))


def _boxes_around(centre: float, side: float) -> Array:
    spread = np.linspace(0.8, 1.2, 12)
    return np.stack([spread * centre, spread * centre, spread * side, spread * side], 1)


@pytest.mark.parametrize(
    ("numbers", "convention"),
    [
        # all objects of a fixed camera are in one corner
        (_boxes_around(40, 20), CENTRE_SIZE),
        (_boxes_around(4, 0.5), CENTRE_SIZE),
        # small overhangs at all sides
        (np.tile([-6.0, -4, 410, 246], (12, 1)), CORNERS),
        # two odd boxes among good ones
        (np.r_[_boxes_around(50, 40)[2:], [[390, 9, 80, 9]] * 2], LEFT_TOP_SIZE),
        # drawn from the lower right corner
        (np.tile([300.0, 200, 200, 90], (12, 1)), CORNERS),
        (np.zeros((0, 4)), CORNERS),
    ],
)
def test_odd_sets_in_the_right_convention_are_no_error(
    numbers: Array, convention: str
) -> None:
    check_boxes(numbers, SIZES[: len(numbers)], convention, "x")


def test_boxes_that_mostly_lie_outside_are_an_error() -> None:
    boxes = np.tile([350.0, 100, 500, 300], (24, 1))
    sizes = np.tile([400.0, 240.0], (24, 1))
    with pytest.raises(InputError, match="24 of 24 boxes lie far out of their images"):
        check_boxes(boxes, sizes, CORNERS, "x")
    check_boxes(boxes[:9], sizes[:9], CORNERS, "x")


shares = st.floats(0, 1)
boxes_inside = st.tuples(shares, shares, shares, shares).map(
    lambda box: (
        400 * min(box[0], box[2]),
        240 * min(box[1], box[3]),
        400 * max(box[0], box[2]) + 1.5,
        240 * max(box[1], box[3]) + 1.5,
    )
)


@pytest.mark.parametrize("convention", CONVENTIONS)
@given(boxes=st.lists(boxes_inside, min_size=1, max_size=9))
def test_boxes_inside_their_images_are_never_an_error(
    convention: str, boxes: list[tuple[float, ...]]
) -> None:
    edges = np.array(boxes)
    numbers = _numbers_of(edges, convention)
    check_boxes(numbers, SIZES[: len(edges)], convention, "x")
    np.testing.assert_allclose(edges_of(numbers, convention), edges, atol=1e-9)
