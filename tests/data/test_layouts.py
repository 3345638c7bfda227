"""Layouts that other tools write are read, or are named as not read; no change of names,
order or files turns a labelled image into another truth."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from coin_ray.data.check import check_datasets
from coin_ray.data.formats import (
    Annotation,
    Dataset,
    ImageRecord,
    describe_dataset,
    read_dataset,
    write_dataset,
)
from coin_ray.data.formats.unread import layout_of
from coin_ray.errors import InputError

FORMATS = ("coco", "voc", "yolo", "kitti", "bdd100k")
SIZE = (40, 30)
LINE = "0 0.5 0.5 0.5 0.4"
"""The box of ``EDGES`` in YOLO."""
EDGES = [10, 9, 30, 21]
YAML = "names: [cat]\n"


def _write(folder: Path, files: Mapping[str, Any]) -> str:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            Image.new("RGB", SIZE, (len(files), sum(map(ord, name)) % 256, 9)).save(
                path
            )
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            is_text = isinstance(content, str)
            path.write_text(content if is_text else json.dumps(content))
    return str(folder)


def _coco(*names: str, **changes: Any) -> dict[str, Any]:
    images = [
        {"id": number, "file_name": name, "width": 40, "height": 30}
        for number, name in enumerate(names)
    ]
    annotations = [
        {"id": n, "image_id": n, "category_id": 1, "bbox": [10, 9, 20, 12]}
        for n in range(len(names))
    ]
    categories = [{"id": 1, "name": "cat"}]
    lists = {"images": images, "annotations": annotations, "categories": categories}
    return {**lists, **changes}


def _voc(
    box: Sequence[float] = (11, 10, 30, 21), maker: str = "", difficult: int = 0
) -> str:
    edges = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    corners = "".join(f"<{edge}>{value}</{edge}>" for edge, value in edges)
    return (
        f"<annotation>{maker}<size><width>40</width><height>30</height></size><object>"
        f"<name>cat</name><difficult>{difficult}</difficult><bndbox>{corners}</bndbox>"
        "</object></annotation>"
    )


def _boxes(dataset: Dataset) -> dict[str, list[list[float]]]:
    """The boxes of annotated images, by file name."""
    return {
        record.uri.rpartition("/")[2]: record.boxes.round(6).tolist()
        for record in dataset.records
        if record.annotated
    }


BDD_IMAGE = {
    "name": "a",
    "frames": [
        {
            "objects": [
                {"category": "cat", "box2d": {"x1": 10, "y1": 9, "x2": 30, "y2": 21}}
            ]
        }
    ],
}
KITTI = "cat 0 0 0 10 9 30 21 0 0 0 0 0 0 0"
DARKNET = "classes = 1\ntrain = data/train.txt\nnames = data/obj.names\n"
LAYOUTS: dict[str, tuple[dict[str, Any], str]] = {
    "Roboflow COCO": (
        {"train/_annotations.coco.json": _coco("a.jpg"), "train/a.jpg": None}
        | {"valid/_annotations.coco.json": _coco("a.jpg"), "valid/a.jpg": None},
        "#valid",
    ),
    "Roboflow COCO, val for valid": (
        {"train/_annotations.coco.json": _coco("b.jpg"), "train/b.jpg": None}
        | {"valid/_annotations.coco.json": _coco("a.jpg"), "valid/a.jpg": None},
        "#val",
    ),
    "Roboflow VOC": (
        {"train/b.jpg": None, "train/b.xml": _voc(), "valid/a.jpg": None}
        | {"valid/a.xml": _voc()},
        "#valid",
    ),
    "FiftyOne COCO": ({"labels.json": _coco("a.jpg"), "data/a.jpg": None}, ""),
    "Label Studio COCO": (
        {"result.json": _coco("images\\a.jpg"), "images/a.jpg": None},
        "",
    ),
    "COCO of any name": ({"my.json": _coco("a.jpg"), "photos/a.jpg": None}, ""),
    "COCO of mmdetection": (
        {"annotations/train.json": _coco("a.jpg"), "train/a.jpg": None},
        "#train",
    ),
    "Label Studio YOLO": (
        {"classes.txt": "cat\n", "labels/a.txt": LINE, "images/a.jpg": None}
        | {"notes.json": {"categories": []}},
        "",
    ),
    "darknet": (
        {"obj.data": DARKNET, "obj.names": "cat\n", "obj_train_data/a.txt": LINE}
        | {"obj_train_data/a.jpg": None, "train.txt": "data/obj_train_data/a.jpg\n"},
        "#train",
    ),
    "supervision YOLO": (
        {"data.yaml": f"{YAML}nc: 1\n", "images/a.jpg": None, "labels/a.txt": LINE},
        "",
    ),
    "YOLO of any name": (
        {"cats.yaml": f"{YAML}train: images", "images/a.jpg": None}
        | {"labels/a.txt": LINE},
        "",
    ),
    "YOLO in upper case": (
        {"data.yaml": f"{YAML}train: Images/train", "Images/train/a.jpg": None}
        | {"Labels/train/a.txt": LINE},
        "",
    ),
    "YOLO list of images": (
        {"data.yaml": f"{YAML}train: [images/a.jpg]", "images/a.jpg": None}
        | {"images/b.jpg": None, "labels/a.txt": LINE},
        "#train",
    ),
    "VOC beside images": ({"a.jpg": None, "a.xml": _voc()}, ""),
    "VOC with images/": ({"images/a.jpg": None, "annotations/a.xml": _voc()}, ""),
    "KITTI of Datumaro": (
        {"default/image_2/a.jpg": None, "default/label_2/a.txt": KITTI},
        "",
    ),
    "KITTI of FiftyOne": ({"data/a.jpg": None, "labels/a.txt": KITTI}, ""),
    "KITTI of FiftyOne, by split": (
        {"val/data/a.jpg": None, "val/labels/a.txt": KITTI}
        | {"train/data/b.jpg": None, "train/labels/b.txt": KITTI},
        "#val",
    ),
    "BDD100K, a file for each image": (
        {"images/100k/train/a.jpg": None, "labels/100k/train/a.json": BDD_IMAGE},
        "#train",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_of_another_tool_is_read(tmp_path: Path, layout: str) -> None:
    files, split = LAYOUTS[layout]
    dataset = read_dataset(_write(tmp_path, files) + split)
    assert _boxes(dataset) == {"a.jpg": [EDGES]}
    assert dataset.missing == ()
    assert dataset.unread_files == ()


@pytest.mark.parametrize(
    ("listed", "present"),
    [
        ("a.JPG", "a.jpg"),
        (" a.jpg ", "a.jpg"),
        ("with%20blank.jpg", "with blank.jpg"),
        ("images\\a.jpg", "a.jpg"),
        ("C:\\data\\images\\a.jpg", "a.jpg"),
        ("https://host/x/a.jpg?size=1", "a.jpg"),
        ("/data/local-files/?d=images/a.jpg", "a.jpg"),
        ("file:///abs/a%20b.jpg", "a b.jpg"),
        ("/abs/a.jpg", "a.jpg"),
        ("./images/a.jpg", "a.jpg"),
        ("a", "a.jpg"),
        (unicodedata.normalize("NFD", "ü.jpg"), unicodedata.normalize("NFC", "ü.jpg")),
        ("a%20b.jpg", "a%20b.jpg"),
    ],
)
def test_a_name_written_otherwise_is_the_image(
    tmp_path: Path, listed: str, present: str
) -> None:
    files = {"annotations.json": _coco(listed), f"images/{present}": None}
    dataset = read_dataset(_write(tmp_path, files))
    assert _boxes(dataset) == {present: [EDGES]}
    assert dataset.missing == ()


@pytest.mark.parametrize(
    ("listed", "present", "split"),
    [
        ("b.jpg", "images/a.jpg", ""),
        ("cam1/1.jpg", "cam2/1.jpg", ""),
        ("a.png", "images/a.jpg", ""),
        ("a.jpg", "train/a.jpg", "val"),
        ("a.jpg", "images/val2014/a.jpg", "val2017"),
    ],
)
def test_another_image_is_not_taken(
    tmp_path: Path, listed: str, present: str, split: str
) -> None:
    path = f"annotations/instances_{split}.json" if split else "annotations.json"
    dataset = read_dataset(_write(tmp_path, {path: _coco(listed), present: None}))
    assert _boxes(dataset) == {}
    assert dataset.missing == (listed,)


AB = {"images/a.jpg": None, "images/b.jpg": None}
TWO = {"id": 1, "file_name": "b.jpg"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"annotations.json": _coco(images=[{"id": 1, "file_name": "a.jpg"}, TWO])},
            "images.1: id 1 is in the file twice",
        ),
        (
            {
                "annotations.json": _coco(
                    "a.jpg", categories=[{"id": 1, "name": n} for n in "cd"]
                )
            },
            "categories.1: id 1 is in the file twice",
        ),
        ({"annotations.json": _coco("a.jpg", "A.JPG")}, "the image images/a.jpg twice"),
        (
            {"annotations.json": '{"images": [], "images": []}'},
            "it has 'images' twice",
        ),
        (
            {
                "annotations.json": _coco("c.jpg"),
                "images/C.jpg": None,
                "images/c.JPG": None,
            },
            "may be any of",
        ),
        ({"data.yaml": "names: {0: cat, 0: dog}\ntrain: images"}, "the key 0 twice"),
        ({"data.yaml": "names: [cat]\nnc: 2\ntrain: images"}, "nc is 2"),
        (
            {"data.yaml": f"{YAML}train: images", "labels/a.txt": "0 20 15 20 12"},
            "divide pixels",
        ),
        (
            {"data.yaml": f"{YAML}train: images", "labels/a.txt": "0 1.03 .5 .2 .2"},
            "divide pixels",
        ),
        (
            {
                "data.yaml": f"{YAML}kpt_shape: [3, 2]\ntrain: images",
                "labels/a.txt": f"{LINE} .1 .1",
            },
            "kpt_shape",
        ),
        (
            {
                "data.yaml": f"{YAML}train: images",
                "labels/a.txt": f"{LINE} .1 .1 1 .2 .2 0",
            },
            "kpt_shape",
        ),
        (
            {
                "data.yaml": f"{YAML}train: images",
                "labels/a.txt": LINE,
                "images/a.png": None,
            },
            "is the label file of",
        ),
        (
            {"label_2/a.txt": "cat 2 " + KITTI[4:], "image_2/a.png": None},
            "part of the class name|14 numbers",
        ),
        (
            {"label_2/a.txt": "type 1 " + KITTI[4:], "image_2/a.png": None},
            "may be part of the class name",
        ),
        ({"gtFine/val/a_instanceIds.png": None}, "read from polygons"),
        (
            {
                "JPEGImages/a.jpg": None,
                "JPEGImages/a.png": None,
                "Annotations/a.xml": _voc(),
            },
            "may be of any of",
        ),
    ],
)
def test_labels_with_two_meanings_are_an_error(
    tmp_path: Path, files: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read_dataset(_write(tmp_path, AB | files))


@pytest.mark.parametrize(
    ("shape", "key_points"),
    [
        ("[3, 2]", ".1 .1 .9 .9 .5 .2"),
        ("[4, 3]", ".4 .4 2 .6 .4 2 .5 .5 1 0 0 0"),
        ("[17, 3]", " ".join([".5 .5 2"] * 17)),
        ("[24, 3]", " ".join(["0 0 0"] * 24)),
    ],
)
def test_key_points_follow_the_box(tmp_path: Path, shape: str, key_points: str) -> None:
    yaml = f"{YAML}train: images\nkpt_shape: {shape}\n"
    files = {"data.yaml": yaml, "images/a.jpg": None}
    files |= {"labels/a.txt": f"{LINE} {key_points}\n{LINE}\n"}
    assert _boxes(read_dataset(_write(tmp_path, files))) == {"a.jpg": [EDGES, EDGES]}


def test_class_numbers_may_be_text(tmp_path: Path) -> None:
    yaml = "names: {'1': dog, '0': cat}\ntrain: images"
    files = {"data.yaml": yaml, "images/a.jpg": None, "labels/a.txt": LINE}
    assert read_dataset(_write(tmp_path, files)).names == ("cat", "dog")


def test_kitti_names_may_hold_blanks(tmp_path: Path) -> None:
    line = KITTI.replace("cat", "traffic light")
    files = {"label_2/a.txt": f"{line}\n{line} 0.9", "image_2/a.png": None}
    [record] = read_dataset(_write(tmp_path, files)).records
    assert record.labels == ("traffic light", "traffic light")
    assert record.boxes.tolist() == [EDGES, EDGES]


STUDIO = "<owner><name>Label Studio</name></owner>"


@pytest.mark.parametrize(
    ("boxes", "maker", "expected"),
    [
        ([(11, 10, 30, 21), (1, 1, 40, 30)], "", [EDGES, [0, 0, 40, 30]]),
        ([(10, 9, 30, 21), (0, 5, 40, 30)], "", [EDGES, [0, 5, 40, 30]]),
        ([(10, 9, 30, 21), (5, 0, 40, 30)], "", [EDGES, [5, 0, 40, 30]]),
        ([(10, 9, 30, 21), (1, 1, 40, 30)], STUDIO, [EDGES, [1, 1, 40, 30]]),
    ],
)
def test_voc_files_tell_whether_they_count_from_0(
    tmp_path: Path, boxes: Sequence[Sequence[float]], maker: str, expected: Any
) -> None:
    files: dict[str, Any] = {"ImageSets/Main/val.txt": "0\n"}
    for number, box in enumerate(boxes):
        files[f"JPEGImages/{number}.jpg"] = None
        files[f"Annotations/{number}.xml"] = _voc(box, maker)
    folder = _write(tmp_path, files)
    assert [boxes for [boxes] in _boxes(read_dataset(folder)).values()] == expected
    # the other split's files tell too
    assert _boxes(read_dataset(f"{folder}#val")) == {"0.jpg": [expected[0]]}


def test_the_label_map_of_datumaro_tells_that_voc_counts_from_0(tmp_path: Path) -> None:
    files = {"JPEGImages/a.jpg": None, "Annotations/a.xml": _voc((10, 9, 30, 21))}
    label_map = "# label:color_rgb:parts:actions\ncat:::\n"
    folder = _write(tmp_path, files | {"labelmap.txt": label_map})
    dataset = read_dataset(folder)
    assert _boxes(dataset) == {"a.jpg": [EDGES]}
    assert "labelmap.txt is Datumaro's" in describe_dataset(dataset)
    assert dataset.unread_files == ()


def test_a_voc_file_that_names_another_image_is_told(tmp_path: Path) -> None:
    files: dict[str, Any] = {"JPEGImages/a.jpg": None, "JPEGImages/b.jpg": None}
    files["Annotations/a.xml"] = _voc(maker="<filename>b.jpg</filename>")
    files["Annotations/b.xml"] = _voc(maker="<filename>elsewhere.jpg</filename>")
    [note] = read_dataset(_write(tmp_path, files)).notes
    assert note.startswith("1 label files name another image")
    assert "Annotations/a.xml" in note


def test_bdd100k_classes_that_the_benchmark_ignores(tmp_path: Path) -> None:
    box = BDD_IMAGE["frames"][0]["objects"][0]["box2d"]  # type: ignore[index]
    names = ["other person", "other vehicle", "trailer", "van", "caravan", "person"]
    frames = [
        {"name": "a.jpg", "labels": [{"category": n, "box2d": box} for n in names]}
    ]
    files = {"labels/det_20/det_val.json": frames, "images/100k/val/a.jpg": None}
    [record] = read_dataset(_write(tmp_path, files)).records
    assert record.labels == ("person", "car", "truck", "car", "car", "person")
    assert record.difficult.tolist() == [True, True, True, False, False, False]


@pytest.mark.parametrize(
    ("annotations", "expected"),
    [
        ([{"segmentation": [[10, 9, 30, 9, 30, 21]]}], [EDGES]),
        ([{"segmentation": [], "bbox": []}, {"bbox": [10, 9, 20, 12]}], [EDGES]),
        ([{"segmentation": [], "bbox": []}], None),
        ([{"bbox": None}], None),
        ([{}], None),
    ],
)
def test_a_coco_object_without_a_place_costs_its_image(
    tmp_path: Path, annotations: list[dict[str, Any]], expected: Any
) -> None:
    """The image is not one without that object."""
    rows = [{"image_id": 0, "category_id": 1, **entry} for entry in annotations]
    rows += [{"image_id": 1, "category_id": 1, "bbox": [10, 9, 20, 12]}]
    files = {"annotations.json": _coco("a.jpg", "b.jpg", annotations=rows), **AB}
    dataset = read_dataset(_write(tmp_path, files))
    boxes = {"a.jpg": expected} if expected else {}
    assert _boxes(dataset) == {**boxes, "b.jpg": [EDGES]}
    assert len(dataset.unreadable) == (not expected)


def test_a_bdd100k_label_without_a_place_costs_its_image(tmp_path: Path) -> None:
    box = {"x1": 10, "y1": 9, "x2": 30, "y2": 21}
    lane = {"category": "lane", "poly2d": []}
    frames = [
        {"name": "a.jpg", "labels": [{"category": "car", "box2d": box}, lane]},
        {"name": "b.jpg", "labels": [{"category": "car"}]},
        {"name": "c.jpg"},
        {"name": "d.jpg", "labels": []},
    ]
    files = {"labels/det_20/det_val.json": frames}
    images = {f"images/100k/val/{name}.jpg": None for name in "abcd"}
    dataset = read_dataset(_write(tmp_path, files | images))
    # c has no labels at all, which is not an image without objects
    assert _boxes(dataset) == {"a.jpg": [EDGES], "d.jpg": []}
    assert "got neither" in dataset.unreadable[0].reason


@pytest.mark.parametrize("name", ["instances_test.json", "image_info_test.json"])
def test_a_coco_file_without_annotations_annotates_nothing(
    tmp_path: Path, name: str
) -> None:
    files = {f"annotations/{name}": _coco("a.jpg", annotations=[])}
    dataset = read_dataset(_write(tmp_path, files | {"images/a.jpg": None}))
    assert [record.annotated for record in dataset.records] == [False]
    assert "no annotation" in describe_dataset(dataset)


def _records(folder: Path, *names: str) -> list[ImageRecord]:
    records = []
    for name in names:
        _write(folder, {name: None})
        box = Annotation((10, 9, 30, 21), "cat")
        uri = str(folder / name)
        records.append(ImageRecord.from_annotations(name, uri, SIZE, [box]))
    return records


@pytest.mark.parametrize("format", FORMATS)
def test_a_second_export_adds_or_is_refused(tmp_path: Path, format: str) -> None:
    first = _records(tmp_path / "a", "1.jpg", "2.jpg")
    second = _records(tmp_path / "b", "3.jpg")
    target = str(tmp_path / "to")
    write_dataset(first, target, format, "train")
    before = {path: path.read_bytes() for path in Path(target).rglob("*.*")}
    with pytest.raises(InputError, match="already"):
        write_dataset(second, target, format, "train")
    assert {path: path.read_bytes() for path in Path(target).rglob("*.*")} == before
    write_dataset(second, target, format, "val")
    for split, names in (("train", ["1.jpg", "2.jpg"]), ("val", ["3.jpg"])):
        dataset = read_dataset(f"{target}#{split}")
        assert _boxes(dataset) == {name: [EDGES] for name in names}
        assert dataset.unread_files == ()


UNREAD = {
    "LabelMe": ({"a.json": {"shapes": [], "imagePath": "a.jpg"}}, "a.json"),
    "KITTI": ({"labels/a.txt": KITTI}, "labels/a.txt"),
    "YOLO": ({"labels/a.txt": LINE}, "labels/a.txt"),
    "DOTA": ({"a.txt": "1 2 3 4 5 6 7 8 plane 0"}, "a.txt"),
    "CVAT for images": (
        {"x/annotations.xml": "<annotations></annotations>"},
        "annotations.xml",
    ),
    "a table of boxes": ({"l.csv": "filename,xmin,ymin\n"}, "l.csv"),
    "CreateML": (
        {"c.json": [{"image": "a.jpg", "annotations": [{"coordinates": {}}]}]},
        "c.json",
    ),
    "TFRecord": ({"a.tfrecord": b"\0"}, "a.tfrecord"),
    "an Arrow table": ({"train.parquet": b"PAR1"}, "train.parquet"),
    "arrays": ({"gt.mat": b"MATLAB"}, "gt.mat"),
    "an archive, to be unpacked": ({"annotations.json.gz": b"\x1f"}, "json.gz"),
    "labels": ({"metadata.jsonl": {"file_name": "a", "bbox": []}}, "metadata.jsonl"),
}


@pytest.mark.parametrize("layout", UNREAD)
def test_the_check_names_labels_that_were_not_read(tmp_path: Path, layout: str) -> None:
    files, name = UNREAD[layout]
    harmless = {"README.txt": "3 cats and 4 dogs\n", "package.json": {"name": "x"}}
    folder = _write(tmp_path, {"a.jpg": None, **harmless, **files})
    lines: list[str] = []
    [fault] = check_datasets([folder], describe=lines.append)
    assert fault.kind == "labels not read"
    assert fault.example.endswith(f"{name} looks like {layout}")
    assert "format folder: 1 images, 0 annotated" in lines[0]


@pytest.mark.parametrize("split", ["", "#train"])
def test_labels_of_a_split_that_data_yaml_does_not_name_are_named(
    tmp_path: Path, split: str
) -> None:
    files: dict[str, Any] = {"data.yaml": f"{YAML}train: images/train\nval: images/val"}
    for name in ("train/a", "val/b", "test/c"):
        files |= {f"images/{name}.jpg": None, f"labels/{name}.txt": LINE}
    dataset = read_dataset(_write(tmp_path, files) + split)
    [file] = dataset.unread_files
    assert file.uri.endswith("labels/test/c.txt")


def test_a_second_label_file_of_an_image_is_named(tmp_path: Path) -> None:
    files = {"data.yaml": f"{YAML}train: images", "images/a.jpg": None}
    files |= {"labels/a.txt": LINE, "images/a.txt": "0 .1 .1 .1 .1"}
    dataset = read_dataset(_write(tmp_path, files))
    assert _boxes(dataset) == {"a.jpg": [EDGES]}
    [file] = dataset.unread_files
    assert file.uri.endswith("images/a.txt")


@pytest.mark.parametrize(
    ("boxes", "is_corners"),
    [
        ([[10, 9, 38, 28], [20, 15, 40, 30], [2, 9, 39, 29]], True),
        ([[10, 9, 38, 28], [20, 15, 40, 30], [2, 3, 9, 4]], False),
        ([[10, 9, 38, 28], [20, 15, 40, 30], [2, 9, 39, 29], [9, 3, 2, 8]], False),
        ([[10, 9, 38, 28], [20, 15, 40, 30], [2, 9, 39, 60]], False),
    ],
)
def test_a_coco_file_with_corners_is_refused(
    tmp_path: Path, boxes: Sequence[Sequence[float]], is_corners: bool
) -> None:
    """Some of its boxes reach out of the image as widths and heights."""
    rows = [{"image_id": 0, "category_id": 1, "bbox": box} for box in boxes]
    files = {"annotations.json": _coco("a.jpg", annotations=rows), "images/a.jpg": None}
    folder = _write(tmp_path, files)
    if is_corners:
        with pytest.raises(InputError, match=r"got corners .* 3 of 3 boxes"):
            read_dataset(folder)
    else:
        assert len(read_dataset(folder).records[0].boxes) == len(boxes)


def test_labels_beside_another_format_are_named(tmp_path: Path) -> None:
    files = {"annotations.json": _coco("a.jpg"), "images/a.jpg": None}
    folder = _write(tmp_path, files | {"labels/a.txt": LINE})
    [fault] = check_datasets([folder])
    assert (fault.kind, fault.example.rpartition("/")[2]) == (
        "labels not read",
        "a.txt looks like YOLO",
    )


def test_images_that_can_not_be_decoded_are_named(tmp_path: Path) -> None:
    folder = _write(tmp_path, {"a.jpg": None, "b.HEIC": b"\0", "._c.jpg": b"\0"})
    dataset = read_dataset(folder)
    assert [r.file for r in dataset.records] == ["a.jpg"]
    assert [image.uri.rpartition("/")[2] for image in dataset.left_out] == ["b.HEIC"]
    assert [fault.kind for fault in check_datasets([folder])] == ["image not read"]


def test_a_plain_text_is_no_label_file() -> None:
    for text in (b"", b"cat\ndog\n", b"1\n2\n", b"Version 1.2 of 3 Jan 2020\n"):
        assert layout_of(text, ".txt") == ""
