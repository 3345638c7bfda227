"""Labels with an error cost their own image, which is told, and not the folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from coin_ray.data.check import check_datasets
from coin_ray.data.formats import (
    Annotation,
    ImageRecord,
    describe_dataset,
    read_dataset,
    write_dataset,
)
from coin_ray.data.review.corrections import correction_rows, read_reviews
from coin_ray.errors import InputError

NAMES = ("a.png", "b.png", "c.png")
SIZE = (40, 30)
EDGES = (10.0, 9.0, 30.0, 21.0)


def _break_xml(folder: Path) -> None:
    (folder / "Annotations" / "a.xml").write_text("<annotation><object>")


def _break_xml_number(folder: Path) -> None:
    path = folder / "Annotations" / "a.xml"
    path.write_text(path.read_text().replace("<xmin>11<", "<xmin>eleven<"))


def _break_yolo(folder: Path) -> None:
    (folder / "labels" / "train" / "a.txt").write_text("0 0.5 0.5")


def _break_kitti(folder: Path) -> None:
    (folder / "training" / "label_2" / "a.txt").write_text("cat 1 2 3")


def _break_coco(folder: Path) -> None:
    path = folder / "annotations" / "instances_train.json"
    labels = json.loads(path.read_text())
    assert labels["images"][0]["file_name"] == "a.png"
    labels["annotations"][0]["bbox"] = [1, 2, "x", 4]
    path.write_text(json.dumps(labels))


def _break_coco_number(folder: Path) -> None:
    path = folder / "annotations" / "instances_train.json"
    path.write_text(path.read_text().replace("[10.0,", "[NaN,", 1))


def _break_bdd100k(folder: Path) -> None:
    path = folder / "labels" / "det_20" / "det_train.json"
    frames = json.loads(path.read_text())
    assert frames[0]["name"] == "a.png"
    frames[0]["labels"][0]["box2d"]["x1"] = "nan"
    path.write_text(json.dumps(frames))


BREAKS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "VOC, not XML": ("voc", _break_xml, "not XML"),
    "VOC, no number": ("voc", _break_xml_number, "expected a number"),
    "YOLO, words": ("yolo", _break_yolo, "a.txt:1: expected 'class x y"),
    "KITTI, words": ("kitti", _break_kitti, "a.txt:1: expected a class name"),
    "COCO, box": ("coco", _break_coco, "annotations.0: "),
    "COCO, no number": ("coco", _break_coco_number, "not a finite number"),
    "BDD100K, no number": ("bdd100k", _break_bdd100k, "not a finite number"),
}


@pytest.fixture(params=BREAKS)
def broken(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A folder of three images, the labels of the first of which have an error."""
    format, damage, message = BREAKS[request.param]
    records = []
    for number, name in enumerate(NAMES):
        path = tmp_path / "from" / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", SIZE, (40 * number, 9, 9)).save(path)
        annotations = [Annotation(EDGES, "cat")]
        records.append(ImageRecord.from_annotations(name, str(path), SIZE, annotations))
    write_dataset(records, str(tmp_path / "to"), format)
    damage(tmp_path / "to")
    return tmp_path / "to", message


def test_only_the_broken_image_loses_its_labels(broken: tuple[Path, str]) -> None:
    folder, message = broken
    dataset = read_dataset(f"{folder}#train")
    annotated = {record.file: record.annotated for record in dataset.records}
    assert annotated == {"a.png": False, "b.png": True, "c.png": True}
    for record in dataset.records:
        assert record.boxes.tolist() == ([list(EDGES)] if record.annotated else [])
    [unreadable] = dataset.unreadable
    assert message in unreadable.reason
    assert "1 not annotated since their labels have errors" in describe_dataset(dataset)
    assert dataset.missing == dataset.left_out == dataset.unread_files == ()


def test_the_check_names_it(broken: tuple[Path, str]) -> None:
    folder, message = broken
    [fault] = check_datasets([f"{folder}#train"])
    assert fault.kind == "labels with errors"
    assert message in fault.example


def test_corrections_leave_the_image_out_and_say_so(broken: tuple[Path, str]) -> None:
    folder, message = broken
    reviews = read_reviews(f"{folder}#train")
    row = {"split": "train", "width": 40, "height": 30}
    images = {review.image_id: row for review in reviews if review.image_id}
    lines: list[str] = []
    rows = correction_rows(reviews, images, {"cat": 0}, "x", lines.append)
    assert [row["boxes"] for row in rows] == [[list(EDGES)]] * 2
    assert "1 of 3 reviewed images are left out" in lines[0]
    assert message in lines[0]


@pytest.mark.parametrize(
    ("settings", "line", "message"),
    [
        ("names: [cat]", "1 .5 .5 .5 .4", "class 1 is not in data.yaml"),
        ("names: [cat]\nkpt_shape: [2, 2]", "0 .5 .5 .5 .4 .1 .1", "kpt_shape"),
    ],
)
def test_labels_that_contradict_the_settings_are_an_error_of_the_folder(
    tmp_path: Path, settings: str, line: str, message: str
) -> None:
    """A name is absent, or the order of names is another: no label is sure."""
    (tmp_path / "data.yaml").write_text(f"{settings}\ntrain: images\n")
    for number, text in enumerate([line, "0 .5 .5 .5 .4", "0 .5 .5 .5 .4"]):
        for folder in ("images", "labels"):
            (tmp_path / folder).mkdir(exist_ok=True)
        Image.new("RGB", SIZE).save(tmp_path / "images" / f"{number}.png")
        (tmp_path / "labels" / f"{number}.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        read_dataset(str(tmp_path))


def test_a_folder_with_mostly_broken_labels_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        Image.new("RGB", SIZE).save(tmp_path / f"{name}.jpg")
        (tmp_path / f"{name}.xml").write_text("<annotation>")
    good = "<annotation><object><name>cat</name><bndbox><xmin>2</xmin><ymin>2</ymin>"
    good += "<xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>"
    (tmp_path / "c.xml").write_text(good)
    with pytest.raises(InputError, match=r"a\.xml:1: not XML.*2 of 3 labelled images"):
        read_dataset(str(tmp_path))
