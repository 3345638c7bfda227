"""The command that takes labels of a run to people and back."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from coin_ray import storage, tables
from coin_ray.commands.main import main
from coin_ray.commands.review import TOOLS
from coin_ray.config import PipelineConfig
from coin_ray.config.presets import demo
from coin_ray.config.yaml_files import read_config, to_yaml
from coin_ray.data.formats import read_dataset
from coin_ray.data.review import corrections, cvat
from coin_ray.runs.graph import build_steps

BOX = [1.0, 2.0, 11.0, 7.0]
FILES = {
    "label-studio": "tasks.json",
    "cvat": "annotations.xml",
    "fiftyone": "samples.json",
}


def _config() -> PipelineConfig:
    return replace(demo(), classes=("cat", "dog"))


@pytest.fixture
def root(tmp_path: Path) -> str:
    """A run of two classes whose step separate is finished: image n has n boxes of
    three on which the teachers disagree."""
    config = _config()
    run_root = str(tmp_path / "run")
    steps = build_steps(config)
    rows, separated = [], []
    for n in range(3):
        path = tmp_path / f"{n}.png"
        Image.new("RGB", (40, 30), (n, 0, 0)).save(path)
        rows.append(
            {
                "image_id": str(n),
                "uri": str(path),
                "width": 40,
                "height": 30,
                "split": "train",
            }
        )
        kinds = ["inconsistent"] * n + ["consistent"] * (3 - n)
        probs, names = (
            [[0.8, 0.2, 0.0]] * 3,
            dict.fromkeys(("cloud_labels", "clip_labels"), [0] * 3),
        )
        separated.append(
            {
                "image_id": str(n),
                "boxes": [BOX] * 3,
                "kind": kinds,
                "cloud_probs": probs,
                "clip_probs": probs,
            }
            | names
        )
    storage.write_bytes(storage.join(run_root, "config.yaml"), to_yaml(config).encode())
    storage.write_table(
        storage.join(steps["images"].folder(run_root), "images.parquet"),
        pa.Table.from_pylist(rows, schema=tables.IMAGES),
    )
    folder = steps["separate"].folder(run_root)
    storage.write_table(
        storage.join(folder, "separation.parquet"),
        pa.Table.from_pylist(separated, schema=tables.SEPARATION),
    )
    storage.write_json(storage.join(folder, "manifest.json"), {})
    return run_root


@pytest.mark.parametrize("tool", TOOLS)
def test_the_images_with_the_highest_disagreement_go_out_first(
    tool: str, root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(
            [
                "review",
                "out",
                tool,
                "--root",
                root,
                "--out",
                str(tmp_path / "out"),
                "--most",
                "2",
            ]
        )
        == 0
    )
    reviews = corrections.read_reviews(
        str(tmp_path / "out" / ("" if tool == "fiftyone" else FILES[tool]))
    )
    order = ["1", "2"] if tool == "cvat" else ["2", "1"]  # CVAT sorts frames by name
    assert [(r.image_id, len(r.boxes), r.reviewed) for r in reviews] == [
        (image_id, 3, False) for image_id in order
    ]
    assert (tmp_path / "out" / FILES[tool]).exists()
    assert "2 of 3 training images" in capsys.readouterr().out


def test_what_people_have_reviewed_becomes_a_data_set(
    root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    main(["review", "out", "cvat", "--root", root, "--out", str(out)])
    *others, first = cvat.read_cvat(str(out / "annotations.xml"))
    back = [
        "review",
        "back",
        str(out / "annotations.xml"),
        "--out",
        str(tmp_path / "set"),
        "--format",
        "voc",
    ]
    assert main(back) == 2
    assert "no image in it is marked as reviewed" in capsys.readouterr().err
    (out / "annotations.xml").write_bytes(
        cvat.cvat_xml([replace(first, reviewed=True, boxes=first.boxes[:1]), *others])
    )
    assert main(back) == 0
    [record] = read_dataset(f"{tmp_path}/set#train").records
    assert (record.file, record.boxes.tolist(), record.labels) == (
        "2.png",
        [BOX],
        ("cat",),
    )


def test_what_has_been_reviewed_does_not_go_out_again(
    root: str, tmp_path: Path
) -> None:
    """Not even an image in which a person saw nothing."""
    out = str(tmp_path / "out")
    main(["review", "out", "cvat", "--root", root, "--out", out])
    reviews = cvat.read_cvat(f"{out}/annotations.xml")
    (tmp_path / "done.xml").write_bytes(
        cvat.cvat_xml([replace(reviews[2], reviewed=True, boxes=())])
    )
    before, config = (
        build_steps(read_config(f"{root}/config.yaml")),
        replace(
            read_config(f"{root}/config.yaml"), corrections=(f"{tmp_path}/done.xml",)
        ),
    )
    storage.write_bytes(f"{root}/config.yaml", to_yaml(config).encode())
    steps = build_steps(config)
    table = pa.table({"image_id": ["2"]})
    storage.write_table(
        storage.join(steps["corrections"].folder(root), "corrections.parquet"), table
    )
    for name in ("separation.parquet", "manifest.json"):
        file_bytes = storage.read_bytes(
            storage.join(before["separate"].folder(root), name)
        )
        storage.write_bytes(
            storage.join(steps["separate"].folder(root), name), file_bytes
        )
    assert main(["review", "out", "cvat", "--root", root, "--out", out]) == 0
    assert [r.image_id for r in cvat.read_cvat(f"{out}/annotations.xml")] == ["0", "1"]


def _export(tmp_path: Path, root: str, **changes: object) -> str:
    """Write a CVAT export in which image 1 is reviewed, with one box of these changes."""
    out = tmp_path / "out"
    assert main(["review", "out", "cvat", "--root", root, "--out", str(out)]) == 0
    first, second, third = cvat.read_cvat(str(out / "annotations.xml"))
    box = replace(second.boxes[0], **changes)  # type: ignore[arg-type]
    reviewed = [
        replace(first, reviewed=True, boxes=()),
        replace(second, reviewed=True, boxes=(box,)),
    ]
    (out / "annotations.xml").write_bytes(cvat.cvat_xml([*reviewed, third]))
    return str(out / "annotations.xml")


@pytest.mark.parametrize(
    ("changes", "files", "message"),
    [
        ({"edges": (1, 2, 90, 7)}, ["0.png"], "1.png: the box .* is not inside"),
        ({"edges": (5, 2, 5, 7)}, ["0.png"], "1.png: the box .* has no area"),
        ({"edges": (11, 7, 1, 2)}, ["0.png", "1.png"], "edges the other way round"),
        ({"label": "horse"}, ["0.png"], "1.png has a 'horse', which is no class"),
    ],
)
def test_a_data_set_of_reviews_passes_the_checks_of_corrections(
    changes: dict[str, object],
    files: list[str],
    message: str,
    root: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    storage.write_json(
        f"{build_steps(_config())['images'].folder(root)}/manifest.json", {}
    )
    export = _export(tmp_path, root, **changes)
    target = str(tmp_path / "set")
    back = ["review", "back", export, "--out", target, "--format", "voc"]
    assert main([*back, "--root", root]) == 0
    assert re.search(message, capsys.readouterr().out)
    assert [record.file for record in read_dataset(target).records] == files


@pytest.mark.parametrize("format", ["coco", "voc", "yolo", "kitti", "bdd100k"])
def test_each_image_keeps_its_split(root: str, tmp_path: Path, format: str) -> None:
    folder = build_steps(_config())["images"].folder(root)
    storage.write_json(f"{folder}/manifest.json", {})
    export = _export(tmp_path, root, label="cat")
    rows = storage.read_table(f"{folder}/images.parquet").to_pylist()
    for row in rows:
        row["split"] = "val" if row["uri"].endswith("1.png") else row["split"]
    table = pa.Table.from_pylist(rows, schema=tables.IMAGES)
    storage.write_table(f"{folder}/images.parquet", table)
    target = str(tmp_path / "set")
    back = ["review", "back", export, "--out", target, "--format", format]
    assert main([*back, "--root", root]) == 0
    for split, file in (("train", "0.png"), ("val", "1.png")):
        [record] = read_dataset(f"{target}#{split}").records
        assert (record.file, record.annotated) == (file, True)


def test_yolo_numbers_the_classes_as_the_run_does(root: str, tmp_path: Path) -> None:
    storage.write_json(
        f"{build_steps(_config())['images'].folder(root)}/manifest.json", {}
    )
    export = _export(tmp_path, root, label="Dogs")
    target = str(tmp_path / "set")
    back = ["review", "back", export, "--out", target, "--format", "yolo"]
    assert main([*back, "--root", root]) == 0
    assert (tmp_path / "set/labels/train/1.txt").read_text().startswith("1 ")


def test_a_photo_that_was_replaced_is_not_labelled_as_the_old_one(
    root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    main(["review", "out", "cvat", "--root", root, "--out", str(out)])
    first, *_ = cvat.read_cvat(str(out / "annotations.xml"))
    digest = storage.sha256(first.uri)
    sent = cvat.cvat_xml([replace(first, image_id=digest, reviewed=True)])
    (out / "annotations.xml").write_bytes(sent)
    back = ["review", "back", str(out / "annotations.xml"), "--out", f"{tmp_path}/set"]
    assert main(back) == 0
    Image.new("RGB", (40, 30), "green").save(first.uri)
    assert main([*back[:-1], f"{tmp_path}/other"]) == 2
    assert "is no longer the one that was reviewed" in capsys.readouterr().err


def test_a_run_that_has_not_come_so_far_is_told(
    root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage.remove(
        storage.join(
            build_steps(replace(demo(), classes=("cat", "dog")))["separate"].folder(
                root
            ),
            "manifest.json",
        )
    )
    assert (
        main(["review", "out", "cvat", "--root", root, "--out", str(tmp_path / "out")])
        == 2
    )
    assert "needs the finished step separate" in capsys.readouterr().err
    assert (
        main(
            [
                "review",
                "out",
                "cvat",
                "--root",
                str(tmp_path / "nowhere"),
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 2
    )
    assert "no config file" in capsys.readouterr().err
