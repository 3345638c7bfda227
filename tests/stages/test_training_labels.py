"""What propagation and distillation read of the tables of the steps before them."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from builders import detections

from coin_ray import storage, tables
from coin_ray.config import Labels, PipelineConfig
from coin_ray.config.presets import PRESETS
from coin_ray.errors import InputError
from coin_ray.stages.common.teacher_outputs import (
    make_teacher_lookup,
    open_collected,
    passes_threshold,
)
from coin_ray.stages.common.training_labels import (
    LabelSource,
    build_training_examples,
    count_labels,
    open_training_labels,
)
from coin_ray.structures import Detections
from coin_ray.tables import Provenance, detections_row, detections_table

BOX, OTHER = (4.0, 4.0, 30.0, 28.0), (34.0, 8.0, 58.0, 34.0)
CLOUD = {
    "a": detections((BOX, 0, 0.9), (OTHER, 1, 0.1)),
    "b": detections(),
    "held": detections((BOX, 2, 0.8)),
}
CLIP = {
    "a": detections((BOX, 1, 0.6), (OTHER, 1, 0.7)),
    "b": detections(),
    "held": detections((BOX, 2, 0.8)),
}
SPLITS = {"b": "train", "a": "train", "failed": "train", "held": "test"}


def _config(**changes: object) -> PipelineConfig:
    labels = Labels(score_min=0.3, probabilities="background", clip_background="keep")
    return replace(
        PRESETS["demo"](),
        classes=("cat", "dog", "bird"),
        labels=labels,
        **changes,  # type: ignore[arg-type]
    )


@pytest.fixture
def step_folders(tmp_path: Path) -> dict[str, str]:
    rows = [
        {"image_id": i, "uri": f"{i}.jpg", "width": 64, "height": 48, "split": s}
        for i, s in SPLITS.items()
    ]
    storage.write_table(
        str(tmp_path / "images.parquet"),
        pa.Table.from_pylist(rows, schema=tables.IMAGES),
    )
    truth = [
        {
            "image_id": i,
            "boxes": [BOX, OTHER],
            "labels": [2, 1],
            "difficult": [False, True],
        }
        for i in ("a", "held")
    ]
    storage.write_table(
        str(tmp_path / "annotations.parquet"),
        pa.Table.from_pylist(truth, schema=tables.ANNOTATIONS),
    )
    for name, by_image in (
        ("cloud", CLOUD),
        ("clip_labels", CLIP),
        ("clip_detector", CLIP),
    ):
        detection_rows = [
            detections_row(i, d, Provenance(name)) for i, d in by_image.items()
        ]
        detection_rows.append(
            detections_row("failed", Detections.empty(3), Provenance(name, "error"))
        )
        storage.write_table(
            str(tmp_path / f"{name}.parquet"), detections_table(detection_rows)
        )
    return {"images": str(tmp_path), "collect": str(tmp_path)}


@pytest.mark.parametrize(
    ("source", "labeler", "expected"),
    [
        ("clip", "roi", {"b": [], "a": [1]}),
        ("clip", "none", {"b": [], "a": [0]}),
        ("cloud", "roi", {"b": [], "a": [0]}),
        ("truth", "roi", {"a": [2]}),
    ],
)
@pytest.mark.parametrize("pickled", [False, True])
def test_labels_of_the_training_images(
    step_folders: dict[str, str],
    source: LabelSource,
    labeler: str,
    expected: dict[str, list[int]],
    pickled: bool,
) -> None:
    """They come in the order of the images table, without those that failed or are test
    images; also after a way to another process."""
    config = _config(collect=replace(PRESETS["demo"]().collect, labeler=labeler))
    labels = open_training_labels(source, step_folders, config)
    examples = build_training_examples(step_folders["images"], labels)
    examples = pickle.loads(pickle.dumps(examples)) if pickled else examples
    assert {
        e.image_id: e.detections["labels"].labels.tolist() for e in examples
    } == expected
    assert [e.image_id for e in examples] == list(expected)
    assert [e.uri for e in examples] == [f"{i}.jpg" for i in expected]
    assert count_labels(source, step_folders, config) == sum(
        map(len, expected.values())
    )


def test_the_oracle_without_annotations_is_an_error(
    step_folders: dict[str, str],
) -> None:
    empty = pa.Table.from_pylist([], schema=tables.ANNOTATIONS)
    storage.write_table(
        storage.join(step_folders["images"], "annotations.parquet"), empty
    )
    with pytest.raises(
        InputError, match="the oracle baseline needs annotated training images"
    ):
        open_training_labels("truth", step_folders, _config())


@pytest.mark.parametrize("with_clip_labels", [True, False])
def test_outputs_of_both_teachers(
    step_folders: dict[str, str], with_clip_labels: bool
) -> None:
    separate = replace(PRESETS["demo"]().separate, clip_labels=with_clip_labels)
    config = _config(separate=separate)
    cloud = open_collected(step_folders["collect"], "cloud", config)
    clip = tables.open_detections(
        storage.join(step_folders["collect"], "clip_detector.parquet"), 3
    )
    look_up = make_teacher_lookup(cloud, clip, step_folders["collect"], config)
    teacher_outputs = look_up("a")
    assert torch.equal(teacher_outputs["cloud"].probs, CLOUD["a"].probs[:1])
    assert torch.equal(teacher_outputs["clip"].boxes, CLIP["a"].boxes)
    assert teacher_outputs["clip_labels"].labels.tolist() == (
        [1] if with_clip_labels else []
    )
    assert all(len(teacher_output) == 0 for teacher_output in look_up("b").values())


@pytest.mark.parametrize("keep", ["keep", "drop"])
@pytest.mark.parametrize("clip_score_min", [0.0, 0.5, 0.65])
def test_labels_are_counted_as_they_are_used(
    step_folders: dict[str, str], keep: str, clip_score_min: float
) -> None:
    """CLIP takes one box for background, and the float32 scores .6 and .7 are on both
    sides of a limit."""
    cloud = detections((BOX, 0, 0.9), (OTHER, 1, 0.8), (BOX, 2, 0.7))
    clip = detections((BOX, 1, 0.6), (OTHER, 1, 0.7), (BOX, 2, 0.55))
    clip.probs[1] = torch.tensor([0.1, 0.2, 0.1, 0.6])
    for name, in_image in (("cloud", cloud), ("clip_labels", clip)):
        rows = [
            detections_row(i, in_image, Provenance(name)) for i in ("held", "b", "a")
        ]
        storage.write_table(
            str(Path(step_folders["collect"]) / f"{name}.parquet"),
            detections_table(rows),
        )
    labels = Labels(
        score_min=0.3,
        clip_background=keep,  # type: ignore[arg-type]
        clip_score_min=clip_score_min,
    )
    config = replace(_config(), labels=labels)
    examples = build_training_examples(
        step_folders["images"], open_training_labels("clip", step_folders, config)
    )
    assert count_labels("clip", step_folders, config) == sum(
        len(e.detections["labels"]) for e in examples
    )


def test_classes_with_a_threshold_of_their_own() -> None:
    probs = torch.eye(3)[:2].repeat(2, 1)
    scores = torch.tensor([0.3, 0.3, 0.5, 0.5])
    cloud = Detections(torch.rand(4, 4), scores, torch.tensor([0, 1, 0, 1]), probs)
    labels = Labels(score_min=0.25, class_score_min=(0.4, None))
    assert passes_threshold(cloud, labels).tolist() == [False, True, True, True]
    assert passes_threshold(cloud, Labels(score_min=0.4)).tolist() == [
        False,
        False,
        True,
        True,
    ]
