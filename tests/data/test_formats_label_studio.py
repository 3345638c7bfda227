"""Labels to Label Studio and back."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from coin_ray import storage, tables
from coin_ray.data.formats import read
from coin_ray.data.formats.label_studio import labelling_setup, main, read_export, tasks
from coin_ray.errors import InputError

CLASSES = ("cat", 'stop "sign" & <more>')
BOXES = [[0.0, 0.0, 40.0, 30.0], [1.0, 2.0, 11.0, 7.0], [4.0, 5.0, 8.0, 9.0]]
CLOUD = [[0.9, 0.05, 0.05], [0.75, 0.25, 0.0], [0.0, 0.5, 0.5]]
CLIP = [[0.8, 0.1, 0.1], [0.125, 0.625, 0.25], [0.0, 0.0, 0.0]]


def images(folder: Path) -> list[dict[str, Any]]:
    rows = []
    for name in ("disputed", "agreed", "unseen", "empty"):
        path = folder / f"{name}.jpg"
        Image.new("RGB", (40, 30)).save(path)
        rows.append({"image_id": name, "uri": str(path), "width": 40, "height": 30, "split": "train"})
    return rows


def separation() -> list[dict[str, Any]]:
    kinds = ["consistent", "inconsistent", "private"]
    whole = {"image_id": "disputed", "boxes": BOXES, "kind": kinds, "cloud_probs": CLOUD, "clip_probs": CLIP}
    agreed = {"image_id": "agreed", "boxes": BOXES[:1], "kind": kinds[:1], "cloud_probs": CLOUD[:1], "clip_probs": CLIP[:1]}
    return [whole, agreed, {"image_id": "empty", "boxes": [], "kind": [], "cloud_probs": [], "clip_probs": []}]


def reviewed(made: list[dict[str, Any]], **changes: Any) -> list[dict[str, Any]]:
    """An export in which a person took every prediction as it is."""
    return [task | {"annotations": [{"result": task["predictions"][0]["result"], "was_cancelled": False} | changes]} for task in made]


def export(folder: Path, content: Any) -> str:
    (folder / "export.json").write_text(json.dumps(content))
    return str(folder / "export.json")


def test_a_task_says_how_far_the_teachers_agree(tmp_path: Path) -> None:
    made = tasks(images(tmp_path), separation(), CLASSES, "/data/local-files/?d={uri}")
    assert [t["data"]["image_id"] for t in made] == ["disputed", "agreed", "empty"]
    assert [t["predictions"][0]["score"] for t in made] == [1 / 3, 1, 1]
    data = made[0]["data"]
    assert (data["consistent"], data["inconsistent"], data["private"]) == (1, 1, 1)
    assert data["image"] == f"/data/local-files/?d={tmp_path}/disputed.jpg"


def test_a_box_says_its_kind_and_what_each_teacher_says(tmp_path: Path) -> None:
    regions = tasks(images(tmp_path), separation(), CLASSES)[0]["predictions"][0]["result"]
    assert [r["meta"]["text"] for r in regions] == [
        ["consistent: cloud cat 0.90, CLIP cat 0.80"],
        [f"inconsistent: cloud cat 0.75, CLIP {CLASSES[1]} 0.62"],
        [f"private: {CLASSES[1]} 0.50"],
    ]
    value = {"x": 2.5, "y": pytest.approx(20 / 3), "width": 25, "height": pytest.approx(50 / 3), "rotation": 0, "rectanglelabels": ["cat"]}
    assert regions[1]["value"] == value
    assert (regions[1]["original_width"], regions[1]["original_height"]) == (40, 30)


def test_labels_taken_as_they_are_come_back_the_same(tmp_path: Path) -> None:
    records = read_export(export(tmp_path, reviewed(tasks(images(tmp_path), separation(), CLASSES))))
    assert [r.file for r in records] == ["disputed.jpg", "agreed.jpg", "empty.jpg"]
    np.testing.assert_allclose(records[0].boxes, BOXES, atol=1e-9)
    assert records[0].labels == ("cat", "cat", CLASSES[1])
    assert [len(r.labels) for r in records] == [3, 1, 0]
    assert all(r.annotated for r in records)


def test_only_finished_tasks_come_back_and_the_last_word_counts(tmp_path: Path) -> None:
    first, second, third = tasks(images(tmp_path), separation(), CLASSES)
    late = {"result": [], "updated_at": "2026-02-01T00:00:00Z"}
    early = {"result": first["predictions"][0]["result"], "updated_at": "2026-01-01T00:00:00Z"}
    skipped = {"result": [], "was_cancelled": True}
    content = [first | {"annotations": [late, early]}, second | {"annotations": [skipped]}, third | {"annotations": []}]
    assert [(r.file, r.labels) for r in read_export(export(tmp_path, content))] == [("disputed.jpg", ())]


def test_other_kinds_of_regions_are_left_out(tmp_path: Path) -> None:
    choice = {"type": "choices", "value": {"choices": ["night"]}}
    [record] = read_export(export(tmp_path, reviewed(tasks(images(tmp_path), separation()[:1], CLASSES), result=[choice])))
    assert record.labels == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotation": 30}, "task 0: expected an upright box with one label"),
        ({"rectanglelabels": []}, "task 0: expected an upright box with one label"),
        ({"width": None}, "task 0: expected an upright box with one label"),
        ({"rectanglelabels": [" "]}, "one line of printable characters"),
    ],
)
def test_what_is_no_box_is_an_error(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    content = reviewed(tasks(images(tmp_path), separation()[:1], CLASSES))
    content[0]["annotations"][0]["result"][0]["value"].update(change)
    with pytest.raises(InputError, match=message):
        read_export(export(tmp_path, content))


@pytest.mark.parametrize(
    ("content", "message"),
    [({}, "is not a JSON export of Label Studio"), ([{"data": {"image": "x"}, "annotations": [{"result": []}]}], "task 0 has no data.uri")],
)
def test_what_is_no_export_is_an_error(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_export(export(tmp_path, content))


def test_an_image_that_is_gone_is_an_error(tmp_path: Path) -> None:
    path = export(tmp_path, reviewed(tasks(images(tmp_path), separation()[:1], CLASSES)))
    (tmp_path / "disputed.jpg").unlink()
    with pytest.raises(InputError, match=r"task 0: .*disputed\.jpg is no image that can be read"):
        read_export(path)


def test_the_labelling_setup_names_the_classes() -> None:
    root = ET.fromstring(labelling_setup(CLASSES))
    assert [label.get("value") for label in root.iter("Label")] == list(CLASSES)


def test_the_command_writes_tasks_and_a_data_set_of_the_corrected_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage.write_table(f"{tmp_path}/images.parquet", pa.Table.from_pylist(images(tmp_path), schema=tables.IMAGES))
    storage.write_table(f"{tmp_path}/separation.parquet", pa.Table.from_pylist(separation(), schema=tables.SEPARATION))
    run = ["out", str(tmp_path), str(tmp_path), "--out", f"{tmp_path}/review", "--classes"]
    assert main([*run, "cat,dog"]) == 0
    content = reviewed(json.loads((tmp_path / "review" / "tasks.json").read_text()))
    assert (tmp_path / "review" / "labels.xml").exists()
    assert main(["back", export(tmp_path, content), "--out", f"{tmp_path}/voc", "--format", "voc"]) == 0
    assert [r.labels for r in read(f"{tmp_path}/voc").records] == [("cat",), ("cat", "cat", "dog"), ()]
    assert main([*run, "cat"]) == 2
    assert "the run has 2 classes, --classes names 1" in capsys.readouterr().err
