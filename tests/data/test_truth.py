"""Labels in the frame of their image, and cleaned boxes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from coin_ray.data.formats import Annotation, ImageRecord
from coin_ray.data.truth import clean_boxes, clean_labels, first_of_each_box
from coin_ray.errors import InputError

WIDTH, HEIGHT = 100, 40


@pytest.mark.parametrize(
    ("box", "expected", "repairs"),
    [
        ([10, 5, 30, 20], [10, 5, 30, 20], {}),
        ([0, 0, 100, 40], [0, 0, 100, 40], {}),
        ([30, 20, 10, 5], [10, 5, 30, 20], {"reversed": 1}),
        ([10, 20, 30, 5], [10, 5, 30, 20], {"reversed": 1}),
        ([-5, 5, 130, 20], [0, 5, 100, 20], {"cut": 1}),
        ([120, 5, 90, -1], [90, 0, 100, 5], {"reversed": 1, "cut": 1}),
        ([99, 39, 100.004, 40], [99, 39, 100, 40], {}),
        ([10, 5, 10, 20], None, {"without_area": 1}),
        ([10, 5, 30, 5], None, {"without_area": 1}),
        ([100, 5, 130, 20], None, {"outside": 1}),
        ([-30, -9, 0, 20], None, {"outside": 1}),
    ],
)
def test_a_box_is_put_right_and_counted_or_left_out(
    box: list[float], expected: list[float] | None, repairs: dict[str, int]
) -> None:
    cleaned = clean_boxes(np.array([box], np.float64), (WIDTH, HEIGHT))
    assert cleaned.usable.tolist() == [expected is not None]
    if expected is not None:
        assert cleaned.boxes.tolist() == [expected]
    assert cleaned.repairs == repairs


@pytest.mark.parametrize(
    ("other", "label", "difficult", "count"),
    [
        ([10, 10, 30, 30], "cat", False, 1),
        ([10.2, 10, 30, 29.9], "cat", False, 1),
        ([11, 10, 30, 30], "cat", False, 2),
        ([10, 10, 30, 30], "dog", False, 2),
        ([10, 10, 30, 30], "cat", True, 2),
        ([-60, 10, 30, 30], "cat", False, 2),
    ],
)
def test_a_box_that_is_given_twice_is_used_once(
    other: list[float], label: str, difficult: bool, count: int
) -> None:
    boxes = np.array([[10, 10, 30, 30], [50, 0, 60, 9], other], np.float64)
    labels = ["cat", "cat", label]
    first = first_of_each_box(boxes, labels, np.array([False, False, difficult]))
    assert first.tolist() == [True, True, count == 2]


def test_small_objects_side_by_side_are_not_one_box() -> None:
    boxes = np.array([[10, 10, 12, 12], [10.5, 10, 12.5, 12]], np.float64)
    assert first_of_each_box(boxes, ["cat", "cat"], np.zeros(2, np.bool_)).all()


def _write_image(
    folder: Path, name: str, orientation: int = 1, size: tuple[int, int] = (100, 40)
) -> str:
    exif = Image.Exif()
    exif[0x0112] = orientation
    uri = str(folder / name)
    Image.new("RGB", size).save(uri, exif=exif)
    return uri


def _record(
    uri: str, size: tuple[int, int], *boxes: tuple[float, float, float, float]
) -> ImageRecord:
    annotations = [Annotation(box, "cat") for box in boxes]
    return ImageRecord.from_annotations("a.jpg", uri, size, annotations)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_turn_with_the_pixels(tmp_path: Path, orientation: int) -> None:
    """A white box in the stored pixels is where the turned label says it is."""
    stored = Image.new("L", (100, 40))
    stored.paste(255, (60, 5, 80, 25))
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned_uri = str(tmp_path / "turned.png")
    stored.save(turned_uri, exif=exif)
    with Image.open(turned_uri) as image:
        upright = ImageOps.exif_transpose(image)
    # an image on its side shows that the folder's labels are as stored
    proof = _record(_write_image(tmp_path, "proof.jpg", 6), (100, 40), (0, 0, 50, 10))
    record = _record(turned_uri, stored.size, (60, 5, 80, 25))
    results = clean_labels([record, proof], [upright.size, (40, 100)])
    result = results[0].record
    assert tuple(result.boxes[0]) == upright.getbbox()
    assert (result.width, result.height) == upright.size
    assert results[0].repairs == ({} if orientation == 1 else {"turned": 1})
    assert results[1].repairs == {"turned": 1}


def test_upright_labels_of_turned_photos_stay(tmp_path: Path) -> None:
    uri = _write_image(tmp_path, "a.jpg", 6)
    half = _write_image(tmp_path, "b.jpg", 3, (50, 20))
    records = [
        _record(uri, (40, 100), (15, 60, 35, 80)),
        _record(half, (100, 40), (60, 10, 80, 30)),
    ]
    results = clean_labels(records, [(40, 100), (50, 20)])
    assert [result.record.boxes.tolist() for result in results] == [
        [[15, 60, 35, 80]],
        [[30, 5, 40, 15]],
    ]
    assert [result.repairs for result in results] == [{}, {"resized": 1}]


@pytest.mark.parametrize(
    ("labelled", "actual", "factor"),
    [((200, 80), (100, 40), 0.5), ((50, 20), (100, 40), 2), ((99, 40), (198, 79), 2)],
)
def test_boxes_of_a_resized_copy_are_scaled(
    tmp_path: Path, labelled: tuple[int, int], actual: tuple[int, int], factor: float
) -> None:
    uri = _write_image(tmp_path, "a.jpg", size=actual)
    [result] = clean_labels([_record(uri, labelled, (10, 4, 20, 12))], [actual])
    expected = np.array([10, 4, 20, 12]) * factor
    assert np.abs(result.record.boxes[0] - expected).max() < 0.5
    assert result.repairs == {"resized": 1}


def test_labels_of_another_image_are_an_error(tmp_path: Path) -> None:
    uri = _write_image(tmp_path, "a.jpg")
    sideways = _record(uri, (40, 100), (1, 2, 3, 4))
    with pytest.raises(InputError, match=r"a\.jpg: the image is 100 x 40, its labels"):
        clean_labels([sideways], [(100, 40)])


def test_shares_instead_of_pixels_are_an_error() -> None:
    record = _record("a.jpg", (100, 40), (0.1, 0.2, 0.5, 0.75))
    with pytest.raises(InputError, match="expected boxes in pixels"):
        clean_labels([record], [(100, 40)])


def test_right_labels_stay_as_they_are() -> None:
    corners = np.random.default_rng(0).uniform(0, 1, (50, 2, 2)) * (WIDTH, HEIGHT)
    edges = np.sort(corners, axis=1).reshape(-1, 4)
    boxes = [(x1, y1, x2, y2) for x1, y1, x2, y2 in edges.tolist()]
    record = _record("a.jpg", (WIDTH, HEIGHT), *boxes)
    [result] = clean_labels([record], [(WIDTH, HEIGHT)])
    assert (result.record.boxes == edges).all()
    assert not result.repairs
