"""The images stage on folders as users have them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from coin_ray import storage
from coin_ray.config import Cloud, Folder, PipelineConfig
from coin_ray.data.formats import (
    Annotation,
    ImageRecord,
    list_image_files,
    write_dataset,
)
from coin_ray.errors import InputError
from coin_ray.runs.steps import Context
from coin_ray.stages import collect, images

pytestmark = pytest.mark.usefixtures("inspect_in_this_process")


def _context(
    tmp_path: Path,
    folder: Folder,
    classes: tuple[str, ...] = ("person", "traffic light"),
) -> Context:
    config = PipelineConfig("folder", classes, folder, Cloud(serve="demo"))
    return Context(
        config,
        str(tmp_path / "root"),
        str(tmp_path / "root" / "step"),
        {},
        {},
        "images",
    )


def _write_picture(
    path: Path, size: tuple[int, int] = (40, 30), mode: str = "RGB", **save: Any
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(path.name.encode())
    Image.fromarray(
        np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    ).convert(mode).save(path, **save)
    return path


def _read_rows(context: Context, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = storage.read_table(
        storage.join(context.folder, f"{name}.parquet")
    ).to_pylist()
    return rows


def _write_coco(
    folder: Path,
    files: dict[str, list[tuple[list[float], int]]],
    names: tuple[str, ...] = ("person", "Traffic Light"),
) -> None:
    annotations = [
        {"id": n, "image_id": i, "bbox": box, "category_id": label, "iscrowd": 0}
        for i, boxes in enumerate(files.values())
        for n, (box, label) in enumerate(boxes, start=100 * i)
    ]
    categories = [{"id": k, "name": name} for k, name in enumerate(names)]
    coco_images = [{"id": i, "file_name": name} for i, name in enumerate(files)]
    (folder / "annotations.json").write_text(
        json.dumps(
            {
                "images": coco_images,
                "annotations": annotations,
                "categories": categories,
            }
        )
    )


@pytest.mark.parametrize("name", ["grey.png", "cmyk.jpg", "wide.jpg"])
def test_usual_and_unusual_images_are_listed(tmp_path: Path, name: str) -> None:
    mode = {"grey.png": "L", "cmyk.jpg": "CMYK"}.get(name, "RGB")
    _write_picture(
        tmp_path / "in" / name, (20_000, 16) if name == "wide.jpg" else (40, 30), mode
    )
    context = _context(tmp_path, Folder(images=str(tmp_path / "in")))
    assert images.run(context)["count"] == {"train": 1, "val": 0, "test": 0}
    assert _read_rows(context, "images")[0]["width"] == (
        20_000 if name == "wide.jpg" else 40
    )


def test_a_rotated_photo_has_its_upright_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    _write_picture(tmp_path / "in" / "turned.jpg", (40, 30), exif=exif)
    context = _context(tmp_path, Folder(images=str(tmp_path / "in")))
    images.run(context)
    row = _read_rows(context, "images")[0]
    assert (row["width"], row["height"]) == (30, 40)


def test_bad_files_are_recorded_with_a_reason_and_duplicates_counted(
    tmp_path: Path,
) -> None:
    good = _write_picture(tmp_path / "in" / "a.jpg", (400, 300))
    (tmp_path / "in" / "again.jpg").write_bytes(good.read_bytes())
    (tmp_path / "in" / "text.jpg").write_text("no image")
    (tmp_path / "in" / "cut.jpg").write_bytes(good.read_bytes()[:2000])
    (tmp_path / "in" / "empty.png").touch()
    _write_picture(tmp_path / "in" / "pixel.png", (1, 1))
    folder = Folder(images=str(tmp_path / "in"), max_left_out_share=0.8)
    context = _context(tmp_path, folder)
    metrics = images.run(context)
    assert metrics["count"]["train"] == 1
    assert metrics["duplicates"] == 1
    assert {r["uri"].rsplit("/", 1)[-1] for r in _read_rows(context, "rejected")} == {
        "text.jpg",
        "cut.jpg",
        "empty.png",
        "pixel.png",
    }
    assert all(r["reason"] for r in _read_rows(context, "rejected"))


@pytest.mark.parametrize("files", [[], ["notes.txt", "more.txt"]])
def test_a_folder_without_images_is_an_error(tmp_path: Path, files: list[str]) -> None:
    (tmp_path / "in").mkdir()
    for name in files:
        (tmp_path / "in" / name).write_text("text")
    with pytest.raises(InputError, match="no usable image"):
        images.run(_context(tmp_path, Folder(images=str(tmp_path / "in"))))


def test_an_absent_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        images.run(_context(tmp_path, Folder(images=str(tmp_path / "nowhere"))))


def test_coco_truth_of_the_asked_classes_by_name(tmp_path: Path) -> None:
    _write_picture(tmp_path / "in" / "train.jpg")
    for name in ("one.jpg", "two.jpg"):
        _write_picture(tmp_path / "test" / "images" / name)
    _write_coco(tmp_path / "test", {"one.jpg": [([1, 2, 10, 5], 1)], "two.jpg": []})
    context = _context(
        tmp_path, Folder(images=str(tmp_path / "in"), test=str(tmp_path / "test"))
    )
    assert images.run(context)["count"] == {"train": 1, "val": 0, "test": 2}
    rows = {row["image_id"]: row for row in _read_rows(context, "annotations")}
    assert sorted(len(r["boxes"]) for r in rows.values()) == [0, 1]
    row = next(r for r in rows.values() if r["boxes"])
    assert (row["boxes"], row["labels"], row["difficult"]) == (
        [[1.0, 2.0, 11.0, 7.0]],
        [1],
        [False],
    )


def test_truth_without_any_asked_class_is_an_error(tmp_path: Path) -> None:
    _write_picture(tmp_path / "in" / "train.jpg")
    _write_picture(tmp_path / "test" / "images" / "one.jpg")
    _write_coco(tmp_path / "test", {"one.jpg": [([1, 2, 3, 4], 0)]}, names=("cat",))
    with pytest.raises(
        InputError, match="none of the classes person, traffic light; it has cat"
    ):
        images.run(
            _context(
                tmp_path,
                Folder(images=str(tmp_path / "in"), test=str(tmp_path / "test")),
            )
        )


def test_an_image_in_two_splits_stays_in_the_first_and_is_reported(
    tmp_path: Path,
) -> None:
    first = _write_picture(tmp_path / "in" / "train.jpg")
    _write_picture(tmp_path / "test" / "images" / "other.jpg")
    (tmp_path / "test" / "images" / "leak.jpg").write_bytes(first.read_bytes())
    _write_coco(tmp_path / "test", {"other.jpg": [([1, 2, 3, 4], 0)], "leak.jpg": []})
    context = _context(
        tmp_path, Folder(images=str(tmp_path / "in"), test=str(tmp_path / "test"))
    )
    assert images.run(context)["count"]["test"] == 1
    assert "same image as one in train" in _read_rows(context, "rejected")[0]["reason"]


def _write_labelled(
    folder: Path,
    data_set: Path,
    form: str,
    *boxes: Annotation,
    split: str = "test",
    annotated: bool = True,
) -> None:
    _write_picture(folder / f"{split}.jpg")
    record = ImageRecord.from_annotations(
        f"{split}.jpg",
        str(folder / f"{split}.jpg"),
        (40, 30),
        boxes if annotated else (),
        annotated,
    )
    write_dataset(
        [record],
        str(data_set),
        form,
        split=split,
        names=sorted({b.label for b in boxes}),
    )


@pytest.mark.parametrize("form", ["coco", "voc", "yolo", "kitti", "bdd100k"])
def test_truth_in_every_format(tmp_path: Path, form: str) -> None:
    boxes = (
        Annotation((1, 2, 11, 7), "Traffic-Lights"),
        Annotation((0, 0, 4, 4), "cat"),
    )
    _write_labelled(tmp_path / "from", tmp_path / "test", form, *boxes)
    _write_picture(tmp_path / "in" / "train.jpg")
    context = _context(
        tmp_path, Folder(images=str(tmp_path / "in"), test=str(tmp_path / "test"))
    )
    assert images.run(context)["count"] == {"train": 1, "val": 0, "test": 1}
    [row] = _read_rows(context, "annotations")
    assert (row["boxes"], row["labels"], row["difficult"]) == (
        [[1.0, 2.0, 11.0, 7.0]],
        [1],
        [False],
    )


@pytest.mark.parametrize("form", ["coco", "voc", "bdd100k"])
def test_difficult_boxes_stay_difficult(tmp_path: Path, form: str) -> None:
    _write_labelled(
        tmp_path / "from",
        tmp_path / "test",
        form,
        Annotation((1, 2, 11, 7), "person", True),
        Annotation((0, 0, 4, 4), "person"),
    )
    _write_picture(tmp_path / "in" / "train.jpg")
    context = _context(
        tmp_path, Folder(images=str(tmp_path / "in"), test=str(tmp_path / "test"))
    )
    images.run(context)
    assert _read_rows(context, "annotations")[0]["difficult"] == [True, False]


def test_all_splits_may_lie_in_one_folder(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        _write_labelled(
            tmp_path / "from",
            tmp_path / "voc",
            "voc",
            Annotation((1, 2, 11, 7), "person"),
            split=split,
        )
    folders = [f"{tmp_path}/voc#{split}" for split in ("train", "val", "test")]
    context = _context(tmp_path, Folder(*folders))
    assert images.run(context)["count"] == {"train": 1, "val": 1, "test": 1}
    assert [row["uri"].rsplit("/", 1)[-1] for row in _read_rows(context, "images")] == [
        "train.jpg",
        "val.jpg",
        "test.jpg",
    ]
    assert list_image_files(folders[1]) == [f"{tmp_path}/voc/JPEGImages/val.jpg"]


def test_images_that_nobody_annotated_are_no_test(tmp_path: Path) -> None:
    _write_picture(tmp_path / "test" / "plain.jpg")
    _write_picture(tmp_path / "in" / "train.jpg")
    with pytest.raises(
        InputError,
        match=(
            r"data\.test .*: no annotated image; expected annotations in the format"
            r" COCO, VOC"
        ),
    ):
        images.run(
            _context(
                tmp_path,
                Folder(images=str(tmp_path / "in"), test=str(tmp_path / "test")),
            )
        )


def test_a_broken_image_in_a_labelled_folder_is_recorded(tmp_path: Path) -> None:
    for split in ("one", "two"):
        _write_labelled(
            tmp_path / "from",
            tmp_path / "test",
            "kitti",
            Annotation((1, 2, 11, 7), "person"),
            split=split,
        )
    (tmp_path / "test" / "training" / "image_2" / "one.jpg").write_text("no image")
    _write_picture(tmp_path / "in" / "train.jpg")
    context = _context(
        tmp_path, Folder(images=str(tmp_path / "in"), test=str(tmp_path / "test"))
    )
    assert images.run(context)["count"]["test"] == 1
    assert [r["uri"].rsplit("/", 1)[-1] for r in _read_rows(context, "rejected")] == [
        "one.jpg"
    ]


def test_a_test_set_of_training_images_is_an_error_that_says_so(tmp_path: Path) -> None:
    _write_labelled(
        tmp_path / "from", tmp_path / "both", "voc", Annotation((1, 2, 11, 7), "person")
    )
    folder = str(tmp_path / "both")
    with pytest.raises(
        InputError, match=r"no annotated image is left; 1 are in an earlier split too"
    ):
        images.run(_context(tmp_path, Folder(images=folder, test=folder)))


def test_published_protocols_may_test_on_the_training_images(tmp_path: Path) -> None:
    """Each image has a row of each split, its truth once; a further copy among the test
    images is still a duplicate."""
    for split in ("one", "two"):
        _write_labelled(
            tmp_path / "from",
            tmp_path / "both",
            "voc",
            Annotation((1, 2, 11, 7), "person"),
            split=split,
        )
    folder = tmp_path / "both"
    context = _context(
        tmp_path, Folder(images=str(folder), test=str(folder), same_images=True)
    )
    metrics = images.run(context)
    assert (metrics["count"], metrics["in_both"], metrics["duplicates"]) == (
        {"train": 2, "val": 0, "test": 2},
        2,
        0,
    )
    ids = sorted(row["image_id"] for row in _read_rows(context, "images"))
    assert metrics["digest"] == hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    assert (
        len(_read_rows(context, "annotations"))
        == len({row["image_id"] for row in _read_rows(context, "images")})
        == 2
    )
    assert collect._first_rows(storage.read_table(f"{context.folder}/images.parquet"))[
        "split"
    ].to_pylist() == ["train", "train"]
    (folder / "JPEGImages" / "two.jpg").write_bytes(
        (folder / "JPEGImages" / "one.jpg").read_bytes()
    )
    metrics = images.run(context)
    assert (metrics["count"]["test"], metrics["in_both"], metrics["duplicates"]) == (
        1,
        1,
        2,
    )


def _labelled_run(
    tmp_path: Path, files: dict[str, list[tuple[list[float], int]]], **settings: Any
) -> Context:
    """Return the context of a run that is measured on COCO labels of ``files``."""
    _write_picture(tmp_path / "in" / "train.jpg")
    for name in files:
        _write_picture(tmp_path / "test" / "images" / name)
    _write_coco(tmp_path / "test", files)
    folder = Folder(str(tmp_path / "in"), test=str(tmp_path / "test"), **settings)
    return _context(tmp_path, folder)


def test_labels_of_an_image_that_is_not_there_are_an_error(tmp_path: Path) -> None:
    context = _labelled_run(tmp_path, {"one.jpg": [([1, 2, 9, 9], 0)], "two.jpg": []})
    (tmp_path / "test" / "images" / "one.jpg").unlink()
    with pytest.raises(
        InputError, match=r"1 labelled or listed .* not there: one\.jpg"
    ):
        images.run(context)


def test_truth_is_cleaned_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    boxes: list[tuple[list[float], int]] = [
        ([1, 2, 9, 9], 0),
        ([1, 2, 9, 9], 0),
        ([1, 2, 9, 9], 1),
        ([25, 5, -10, 10], 0),
        ([30, 20, 30, 5], 0),
        ([5, 5, 0, 5], 0),
        ([45, 5, 5, 5], 0),
    ]
    context = _labelled_run(tmp_path, {"one.jpg": boxes})
    metrics = images.run(context)
    [row] = _read_rows(context, "annotations")
    assert row["boxes"] == [
        [1, 2, 10, 11],
        [1, 2, 10, 11],
        [15, 5, 25, 15],
        [30, 20, 40, 25],
    ]
    assert row["labels"] == [0, 1, 0, 0]
    assert metrics["repairs"] == {
        "reversed": 1,
        "without_area": 1,
        "outside": 1,
        "cut": 1,
        "twice": 1,
    }
    log = capsys.readouterr().out
    for text in (
        "format coco: 1 images, 1 annotated, 0 of them without objects, 7 boxes",
        "1 boxes with exchanged corners: put right",
        "1 boxes given twice: used once",
    ):
        assert text in log


def test_an_image_whose_boxes_are_all_unusable_is_not_one_without_objects(
    tmp_path: Path,
) -> None:
    files = {"one.jpg": [([1, 2, 9, 9], 0)], "two.jpg": [([90, 90, 9, 9], 0)]}
    context = _labelled_run(tmp_path, files | {"empty.jpg": []})
    assert images.run(context)["count"]["test"] == 3
    assert sorted(len(r["boxes"]) for r in _read_rows(context, "annotations")) == [0, 1]
    [rejected] = _read_rows(context, "rejected")
    assert rejected["uri"].endswith("two.jpg")
    assert "none of its 1 boxes lies in the image" in rejected["reason"]


@pytest.mark.parametrize("second_box", [[1, 2, 9, 9], [5, 2, 9, 9]])
def test_copies_of_an_image_need_the_same_labels(
    tmp_path: Path, second_box: list[float]
) -> None:
    files = {"one.jpg": [([1, 2, 9, 9], 0)], "two.jpg": [(second_box, 0)]}
    context = _labelled_run(tmp_path, files)
    folder = tmp_path / "test" / "images"
    (folder / "two.jpg").write_bytes((folder / "one.jpg").read_bytes())
    if second_box == [1, 2, 9, 9]:
        assert images.run(context)["duplicates"] == 1
    else:
        with pytest.raises(
            InputError, match=r"twice with different labels: .*two\.jpg"
        ):
            images.run(context)


def test_the_labels_of_the_second_copy_count_if_the_first_has_none(
    tmp_path: Path,
) -> None:
    context = _labelled_run(tmp_path, {"two.jpg": [([1, 2, 9, 9], 0)]})
    folder = tmp_path / "test" / "images"
    (folder / "one.jpg").write_bytes((folder / "two.jpg").read_bytes())
    images.run(context)
    assert [len(row["boxes"]) for row in _read_rows(context, "annotations")] == [1]


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_too_many_left_out_images_stop_the_run(tmp_path: Path, share: float) -> None:
    files = {name: [([1, 2, 9, 9], 0)] for name in ("one.jpg", "two.jpg", "three.jpg")}
    context = _labelled_run(tmp_path, files, max_left_out_share=share)
    (tmp_path / "test" / "images" / "one.jpg").write_text("no image")
    if share == 0.5:
        assert images.run(context)["rejected"] == 1
    else:
        with pytest.raises(
            InputError,
            match=r"--test .*: 1 of 3 images are left out: .*one\.jpg.*share=0\.25",
        ):
            images.run(context)


def test_files_of_other_kinds_are_told(tmp_path: Path) -> None:
    _write_picture(tmp_path / "in" / "a.jpg")
    (tmp_path / "in" / "b.HEIC").write_bytes(b"heic")
    context = _context(tmp_path, Folder(images=str(tmp_path / "in")))
    assert images.run(context)["rejected"] == 1
    assert _read_rows(context, "rejected")[0]["uri"].endswith("b.HEIC")


def test_labels_of_another_size_are_an_error_before_anything_is_written(
    tmp_path: Path,
) -> None:
    context = _labelled_run(tmp_path, {"one.jpg": [([1, 2, 9, 9], 0)]})
    path = tmp_path / "test" / "annotations.json"
    labels = json.loads(path.read_text())
    labels["images"][0] |= {"width": 64, "height": 64}
    path.write_text(json.dumps(labels))
    with pytest.raises(
        InputError, match="image is 40 x 30, its labels are for 64 x 64"
    ):
        images.run(context)
    assert not Path(context.folder).exists()
