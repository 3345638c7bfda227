from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from coin_ray.config.detector_training import SourceScenes
from coin_ray.errors import InputError
from coin_ray.runs.steps import Context
from coin_ray.stages import source_scenes
from coin_ray.stages.common.labelled_images import (
    AnnotatedImages,
    build_labelled_examples,
    is_validation_image,
    read_labelled_images,
)
from coin_ray.tables import Truth

Row = tuple[float, float, float, float, int]


def _labelled_images(
    *images: list[Row], difficult: tuple[int, ...] = ()
) -> AnnotatedImages:
    rows, truth = [], {}
    for number, boxes in enumerate(images):
        name = f"{number:08x}"
        rows.append(
            {
                "image_id": name,
                "uri": f"/data/{name}.png",
                "width": 100,
                "height": 80,
                "split": "train",
            }
        )
        difficult_mask = torch.tensor(
            [n in difficult for n in range(len(boxes))], dtype=torch.bool
        )
        truth[name] = Truth(
            torch.tensor([b[:4] for b in boxes]).reshape(-1, 4).float(),
            torch.tensor([b[4] for b in boxes]).long(),
            difficult_mask,
        )
    return AnnotatedImages(rows, truth)


def test_difficult_boxes_are_ignored_and_empty_images_kept() -> None:
    examples = build_labelled_examples(
        _labelled_images(
            [(1, 1, 9, 9, 0), (20, 20, 40, 40, 1), (50, 50, 60, 60, 1)],
            [],
            difficult=(1,),
        ),
        ("cat", "dog"),
    )
    assert [len(e.detections["labels"]) for e in examples] == [2, 0]
    assert examples[0].detections["ignored"].boxes.tolist() == [[20, 20, 40, 40]]
    assert examples[0].detections["labels"].scores.tolist() == [1, 1]


def test_boxes_are_cut_at_the_border_and_those_without_an_area_inside_are_left_out_and_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    boxes: list[Row] = [
        (-5, -5, 300, 300, 0),
        (10, 10, 10, 30, 0),
        (100, 10, 140, 30, 0),
        (5, 5, 6, 6, 0),
    ]
    with caplog.at_level(logging.WARNING):
        (example,) = build_labelled_examples(_labelled_images(boxes), ("cat",))
    assert example.detections["labels"].boxes.tolist() == [
        [0, 0, 100, 80],
        [5, 5, 6, 6],
    ]
    assert (
        "2 boxes have no area inside their image and are left out, the first one"
        " /data/00000000.png: [10.0, 10.0, 10.0, 30.0]" in caplog.text
    )


def test_classes_without_a_box_and_images_without_labels_are_told() -> None:
    with pytest.raises(
        InputError,
        match=(
            r"no training image has a box of dog, bus \(of 1 annotated images, 1"
            r" boxes\)"
        ),
    ):
        build_labelled_examples(
            _labelled_images([(1, 1, 9, 9, 0)]), ("cat", "dog", "bus")
        )
    with pytest.raises(InputError, match="no training image has annotations"):
        build_labelled_examples(_labelled_images(), ("cat",))


def _context(folder: Path, scenes: SourceScenes) -> Context:
    from coin_ray.config import Cloud, DemoScenes, PipelineConfig

    config = PipelineConfig("tiny", ("a",), DemoScenes(), Cloud())
    return Context(config, str(folder), str(folder), {}, {"scenes": scenes}, "images")


def test_source_scenes_are_the_same_each_time_and_no_split_shares_one(
    tmp_path: Path,
) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    digests = {
        source_scenes.run(_context(folder, SourceScenes(train=14, val=5, test=3)))[
            "digest"
        ]
        for folder in folders
    }
    assert len(digests) == 1
    parts = {
        split: read_labelled_images(str(folders[0]), split)
        for split in ("train", "val", "test")
    }
    assert {split: len(part.rows) for split, part in parts.items()} == {
        "train": 14,
        "val": 5,
        "test": 3,
    }
    assert len({row["image_id"] for part in parts.values() for row in part.rows}) == 22
    boxes = np.concatenate([t.boxes.numpy() for t in parts["train"].truth.values()])
    assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_without_val_images_a_tenth_of_the_training_images_validates(
    tmp_path: Path,
) -> None:
    source_scenes.run(_context(tmp_path, SourceScenes(train=60, val=0)))
    train, val = (
        read_labelled_images(str(tmp_path), split) for split in ("train", "val")
    )
    assert len(train.rows) + len(val.rows) == 60
    assert 0 < len(val.rows) < 20
    assert all(is_validation_image(str(row["image_id"])) for row in val.rows)
    assert not read_labelled_images(str(tmp_path), "test").rows
