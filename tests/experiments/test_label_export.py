"""The labels of a finished run as a data set for other trainers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from coin_ray import storage, tables
from coin_ray.cloud.answer_fusion import fuse_with_members
from coin_ray.cloud.protocol import RawDetections
from coin_ray.commands.main import main
from coin_ray.config import PipelineConfig
from coin_ray.config.presets import demo
from coin_ray.config.yaml_files import to_yaml
from coin_ray.data.formats import read_dataset
from coin_ray.data.formats.ragged import starts_of
from coin_ray.errors import ConfigError, InputError
from coin_ray.experiments import label_export
from coin_ray.experiments.label_export import (
    UNANSWERED,
    UNSURE,
    ExportCounts,
    ExportSettings,
    export_labels,
)
from coin_ray.experiments.label_sources import ScoredLabels, fuse_labels
from coin_ray.runs.graph import build_steps
from coin_ray.structures import Detections
from coin_ray.tables import Provenance, detections_row
from tests.builders import Row, detections
from tests.peers import read_as

CLASSES = ("cat", "dog")
IMAGES = 40
LEFT, RIGHT = (1.0, 2.0, 11.25, 7.5), (20.0, 5.0, 39.0, 29.0)
FORMATS = ("coco", "yolo", "voc")


def _id(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def _config() -> PipelineConfig:
    # CLIP takes no part, so that free fusion is the cloud
    config = replace(demo(), classes=CLASSES)
    return replace(config, collect=replace(config.collect, labeler="none"))


def _rows_of(number: int) -> list[Row]:
    """Image 0 has no answer, 1 no box, 2 one uncertain box, the others a certain and an
    uncertain one.
    """
    if number == 1:
        return []
    uncertain = [(RIGHT, 1, 0.4)]
    return uncertain if number == 2 else [(LEFT, 0, 0.9), *uncertain]


@pytest.fixture
def root(tmp_path: Path) -> str:
    """A run whose collection, separation and distillation are finished."""
    run_root = str(tmp_path / "run")
    steps = build_steps(_config())
    folders = {name: step.folder(run_root) for name, step in steps.items()}
    images, cloud, separation = tables.TableBuilder(tables.IMAGES), [], []
    for number in range(IMAGES):
        # two folders, each with the same names
        path = tmp_path / f"camera {number % 2}" / f"{number // 2}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), (number, 0, 0)).save(path)
        split = "val" if number >= IMAGES - 4 else "train"
        images.append(
            {
                "image_id": _id(number),
                "uri": str(path),
                "width": 40,
                "height": 30,
                "split": split,
            }
        )
        answer = Provenance("cloud", status="error" if number == 0 else "ok")
        found = detections(*_rows_of(number), classes=len(CLASSES))
        cloud.append(detections_row(_id(number), found, answer))
        kinds = {0: "consistent", 1: "inconsistent"}
        separation.append(
            {
                "image_id": _id(number),
                "boxes": found.boxes.tolist(),
                "kind": [kinds[label] for label in found.labels.tolist()],
                "cloud_labels": found.labels.tolist(),
                "clip_labels": found.labels.tolist(),
                "cloud_probs": found.probs.tolist(),
                "clip_probs": found.probs.tolist(),
            }
        )
    tables_by_file = {
        f"{folders['images']}/images.parquet": images.table(),
        f"{folders['images']}/annotations.parquet": tables.ANNOTATIONS.empty_table(),
        f"{folders['collect']}/cloud.parquet": tables.detections_table(cloud),
        f"{folders['separate']}/separation.parquet": next(
            tables.iterate_tables(separation, tables.SEPARATION)
        ),
    }
    predictions = f"labels/student-{steps['export'].fingerprint}"
    for split in ("train", "val"):
        uri = storage.join(run_root, predictions, split, "student.parquet")
        tables_by_file[uri] = tables.detections_table(cloud)
    for uri, table in tables_by_file.items():
        storage.write_table(uri, table)
    for name in ("images", "collect", "separate", "distill"):
        manifest = {"step": name, "fingerprint": "", "inputs": {}, "identity": None}
        manifest |= {"metrics": {}, "started": 0.0, "seconds": 0.0}
        storage.write_json(f"{folders[name]}/manifest.json", manifest)
    storage.write_bytes(f"{run_root}/config.yaml", to_yaml(_config()).encode())
    return run_root


def _export(root: str, out: Path, **changes: object) -> ExportCounts:
    settings = ExportSettings("cloud", "coco", str(out), score_min=0.6, val_share=0.3)
    return export_labels(root, _config(), replace(settings, **changes), tell=print)  # type: ignore[arg-type]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("source", ["cloud", "consistent", "student", "fused"])
def test_all_sources_read_back_in_all_formats(
    root: str, tmp_path: Path, source: str, format: str
) -> None:
    counts = _export(root, tmp_path / "out", source=source, format=format)
    expected = {UNSURE: 1} if source == "consistent" else {UNSURE: 1, UNANSWERED: 1}
    assert counts.left_out == expected
    records = [
        record
        for split in ("train", "val")
        for record in read_dataset(f"{tmp_path}/out#{split}").records
    ]
    assert len(records) == counts.images.total() == IMAGES - 4 - len(expected)
    empty = [record for record in records if not record.labels]
    assert len(empty) == 1, "an image without any box is a picture without objects"
    for record in records:
        objects = record.boxes[~record.difficult].round(6).tolist()
        assert objects == ([] if record in empty else [list(LEFT)])
        if format == "coco":
            assert record.boxes[record.difficult].round(6).tolist() in (
                [],
                [list(RIGHT)],
            )
    listed = (tmp_path / "out" / "left_out.csv").read_text()
    assert listed.count("\n") == 1 + len(expected)
    assert "seed 0" in (tmp_path / "out" / "README.md").read_text()


def test_scores_kinds_and_probabilities_are_written(root: str, tmp_path: Path) -> None:
    _export(root, tmp_path / "coco", source="fused")
    _export(root, tmp_path / "yolo", source="fused", format="yolo")
    labels = json.loads((tmp_path / "coco/annotations/instances_val.json").read_text())
    assert [c["name"] for c in labels["categories"]] == list(CLASSES)
    first = labels["annotations"][0]
    assert (first["score"], first["kind"], first["iscrowd"]) == (0.9, "both", 0), first
    assert first["probs"] == {"1": 0.9, "2": 0.05}
    lines = (tmp_path / "yolo" / "details.jsonl").read_text().splitlines()
    details = [json.loads(line) for line in lines]
    ignored = [box for image in details for box in image["labels"] if box["ignored"]]
    assert {box["class"] for box in ignored} == {1}


def test_the_split_depends_on_the_id_alone(root: str, tmp_path: Path) -> None:
    _export(root, tmp_path / "a", source="cloud")
    _export(root, tmp_path / "b", source="student", format="yolo")
    files = [
        {path.name for path in (tmp_path / name / "images" / "val").iterdir()}
        for name in ("a", "b")
    ]
    assert files[0] == files[1]


def test_a_person_replaces_all_boxes(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reviewed = {
        _id(0): detections(((0, 0, 5, 5), 1, 1.0), classes=2),
        _id(3): Detections.empty(2),
    }
    monkeypatch.setattr(
        "coin_ray.experiments.label_sources.open_corrections", lambda *_: reviewed
    )
    counts = _export(root, tmp_path / "out", copy_images=True)
    assert (counts.reviewed, counts.empty) == (2, 2)
    assert counts.left_out == {UNSURE: 1}
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*.png"))


def test_thresholds_are_chosen_on_labelled_validation_images(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label_export, "MIN_TRUTH_BOXES", 4)
    rows = [
        {
            "image_id": _id(number),
            "boxes": [list(LEFT)],
            "labels": [0],
            "difficult": [False],
        }
        for number in range(IMAGES - 4, IMAGES)
    ]
    annotations = next(tables.iterate_tables(rows, tables.ANNOTATIONS))
    folder = build_steps(_config())["images"].folder(root)
    storage.write_table(f"{folder}/annotations.parquet", annotations)
    counts = _export(root, tmp_path / "out", score_min=None)
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "| 0 | cat | 0.9000 | best F1 1.00 on 4 boxes" in readme
    assert "| 1 | dog | 0.5500 | the default" in readme
    assert counts.classes == {0: IMAGES - 4 - 3}


def _labels(*images: Detections) -> ScoredLabels:
    """The labels of images 0, 1, ..."""
    joined = Detections.cat(images)
    return ScoredLabels(
        [str(number) for number in range(len(images))],
        starts_of(np.array([len(image) for image in images])),
        joined.boxes.numpy(),
        joined.scores.numpy(),
        joined.labels.numpy(),
        joined.probs.numpy(),
        np.full(len(joined), "", np.object_),
        np.zeros(len(joined), np.bool_),
    )


def test_a_box_that_one_side_lacks_keeps_half_its_score() -> None:
    teachers = detections((LEFT, 0, 0.8), classes=2)
    student = detections((LEFT, 0, 0.6), (RIGHT, 1, 0.9), classes=2)
    nothing = teachers[:0]
    fused = fuse_labels(
        _labels(nothing, teachers, nothing), _labels(nothing, student, nothing)
    )
    assert fused.starts.tolist() == [0, 0, 2, 2]
    assert fused.kinds.tolist() == ["both", "student"]
    assert fused.scores == pytest.approx([0.7, 0.45])
    assert fused.probs.sum(1) == pytest.approx([1, 1])
    assert fused.probs[1] == pytest.approx([0.025, 0.45, 0.525])


COORDINATES = st.sampled_from([0.0, 4.0, 4.1, 5.0, 9.7, 10.0, 14.0])
BOXES = st.tuples(COORDINATES, COORDINATES, COORDINATES, COORDINATES).map(
    lambda c: (min(c[::2]), min(c[1::2]), max(c[::2]), max(c[1::2]))
)
ROWS = st.lists(
    st.tuples(BOXES, st.integers(0, 1), st.sampled_from([0.0, 0.3, 0.5, 0.7])),
    max_size=5,
)


@given(images=st.lists(st.tuples(ROWS, ROWS), min_size=1, max_size=4))
def test_fusing_many_images_is_weighted_box_fusion_of_each(images: Any) -> None:
    """Also of equal boxes and scores, and of boxes without area or score."""
    pairs = [[detections(*rows, classes=2) for rows in image] for image in images]
    first, second = (_labels(*labeller) for labeller in zip(*pairs, strict=True))
    fused = fuse_labels(first, second)
    kind_of_members = {(True, True): "both", (True, False): "teachers"}
    for number, pair in enumerate(pairs):
        answers = []
        for boxes in pair:
            class_scores = np.zeros((len(boxes), 2), np.float32)
            class_scores[np.arange(len(boxes)), boxes.labels.numpy()] = boxes.scores
            answers.append(
                RawDetections(boxes.boxes.numpy(), class_scores, "per_class")
            )
        expected, members = fuse_with_members(answers, (1.0, 1.0), 0.55)
        rows = slice(fused.starts[number], fused.starts[number + 1])
        assert fused.boxes[rows].tobytes() == expected.boxes.tobytes()
        scores = expected.class_scores.max(1, initial=0)
        assert fused.scores[rows].tobytes() == scores.tobytes()
        if len(expected):
            best = expected.class_scores.argmax(1).tolist()
            assert fused.labels[rows].tolist() == best
        kinds = [
            kind_of_members.get(tuple(row), "student")
            for row in (members >= 0).tolist()
        ]
        assert fused.kinds[rows].tolist() == kinds


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score_min": 2.0}, "score-min"),
        ({"val_share": 1.0}, "--val"),
        ({"val_share": 0.0, "format": "yolo"}, "Ultralytics"),
        ({"folder": "s3://bucket/labels"}, "local folder"),
    ],
)
def test_impossible_settings_are_refused(
    root: str, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _export(root, tmp_path / "out", **changes)


def test_a_folder_with_files_is_refused_and_stays(root: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        _export(root, out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_what_reads_back_otherwise_leaves_no_folder(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label_export.LabelDigest, "add_dataset", lambda *_: None)
    with pytest.raises(InputError, match="reads back"):
        _export(root, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_the_command_exports(
    root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--of", "cloud", "--format", "voc", "--out", str(tmp_path / "out")]
    assert main(["labels", "export", "--root", root, *arguments]) == 0
    assert "all classes: score at least 0.550" in capsys.readouterr().out
    assert main(["labels", "export", "--root", root, *arguments]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "format"),
    [
        ("pycocotools", "coco"),
        *(("supervision", format) for format in FORMATS),
        *(("datumaro", format) for format in FORMATS),
    ],
)
def test_other_libraries_read_the_same_boxes(
    root: str, tmp_path: Path, library: str, format: str
) -> None:
    counts = _export(root, tmp_path / "out", format=format, copy_images=True)
    boxes_by_image = read_as(library, format, tmp_path / "out", "train", "val")
    assert len(boxes_by_image) == counts.images.total()
    boxes = [box for boxes in boxes_by_image.values() for box in boxes]
    edges = np.array([box[:4] for box in boxes])
    if (library, format) == ("datumaro", "voc"):
        edges[:, :2] -= 1  # it takes VOC's pixels, which count from 1, as they stand
    if (library, format) == ("supervision", "coco"):
        # crowds of COCO are boxes to supervision
        is_object = np.array([box[4] == "cat" for box in boxes])
        boxes, edges = [box for box in boxes if box[4] == "cat"], edges[is_object]
    assert {box[4] for box in boxes} == {"cat"}
    assert len(boxes) == counts.classes.total()
    np.testing.assert_allclose(edges, [LEFT] * len(boxes), atol=0.01)


@pytest.mark.slow
def test_a_detector_of_torchvision_trains_on_the_export(
    root: str, tmp_path: Path
) -> None:
    """Read by torchvision's own ``CocoDetection``."""
    pytest.importorskip("pycocotools")
    import torch
    from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large
    from torchvision.transforms.v2 import functional

    _export(root, tmp_path / "out")
    folder, labels = tmp_path / "out" / "images/train", tmp_path / "out" / "annotations"
    dataset = wrap_dataset_for_transforms_v2(
        CocoDetection(str(folder), str(labels / "instances_train.json")),
        target_keys=("boxes", "labels"),
    )
    samples = [dataset[number] for number in range(8)]
    targets = [target for _, target in samples if "boxes" in target]
    images = [
        functional.to_dtype(functional.pil_to_tensor(image), scale=True)
        for image, target in samples
        if "boxes" in target
    ]
    assert all(LEFT in map(tuple, target["boxes"].tolist()) for target in targets)
    torch.manual_seed(0)
    model = ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=len(CLASSES) + 1
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for _ in range(6):
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
