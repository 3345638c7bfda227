"""Dataset formats: what is written reads back the same, published layouts are
understood, broken files are named."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from coin_ray.data.formats import (
    Annotation,
    Dataset,
    ImageRecord,
    read_dataset,
    write_dataset,
)
from coin_ray.data.formats.voc import EDGES
from coin_ray.errors import InputError

FORMATS = ("coco", "voc", "yolo", "kitti", "bdd100k")
RENAMED = ("bike", "motor", "pedestrian", "van", "caravan", "trailer")


def _write_jpeg(path: Path, size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, 60)).save(path)
    return path


def _write_files(folder: Path, files: Mapping[str, Any]) -> str:
    """Text, JSON, or (None) a JPEG of 40 x 30 at each path."""
    for name, body in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if body is None:
            _write_jpeg(path)
        elif isinstance(body, bytes):
            path.write_bytes(body)
        else:
            path.write_text(body if isinstance(body, str) else json.dumps(body))
    return str(folder)


def _annotation_rows(record: ImageRecord) -> list[tuple[list[float], str, bool]]:
    return list(
        zip(
            record.boxes.tolist(), record.labels, record.difficult.tolist(), strict=True
        )
    )


def _rows_by_file(dataset: Dataset) -> dict[str, list[tuple[list[float], str, bool]]]:
    return {r.file: _annotation_rows(r) for r in dataset.records}


# What is written reads back the same

# at most two pixels outside: labels further out may be in another convention
edges = st.integers(-2 * 16, 50 * 16).map(lambda n: n / 16)
words = st.text(
    st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=8
).filter(str.isprintable)
phrases = st.lists(words, min_size=1, max_size=3).map(" ".join)


@st.composite
def annotated(
    draw: st.DrawFn, format: str
) -> list[tuple[str, tuple[int, int], list[Annotation]]]:
    files = draw(
        st.lists(
            st.sampled_from(
                (
                    "a.jpg",
                    "b c.jpg",
                    "city/a.jpg",
                    "ünï 1.jpg",
                    "in/images/1.jpg",
                    "deep/er/x.y.jpg",
                )
            ),
            unique=True,
            max_size=3,
        )
    )
    names = (words if format == "kitti" else phrases).filter(
        lambda n: n not in (*RENAMED, "DontCare")
    )
    images = []
    for file in files:
        size = draw(st.tuples(st.integers(48, 64), st.integers(48, 64)))
        flags = st.just(False) if format in ("yolo", "kitti") else st.booleans()
        sides = (edges, edges)
        if format == "yolo":  # holds shares of the image only
            sides = st.integers(0, size[0]), st.integers(0, size[1])
        x, y = (st.tuples(side, side).map(sorted) for side in sides)
        corners = st.tuples(x, y).map(
            lambda xy: (xy[0][0], xy[1][0], xy[0][1], xy[1][1])
        )
        box = st.builds(Annotation, corners, names, flags)
        images.append((file, size, draw(st.lists(box, max_size=4))))
    return images


@pytest.mark.parametrize("format", FORMATS)
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(draw_data=st.data())
def test_reading_what_was_written_gives_the_same_records(
    tmp_path: Path, format: str, draw_data: st.DataObject
) -> None:
    folder = tmp_path / uuid.uuid4().hex
    records = [
        ImageRecord.from_annotations(
            file, str(_write_jpeg(folder / "from" / file, size)), size, boxes
        )
        for file, size, boxes in draw_data.draw(annotated(format), "images")
    ]
    if not records:
        return
    write_dataset(records, str(folder / "to"), format, split="val")
    for address in (folder / "to", f"{folder / 'to'}#val"):
        back = read_dataset(str(address))
        assert (back.format, back.missing) == (format, ())
        read_records = {r.file: r for r in back.records}
        assert read_records.keys() == {r.file for r in records}
        for record in records:
            read_record = read_records[record.file]
            assert (read_record.width, read_record.height, read_record.annotated) == (
                record.width,
                record.height,
                True,
            )
            assert read_record.labels == record.labels
            assert read_record.difficult.tolist() == record.difficult.tolist()
            np.testing.assert_allclose(
                read_record.boxes, record.boxes, atol=1e-9, rtol=0
            )
            assert Path(read_record.uri).read_bytes() == Path(record.uri).read_bytes()


@pytest.mark.parametrize("format", FORMATS)
def test_what_was_read_can_be_written_as_every_other_format(
    tmp_path: Path, format: str
) -> None:
    size = (40, 30)
    first = [
        ImageRecord.from_annotations(
            "a.jpg",
            str(_write_jpeg(tmp_path / "a.jpg")),
            size,
            [Annotation((1, 2, 11.5, 7), "cat"), Annotation((0, 0, 40, 30), "dog")],
        )
    ]
    folder = tmp_path / "0"
    write_dataset(first, str(folder), format)
    for step, other in enumerate(FORMATS, start=1):
        dataset = read_dataset(str(folder))
        folder = tmp_path / str(step)
        write_dataset(dataset.records, str(folder), other, names=dataset.names)
    [last] = read_dataset(str(folder)).records
    np.testing.assert_allclose(last.boxes, first[0].boxes, atol=1e-9)
    assert last.labels == ("cat", "dog")


@pytest.mark.parametrize("format", ["voc", "yolo", "kitti"])
def test_images_nobody_annotated_stay_so(tmp_path: Path, format: str) -> None:
    annotated, unannotated = (
        ImageRecord.from_annotations(
            f"{n}.jpg",
            str(_write_jpeg(tmp_path / f"{n}.jpg")),
            (40, 30),
            [],
            annotated=n == "seen",
        )
        for n in ("seen", "unseen")
    )
    write_dataset([annotated, unannotated], str(tmp_path / "to"), format, names=["cat"])
    assert {
        r.file: r.annotated for r in read_dataset(str(tmp_path / "to")).records
    } == {
        "seen.jpg": True,
        "unseen.jpg": False,
    }


def test_two_splits_of_yolo_share_one_data_yaml(tmp_path: Path) -> None:
    for split in ("train", "val"):
        record = ImageRecord.from_annotations(
            f"{split}.jpg",
            str(_write_jpeg(tmp_path / f"{split}.jpg")),
            (40, 30),
            [Annotation((0, 0, 4, 4), "dog")],
        )
        write_dataset(
            [record], str(tmp_path / "to"), "yolo", split, names=["cat", "dog"]
        )
    assert [r.file for r in read_dataset(f"{tmp_path}/to#val").records] == ["val.jpg"]
    assert sorted(r.file for r in read_dataset(f"{tmp_path}/to").records) == [
        "train.jpg",
        "val.jpg",
    ]
    with pytest.raises(InputError, match="other class names"):
        write_dataset([record], str(tmp_path / "to"), "yolo", "test", names=["dog"])


def test_a_folder_may_be_a_uri(tmp_path: Path) -> None:
    root = f"memory://{uuid.uuid4().hex}"
    record = ImageRecord.from_annotations(
        "a.jpg",
        str(_write_jpeg(tmp_path / "a.jpg")),
        (40, 30),
        [Annotation((1, 2, 3, 4), "cat", True)],
    )
    for format in ("coco", "voc", "bdd100k"):
        write_dataset([record], f"{root}/{format}", format)
        [back] = read_dataset(f"{root}/{format}").records
        assert _annotation_rows(back) == [([1, 2, 3, 4], "cat", True)]
        with fsspec.open(back.uri) as stream:
            assert stream.read() == (tmp_path / "a.jpg").read_bytes()


# What can't be written is said before anything is

TWO = Annotation((1, 2, 3, 4), "traffic light", True)


@pytest.mark.parametrize(
    ("format", "files", "boxes", "message"),
    [
        ("tfrecord", ["a.jpg"], [], "can't write 'tfrecord'; known are coco"),
        ("yolo", ["a.jpg"], [TWO], "a.jpg: YOLO can't mark boxes as difficult"),
        (
            "kitti",
            ["a.jpg"],
            [TWO],
            "a.jpg: in KITTI DontCare and only DontCare is difficult",
        ),
        (
            "kitti",
            ["a.jpg"],
            [Annotation((1, 2, 3, 4), "a b"), Annotation((1, 2, 3, 4), "a_b")],
            "two of these are one: a b, a_b",
        ),
        ("voc", ["a.jpg", "a.png"], [], "a.png and a.jpg would share one label file"),
        ("coco", ["../a.jpg"], [], "no path of a file inside a folder"),
        ("coco", ["/a.jpg"], [], "no path of a file inside a folder"),
    ],
)
def test_what_a_format_cannot_hold_is_an_error(
    tmp_path: Path,
    format: str,
    files: list[str],
    boxes: list[Annotation],
    message: str,
) -> None:
    source = str(_write_jpeg(tmp_path / "source.jpg"))
    with pytest.raises(InputError, match=message):
        write_dataset(
            [
                ImageRecord.from_annotations(file, source, (40, 30), boxes)
                for file in files
            ],
            str(tmp_path / "to"),
            format,
        )
    assert not list((tmp_path / "to").rglob("*.xml"))


def test_difficult_boxes_can_be_left_out(tmp_path: Path) -> None:
    record = ImageRecord.from_annotations(
        "a.jpg",
        str(_write_jpeg(tmp_path / "a.jpg")),
        (40, 30),
        [TWO, Annotation((0, 0, 4, 4), "traffic light")],
    )
    for format, label in (
        ("yolo", "traffic light"),
        ("kitti", "traffic_light"),
    ):
        write_dataset([record], str(tmp_path / format), format, drop_difficult=True)
        assert _rows_by_file(read_dataset(str(tmp_path / format))) == {
            "a.jpg": [([0, 0, 4, 4], label, False)]
        }


@pytest.mark.parametrize("label", ["", " cat", "cat ", "two\nlines", "\x00"])
def test_an_invalid_class_name_is_an_error(label: str) -> None:
    with pytest.raises(InputError, match="one line of printable characters"):
        ImageRecord.from_annotations(
            "a.jpg", "a.jpg", (40, 30), [Annotation((0, 0, 4, 4), label)]
        )


# Published layouts


def _voc_object(
    name: str, box: tuple[Any, ...] = (1, 1, 40, 30), extra: str = ""
) -> str:
    sides = "".join(
        f"<{k}>{v}</{k}>"
        for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return f"<object><name>{name}</name>{extra}\n<bndbox>{sides}</bndbox></object>\n"


def _voc_xml(
    *objects: str,
    size: str = "<size><width>40</width><height>30</height><depth>3</depth></size>",
) -> str:
    return f"<annotation>\n{size}\n{''.join(objects)}</annotation>"


KITTI_LINE = "Car 0.00 0 -1.57 1 2.5 11 7 1.5 1.6 3.7 1 1 10 -1.5"
BOX2D = {"x1": 1.5, "y1": 2, "x2": 11, "y2": 7}


def test_voc_corners_name_the_first_and_the_last_pixel_from_1(tmp_path: Path) -> None:
    whole = _voc_object("dog", extra="<difficult>1</difficult>")
    person = _voc_object(
        "person",
        (5, 6, 5, 6),
        "<part><name>head</name><bndbox><xmin>9</xmin></bndbox></part>",
    )
    dataset = read_dataset(
        _write_files(
            tmp_path,
            {"JPEGImages/1.jpg": None, "Annotations/1.xml": _voc_xml(whole, person)},
        )
    )
    assert _rows_by_file(dataset) == {
        "1.jpg": [([0, 0, 40, 30], "dog", True), ([4, 5, 5, 6], "person", False)]
    }
    assert dataset.names == ("dog", "person")


def test_voc_splits_are_image_lists(tmp_path: Path) -> None:
    files: dict[str, Any] = {f"JPEGImages/{n}.jpg": None for n in "123"}
    files |= {f"Annotations/{n}.xml": _voc_xml(_voc_object("dog")) for n in "124"}
    files |= {
        "ImageSets/Main/val.txt": "2\n4\n\n",
        "ImageSets/Main/dog_val.txt": "1 -1\n2  1\n3  0\n",
    }
    folder = _write_files(tmp_path, files)
    assert [r.file for r in read_dataset(f"{folder}#val").records] == ["2.jpg"]
    assert read_dataset(f"{folder}#val").missing == ("JPEGImages/4",)
    assert [r.file for r in read_dataset(f"{folder}#dog_val").records] == [
        "2.jpg",
        "3.jpg",
    ]
    assert {r.file: r.annotated for r in read_dataset(folder).records} == {
        "1.jpg": True,
        "2.jpg": True,
        "3.jpg": False,
    }
    with pytest.raises(InputError, match="for 'test'; it has dog_val, val"):
        read_dataset(f"{folder}#test")


def _coco_json(**changes: Any) -> dict[str, Any]:
    labels: dict[str, Any] = {
        "images": [{"id": 7, "file_name": "1.jpg", "width": 40, "height": 30}],
        "annotations": [
            {
                "id": 1,
                "image_id": 7,
                "category_id": 18,
                "bbox": [1, 2, 10, 5],
                "iscrowd": 1,
            }
        ],
        "categories": [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}],
    }
    return labels | changes


@pytest.mark.parametrize(
    ("files", "split"),
    [
        ({"annotations.json": _coco_json(), "images/1.jpg": None}, ""),
        ({"_annotations.coco.json": _coco_json(), "1.jpg": None}, ""),
        (
            {
                "annotations.json": b"\xef\xbb\xbf" + json.dumps(_coco_json()).encode(),
                "images/1.jpg": None,
            },
            "",
        ),
        (
            {
                "annotations/instances_val2017.json": _coco_json(),
                "val2017/1.jpg": None,
                "train2017/1.jpg": None,
            },
            "#val2017",
        ),
        (
            {
                "annotations/instances_val2017.json": _coco_json(),
                "annotations/captions_val2017.json": "[]",
                "images/val2017/1.jpg": None,
            },
            "",
        ),
    ],
)
def test_coco_in_its_usual_places(
    tmp_path: Path, files: dict[str, Any], split: str
) -> None:
    dataset = read_dataset(_write_files(tmp_path, files) + split)
    assert _rows_by_file(dataset) == {"1.jpg": [([1, 2, 11, 7], "dog", True)]}
    assert dataset.names == ("dog", "person")


def test_several_coco_files_need_a_choice(tmp_path: Path) -> None:
    folder = _write_files(
        tmp_path,
        {f"annotations/instances_{s}.json": _coco_json() for s in ("train", "val")},
    )
    with pytest.raises(InputError, match=r"say which: .*#train or .*#val"):
        read_dataset(folder)


def test_images_a_coco_file_does_not_list_are_not_annotated(tmp_path: Path) -> None:
    dataset = read_dataset(
        _write_files(tmp_path, {"annotations.json": _coco_json(), "images/2.jpg": None})
    )
    assert [(r.file, r.annotated) for r in dataset.records] == [("2.jpg", False)]
    assert dataset.missing == ("1.jpg",)


@pytest.mark.parametrize(
    ("yaml", "image", "label"),
    [
        (
            "names: [cat, dog]\ntrain: images/train",
            "images/train/1.jpg",
            "labels/train/1.txt",
        ),
        (
            (
                "names: {0: cat, 1: dog}\npath: ../datasets/pets\ntrain:"
                " images/train\nval:"
            ),
            "images/train/1.jpg",
            "labels/train/1.txt",
        ),
        (
            "names: [cat, dog]\nnc: 2\ntrain: ../train/images",
            "train/images/1.jpg",
            "train/labels/1.txt",
        ),
        (
            "names: [cat, dog]\ntrain: [images/a, images/b]",
            "images/b/1.jpg",
            "labels/b/1.txt",
        ),
        ("names: [cat, dog]\ntrain: train.txt", "images/1.jpg", "labels/1.txt"),
    ],
)
def test_yolo_in_its_usual_places(
    tmp_path: Path, yaml: str, image: str, label: str
) -> None:
    files = {
        "data.yaml": yaml,
        image: None,
        label: "1 0.5 0.5 1 1\n0 0.25 0.5 .1 .2 0.9\n1 0 0 .5 0 .5 .5\n",
        "train.txt": "./images/1.jpg\n",
    }
    if "images/a" in yaml:
        files["images/a/2.jpg"] = None
    records = read_dataset(f"{_write_files(tmp_path, files)}#train").records
    boxes = next(r for r in records if r.uri.endswith("1.jpg"))
    np.testing.assert_allclose(
        boxes.boxes, [[0, 0, 40, 30], [8, 12, 12, 18], [0, 0, 20, 15]]
    )
    assert boxes.labels == ("dog", "cat", "dog")


@pytest.mark.parametrize("base", ["", "training/"])
def test_kitti_with_regions_to_ignore_and_a_list(tmp_path: Path, base: str) -> None:
    ignored = (
        "DontCare -1 -1 -10 503.89 169.71 590.61 190.13 -1 -1 -1 -1000 -1000 -1000 -10"
    )
    files = {
        f"{base}image_2/000001.png": None,
        f"{base}label_2/000001.txt": f"{KITTI_LINE}\n{ignored}\n",
        "ImageSets/train_car.txt": "000001\n",
    }
    for folder in (_write_files(tmp_path, files), f"{tmp_path}#train_car"):
        [record] = read_dataset(folder).records
        assert _annotation_rows(record) == [
            ([1, 2.5, 11, 7], "Car", False),
            ([503.89, 169.71, 590.61, 190.13], "DontCare", True),
        ]
        assert (record.width, record.height) == (40, 30)


@pytest.mark.parametrize(
    "layout",
    ["labels/det_20/det_val.json", "labels/bdd100k_labels_images_val.json", "frames"],
)
def test_bdd100k_of_both_releases(tmp_path: Path, layout: str) -> None:
    lane = {"category": "lane", "poly2d": [], "id": 3}
    day = {
        "name": "d.jpg",
        "attributes": {"timeofday": "daytime"},
        "labels": [{"category": "bike", "box2d": BOX2D}, lane],
    }
    crowd = {
        "category": "pedestrian",
        "attributes": {"crowd": True, "occluded": False},
        "box2d": BOX2D,
    }
    frames = [
        day,
        {"name": "n.jpg", "attributes": {"timeofday": "night"}, "labels": [crowd]},
        {"name": "gone.jpg"},
    ]
    labels = {"frames": frames, "config": {}} if layout == "frames" else frames
    path = "labels/det_20/det_val.json" if layout == "frames" else layout
    images = {
        "images/100k/val/d.jpg": None,
        "images/100k/val/n.jpg": None,
        "images/100k/train/d.jpg": None,
    }
    folder = _write_files(tmp_path, {path: labels} | images)
    dataset = read_dataset(f"{folder}#val")
    box = [1.5, 2, 11, 7]
    assert _rows_by_file(dataset) == {
        "d.jpg": [(box, "bicycle", False)],
        "n.jpg": [(box, "person", True)],
    }
    assert dataset.missing == ("gone.jpg",)
    assert [r.file for r in read_dataset(f"{folder}#val_daytime").records] == ["d.jpg"]


def _polygon_square(
    label: str, x1: int, y1: int, x2: int, y2: int, **extra: Any
) -> dict[str, Any]:
    """Filled with its border, as polygons are drawn: the last column is ``x2``."""
    return {
        "label": label,
        "polygon": [[x1, y1], [x2, y1], [x2, y2], [x1, y2]],
        **extra,
    }


def _cityscapes_json(*objects: dict[str, Any]) -> dict[str, Any]:
    return {"imgWidth": 40, "imgHeight": 30, "objects": list(objects)}


@pytest.mark.parametrize(
    ("objects", "expected"),
    [
        ([_polygon_square("car", 2, 3, 9, 9)], [([2, 3, 10, 10], "car", False)]),
        (
            [_polygon_square("car", 2, 3, 9, 9), _polygon_square("pole", 6, 0, 12, 29)],
            [([2, 3, 6, 10], "car", False)],
        ),
        (
            [_polygon_square("pole", 6, 0, 12, 29), _polygon_square("car", 2, 3, 9, 9)],
            [([2, 3, 10, 10], "car", False)],
        ),
        (
            [_polygon_square("car", 2, 3, 9, 9), _polygon_square("bus", 0, 0, 20, 20)],
            [([0, 0, 21, 21], "bus", False)],
        ),
        (
            [
                _polygon_square("car", 2, 3, 9, 9),
                _polygon_square("pole", 6, 0, 12, 29, deleted=1),
            ],
            [([2, 3, 10, 10], "car", False)],
        ),
        (
            [
                _polygon_square("car", 2, 3, 9, 9),
                _polygon_square("license plate", 2, 3, 9, 9),
            ],
            [([2, 3, 10, 10], "car", False)],
        ),
        (
            [_polygon_square("persongroup", -5, 3, 60, 9)],
            [([0, 3, 40, 10], "person", True)],
        ),
        (
            [
                _polygon_square("road", 0, 0, 39, 29),
                _polygon_square("polegroup", 0, 0, 5, 5),
            ],
            [],
        ),
        ([_polygon_square("car", 50, 3, 60, 9)], []),
        ([_polygon_square("car", -9, -9, -2, -2)], []),
    ],
)
def test_cityscapes_boxes_hold_the_visible_pixels(
    tmp_path: Path, objects: list[dict[str, Any]], expected: list[Any]
) -> None:
    name = "aachen/aachen_000000_000019"
    files = {
        f"gtFine/val/{name}_gtFine_polygons.json": _cityscapes_json(*objects),
        f"leftImg8bit/val/{name}_leftImg8bit.png": None,
    }
    files |= {f"gtFine/val/{name}_gtFine_instanceIds.png": None}
    assert _rows_by_file(read_dataset(_write_files(tmp_path, files))) == {
        f"val/{name}_leftImg8bit.png": expected
    }


def test_foggy_cityscapes_is_a_split(tmp_path: Path) -> None:
    names = {split: f"{split}/aachen/aachen_{split}" for split in ("train", "val")}
    files: dict[str, Any] = {
        f"gtFine/{name}_gtFine_polygons.json": _cityscapes_json(
            _polygon_square("car", 2, 3, 9, 9)
        )
        for name in names.values()
    }
    files |= {
        f"leftImg8bit_foggy/{n}_leftImg8bit_foggy_beta_{beta}.png": None
        for n in names.values()
        for beta in ("0.005", "0.02")
    }
    folder = _write_files(tmp_path, files)
    assert [r.file for r in read_dataset(f"{folder}#val_foggy_0.02").records] == [
        "val/aachen/aachen_val_leftImg8bit_foggy_beta_0.02.png"
    ]
    with pytest.raises(
        InputError, match="no leftImg8bit images for the 1 label files of val"
    ):
        read_dataset(f"{folder}#val")


def test_a_plain_folder_has_images_nobody_annotated(tmp_path: Path) -> None:
    dataset = read_dataset(
        _write_files(
            tmp_path / "a#b",
            {
                "x/1.JPG": None,
                "2.png": None,
                "notes.txt": "text",
                "runs/det_1.json": "x",
            },
        )
    )
    assert (dataset.format, [(r.file, r.annotated) for r in dataset.records]) == (
        "folder",
        [("2.png", False), ("x/1.JPG", False)],
    )


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nowhere", "no such folder"),
        ("nowhere#val", "no such folder"),
        ("#val", "no split 'val'"),
    ],
)
def test_a_missing_folder_or_split_is_an_error(
    tmp_path: Path, address: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read_dataset(
            f"{tmp_path}/{address}" if address != "#val" else f"{tmp_path}#val"
        )


def test_a_turned_photo_is_measured_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    _write_files(
        tmp_path,
        {
            "data.yaml": "names: [cat]\ntrain: images",
            "labels/1.txt": "0 .5 .5 1 1",
            "images/2.jpg": None,
        },
    )
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "1.jpg", exif=exif)
    record = read_dataset(str(tmp_path)).records[0]
    assert (record.width, record.height, record.boxes.tolist()) == (
        30,
        40,
        [[0, 0, 30, 40]],
    )


# Broken files are named, with the line or the entry

BOMB = (
    '<?xml version="1.0"?>\n<!DOCTYPE a [\n<!ENTITY x'
    ' "y">]>\n<annotation>&x;</annotation>'
)
VOC = {"JPEGImages/1.jpg": None}
YOLO = {"data.yaml": "names: [cat]\ntrain: images", "images/1.jpg": None}
KITTI = {"label_2/2.txt": "", "image_2/1.png": None}
CITY = {"leftImg8bit/val/a_leftImg8bit.png": None}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            VOC | {"Annotations/1.xml": "<annotation>\n<object>\n</annotation>"},
            r"1\.xml:3: not XML: mismatched tag",
        ),
        (VOC | {"Annotations/1.xml": ""}, r"1\.xml:1: not XML: no element found"),
        (
            VOC | {"Annotations/1.xml": "<html/>"},
            r"1\.xml:1: expected <annotation>, got <html>",
        ),
        (VOC | {"Annotations/1.xml": BOMB}, r"1\.xml:3: entity declarations"),
        (
            VOC | {"Annotations/1.xml": _voc_xml(_voc_object("dog"), _voc_object(" "))},
            r"1\.xml:5: an object without <name>",
        ),
        (
            VOC | {"Annotations/1.xml": _voc_xml(_voc_object("dog", (1, "x", 3, 4)))},
            r"1\.xml:3: <ymin>: expected a number, got 'x'",
        ),
        (
            VOC | {"Annotations/1.xml": _voc_xml(_voc_object("dog", (1, 2, 3, "inf")))},
            r"1\.xml:3: <ymax>: expected a number, got 'inf'",
        ),
        (
            VOC | {"Annotations/1.xml": _voc_xml("<object><name>a</name></object>")},
            r"1\.xml:3: <xmin>: expected a number, got None",
        ),
        (
            VOC
            | {
                "Annotations/1.xml": _voc_xml(
                    _voc_object("dog", extra="<difficult>2</difficult>")
                )
            },
            r"1\.xml:3: <difficult> must be 0 or 1",
        ),
        (
            VOC | {"Annotations/1.xml": _voc_xml(size="<size><width>w</width></size>")},
            r"1\.xml: size: expected a number, got 'w'",
        ),
        (
            {"annotations.json": '{"images": [],\n"annotations": ['},
            r"annotations\.json is not COCO json: .*line 2",
        ),
        ({"annotations.json": "[]"}, r"annotations\.json is not COCO json"),
        (
            {"annotations.json": {"images": []}},
            r"not COCO json: annotations: Field required; categories: Field required",
        ),
        (
            {
                "annotations.json": _coco_json(
                    annotations=[{"image_id": 7, "category_id": 18, "bbox": [1, 2, 3]}]
                )
            },
            r"annotations\.0: bbox: expected four numbers or a polygon, got \[1, 2, 3\]",
        ),
        (
            {"annotations.json": _coco_json(categories=[])},
            r"annotations\.0\.category_id 18 is not in the file",
        ),
        (
            {"annotations.json": _coco_json(images=[])},
            r"annotations\.0\.image_id 7 is not in the file",
        ),
        (
            YOLO | {"labels/1.txt": "0 .5 .5 1 1\n\n1 .5 .5 1 1"},
            r"labels/1\.txt:3: class 1 is not in data\.yaml, which names 1 classes",
        ),
        (
            YOLO | {"labels/1.txt": "0 .5 .5 1"},
            (
                r"labels/1\.txt:1: expected 'class x y width height', or a polygon; got"
                r" 4 words"
            ),
        ),
        (
            YOLO | {"labels/1.txt": "0 .5 .5 1 1 1 1 1"},
            r"labels/1\.txt:1: .* got 8 words",
        ),
        (
            YOLO | {"labels/1.txt": "cat .5 .5 1 1"},
            r"labels/1\.txt:1: expected a number, got 'cat'",
        ),
        (YOLO | {"labels/1.txt": "-1 .5 .5 1 1"}, r"labels/1\.txt:1: class -1"),
        (
            YOLO | {"labels/1.txt": "0 nan .5 1 1"},
            r"labels/1\.txt:1: expected a number, got 'nan'",
        ),
        (YOLO | {"labels/1.txt": b"\xff\xfe0"}, r"labels/1\.txt is not text in UTF-8"),
        (
            YOLO | {"data.yaml": "names: [cat\ntrain: images"},
            r"data\.yaml is not YAML: .*line 2",
        ),
        (YOLO | {"data.yaml": "- cat"}, r"data\.yaml: expected a mapping"),
        (YOLO | {"data.yaml": "train: images"}, r"data\.yaml: names must be a list"),
        (
            YOLO | {"data.yaml": "names: {1: cat}\ntrain: images"},
            r"data\.yaml: names must be a list, or a mapping from 0",
        ),
        (
            YOLO | {"data.yaml": "names: [cat]\ntrain: pictures"},
            r"names pictures, but there is no image below pictures",
        ),
        (
            KITTI | {"label_2/1.txt": f"{KITTI_LINE}\nCar 1 2"},
            (
                r"label_2/1\.txt:2: expected a class name and the 14 numbers of KITTI,"
                r" or 15 with a score; got 2 after 'Car'"
            ),
        ),
        (
            KITTI | {"label_2/1.txt": KITTI_LINE.replace("2.5", "x")},
            r"label_2/1\.txt:1: expected a number, got 'x'",
        ),
        (
            {"labels/det_train.json": "[{"},
            r"det_train\.json is not BDD100K json: .*line 1",
        ),
        (
            {"labels/det_train.json": [{"labels": []}]},
            r"det_train\.json is not BDD100K json: 0\.name: Field required",
        ),
        (
            {
                "labels/det_train.json": [
                    {"name": "a", "labels": [{"category": "car", "box2d": {}}]}
                ]
            },
            r"0\.labels\.0\.box2d\.x1: Field required",
        ),
        (
            CITY | {"gtFine/val/a_gtFine_polygons.json": "{}"},
            (
                r"a_gtFine_polygons\.json is not Cityscapes polygon json: imgWidth:"
                r" Field required"
            ),
        ),
        (
            CITY
            | {
                "gtFine/val/a_gtFine_polygons.json": _cityscapes_json(
                    {"label": "car", "polygon": [[1, 2]]}
                )
            },
            r"can't be drawn: an object 'car' has 1 corners",
        ),
    ],
)
def test_a_broken_file_is_named(
    tmp_path: Path, files: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=f"(?s){message}"):
        read_dataset(_write_files(tmp_path, files))


# Flags, names and boxes as other tools write them


def _coco_truth(folder: Path, **fields: Any) -> tuple[list[Any], bool, Dataset]:
    """Return the box and the flag of an annotation with these further fields."""
    folder.mkdir(parents=True)
    Image.new("RGB", (100, 80)).save(folder / "a.png")
    annotation = {"image_id": 1, "category_id": 1, "bbox": [10, 20, 30, 40]} | fields
    labels = {
        "images": [{"id": 1, "file_name": "a.png", "width": 100, "height": 80}],
        "annotations": [annotation],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (folder / "annotations.json").write_text(json.dumps(labels))
    dataset = read_dataset(str(folder))
    [record] = dataset.records
    return record.boxes[0].tolist(), bool(record.difficult[0]), dataset


@pytest.mark.parametrize(
    ("fields", "difficult"),
    [
        ({"iscrowd": "0"}, False),
        ({"iscrowd": "false"}, False),
        ({"iscrowd": "1"}, True),
        ({"iscrowd": "0", "ignore": 1}, True),
        ({"iscrowd": True}, True),
        ({"iscrowd": None}, False),
    ],
)
def test_flags_of_coco_may_be_texts(
    tmp_path: Path, fields: dict[str, Any], difficult: bool
) -> None:
    assert _coco_truth(tmp_path / "set", **fields)[1] is difficult
    with pytest.raises(InputError, match="expected true or false, got 'perhaps'"):
        _coco_truth(tmp_path / "other", iscrowd="perhaps")


POLYGON = [[10, 20, 40, 20, 40, 60, 10, 60]]


def test_an_empty_box_beside_a_polygon_is_that_of_the_polygon(tmp_path: Path) -> None:
    box, _, _ = _coco_truth(tmp_path / "set", bbox=[0, 0, 0, 0], segmentation=POLYGON)
    assert box == [10, 20, 40, 60]


def test_a_box_that_fits_its_polygon_as_corners_only_is_an_error(
    tmp_path: Path,
) -> None:
    box, _, _ = _coco_truth(tmp_path / "set", segmentation=POLYGON)
    assert box == [10, 20, 40, 60]
    with pytest.raises(InputError, match=r"got corners .* so 1 of 1 are the boxes"):
        _coco_truth(tmp_path / "other", bbox=[10, 20, 40, 60], segmentation=POLYGON)
    # a hand-drawn box may differ from the polygon
    box, _, _ = _coco_truth(
        tmp_path / "loose", bbox=[9, 9, 60, 60], segmentation=POLYGON
    )
    assert box == [9, 9, 69, 69]


def test_a_turned_box_of_cvat_in_coco_becomes_upright_and_that_is_told(
    tmp_path: Path,
) -> None:
    box, _, dataset = _coco_truth(tmp_path / "set", attributes={"rotation": 90.0})
    assert box == pytest.approx([5, 25, 45, 55])
    assert "1 boxes that are turned by their attribute rotation" in dataset.notes[0]
    box, _, dataset = _coco_truth(tmp_path / "none", attributes={"rotation": 0.0})
    assert (box, dataset.notes) == ([10, 20, 40, 60], ())


@pytest.mark.parametrize("names", ["[yes, no]", "[~, dog]", "{0: 2020-01-01, 1: dog}"])
def test_names_that_yaml_reads_as_something_else_are_an_error(
    tmp_path: Path, names: str
) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (100, 80)).save(tmp_path / "images" / "a.png")
    (tmp_path / "data.yaml").write_text(f"names: {names}\ntrain: images\n")
    with pytest.raises(InputError, match="put the name in quotes"):
        read_dataset(str(tmp_path))


BNDBOX = "".join(
    f"<{edge}>{n}</{edge}>" for edge, n in zip(EDGES, (1, 1, 9, 9), strict=True)
)
OBJECT = f"<name>cat</name><bndbox>{BNDBOX}</bndbox>"


@pytest.mark.parametrize(
    "content",
    [
        f"<objects><object>{OBJECT}</object></objects>",
        f"<Object>{OBJECT}</Object>",
        f"<object>{OBJECT}<bndbox>{BNDBOX}</bndbox></object>",
        f"<object>{OBJECT}</object><bndbox>{BNDBOX}</bndbox>",
        "<object><name>cat</name><robndbox><cx>9</cx></robndbox></object>",
    ],
)
def test_boxes_in_other_places_of_a_voc_file_are_no_image_without_objects(
    tmp_path: Path, content: str
) -> None:
    for folder in ("Annotations", "JPEGImages"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (100, 80)).save(tmp_path / "JPEGImages" / "a.png")
    text = f"<annotation>{content}</annotation>"
    (tmp_path / "Annotations" / "a.xml").write_text(text)
    with pytest.raises(InputError, match="expected one <bndbox> in each <object>"):
        read_dataset(str(tmp_path))


def test_ignored_classes_may_be_written_in_another_case(tmp_path: Path) -> None:
    for folder in ("label_2", "image_2"):
        (tmp_path / "kitti" / folder).mkdir(parents=True)
    Image.new("RGB", (100, 80)).save(tmp_path / "kitti" / "image_2" / "a.png")
    line = "dontcare 0 0 0 10 20 40 60 0 0 0 0 0 0 0\n"
    (tmp_path / "kitti" / "label_2" / "a.txt").write_text(line)
    [record] = read_dataset(str(tmp_path / "kitti")).records
    assert record.difficult.tolist() == [True]
    box = {"x1": 10, "y1": 20, "x2": 40, "y2": 60}
    crowd = {"category": "car", "box2d": box, "attributes": {"crowd": "false"}}
    frames = [
        {"name": "a.png", "labels": [crowd, {"category": "Trailer", "box2d": box}]}
    ]
    (tmp_path / "bdd" / "images" / "100k" / "train").mkdir(parents=True)
    Image.new("RGB", (100, 80)).save(tmp_path / "bdd/images/100k/train/a.png")
    (tmp_path / "bdd" / "labels").mkdir()
    (tmp_path / "bdd" / "labels" / "det_train.json").write_text(json.dumps(frames))
    [record] = read_dataset(str(tmp_path / "bdd")).records
    assert record.labels == ("car", "truck")
    assert record.difficult.tolist() == [False, True]
