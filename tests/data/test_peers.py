"""Data sets that other libraries write are read box for box, and they read ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coin_ray.data.formats import Annotation, ImageRecord, read_dataset, write_dataset
from tests.peers import LabelledBoxes, read_as, write_as

pytestmark = pytest.mark.slow
UNLABELLED = {"voc", "voc_detection", "kitti_detection"}
"""Formats whose images without a label file are not annotated."""


def _boxes(folder: Path, *splits: str) -> LabelledBoxes:
    boxes: LabelledBoxes = {}
    for split in splits:
        dataset = read_dataset(f"{folder}{split}")
        assert dataset.missing == dataset.left_out == dataset.unreadable == ()
        for record in dataset.records:
            if record.annotated:
                rows = zip(record.boxes.tolist(), record.labels, strict=True)
                stem = Path(record.uri).stem
                assert stem not in boxes
                boxes[stem] = [[*edges, label] for edges, label in rows]
    return boxes


def _assert_equal(actual: LabelledBoxes, expected: LabelledBoxes) -> None:
    assert actual.keys() == expected.keys()
    for stem in expected:
        boxes, actual_boxes = sorted(expected[stem]), sorted(actual[stem])
        assert [box[4] for box in actual_boxes] == [box[4] for box in boxes]
        edges = np.reshape([box[:4] for box in boxes], (-1, 4))
        actual_edges = np.reshape([box[:4] for box in actual_boxes], (-1, 4))
        np.testing.assert_allclose(actual_edges, edges, atol=1e-3)


@pytest.mark.parametrize(
    ("library", "format", "splits"),
    [
        ("datumaro", "coco_instances", ("#train", "#val")),
        ("datumaro", "coco", ("#train", "#val")),
        ("datumaro", "voc_detection", ("",)),
        ("datumaro", "voc_detection", ("#train", "#val")),
        ("datumaro", "yolo", ("#train", "#val")),
        ("datumaro", "yolo_ultralytics", ("#train", "#val")),
        ("datumaro", "kitti_detection", ("#train", "#val")),
        ("datumaro", "kitti_detection", ("",)),
        ("supervision", "coco", ("",)),
        ("supervision", "voc", ("",)),
        ("supervision", "yolo", ("",)),
    ],
)
def test_what_a_library_writes_is_read_box_for_box(
    tmp_path: Path, library: str, format: str, splits: tuple[str, ...]
) -> None:
    expected = write_as(library, format, tmp_path / "to")
    actual = _boxes(tmp_path / "to", *splits)
    if format in UNLABELLED:
        expected = {stem: boxes for stem, boxes in expected.items() if boxes}
        actual = {stem: boxes for stem, boxes in actual.items() if boxes}
    _assert_equal(actual, expected)
    assert read_dataset(f"{tmp_path / 'to'}{splits[0]}").unread_files == ()


@pytest.mark.parametrize(
    ("library", "format"),
    [
        ("pycocotools", "coco"),
        *(("supervision", format) for format in ("coco", "voc", "yolo")),
        *(("datumaro", format) for format in ("coco", "voc", "yolo")),
    ],
)
def test_a_library_reads_what_is_written_box_for_box(
    tmp_path: Path, library: str, format: str
) -> None:
    draw = np.random.default_rng(0)
    expected: LabelledBoxes = {}
    for split in ("train", "val"):
        records = []
        for number in range(3):
            stem = f"{split}{number}"
            path = tmp_path / "from" / f"{stem}.png"
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (40, 30), (60 * number, len(split), 9)).save(path)
            corners = draw.integers(1, 20, (number, 2))
            sides = draw.integers(1, 9, (number, 2))
            edges = np.concatenate([corners, corners + sides], 1).tolist()
            labels = ["cat", "dog"][:number]
            expected[stem] = [[*box, n] for box, n in zip(edges, labels, strict=True)]
            annotations = [Annotation(box[:4], box[4]) for box in expected[stem]]
            records.append(
                ImageRecord.from_annotations(
                    path.name, str(path), (40, 30), annotations
                )
            )
        write_dataset(records, str(tmp_path / "to"), format, split, ["cat", "dog"])
    actual = read_as(library, format, tmp_path / "to", "train", "val")
    if (library, format) == ("datumaro", "voc"):
        # datumaro takes VOC's pixels, which count from 1, as they stand
        for boxes in actual.values():
            for box in boxes:
                box[0], box[1] = box[0] - 1, box[1] - 1
    _assert_equal(actual, expected)
