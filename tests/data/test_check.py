"""``coin-ray check``: each kind of fault planted alone is found, and
nothing else is."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coin_ray.class_names import is_same_class_name
from coin_ray.commands.check import check
from coin_ray.data.check import check_datasets
from coin_ray.data.formats import Annotation, ImageRecord, write_dataset

GOOD = (Annotation((0, 0, 40, 30), "traffic light"), Annotation((2, 3, 12.5, 9), "bus"))


def _write_photo(path: Path, seed: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(
        np.random.default_rng(seed).integers(0, 255, (30, 40, 3), np.uint8)
    ).save(path)
    return str(path)


def _write_split(
    folder: Path, name: str, *extra_boxes: Annotation, seed: int = 0
) -> Path:
    """Two good images in VOC format; ``extra_boxes`` in the second."""
    boxes: tuple[Sequence[Annotation], ...] = (GOOD, (*GOOD, *extra_boxes))
    uris = [
        _write_photo(folder / "source" / f"{name}{n}.png", seed + n) for n in range(2)
    ]
    records = [
        ImageRecord.from_annotations(f"{name}{n}.png", uri, (40, 30), boxes[n])
        for n, uri in enumerate(uris)
    ]
    write_dataset(records, str(folder / name), "voc", split=name)
    return folder / name


def _truncate_image(train: Path) -> None:
    file = train / "JPEGImages" / "train0.png"
    file.write_bytes(file.read_bytes()[:900])


def _replace_image_by_text(train: Path) -> None:
    (train / "JPEGImages" / "train0.png").write_text("text")


def _delete_image(train: Path) -> None:
    (train / "JPEGImages" / "train0.png").unlink()


def _copy_image(train: Path) -> None:
    (train / "JPEGImages" / "again.png").write_bytes(
        (train / "JPEGImages" / "train0.png").read_bytes()
    )


def _copy_image_from_val(train: Path) -> None:
    (train / "JPEGImages" / "train0.png").write_bytes(
        (train.parent / "val" / "JPEGImages" / "val1.png").read_bytes()
    )


def _resize_image(train: Path) -> None:
    path = train / "JPEGImages" / "train0.png"
    with Image.open(path) as image:
        bigger = image.resize((80, 60))
    bigger.save(path)


def _truncate_label(train: Path) -> None:
    (train / "Annotations" / "train0.xml").write_text("<annotation>\n<object>")


def _fault_kinds(*folders: Path, classes: Sequence[str] = ()) -> Counter[str]:
    return Counter(
        fault.kind for fault in check_datasets([str(p) for p in folders], classes)
    )


def test_good_folders_have_no_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [_write_split(tmp_path, "train"), _write_split(tmp_path, "val", seed=10)]
    assert _fault_kinds(*folders, classes=("bus", "traffic light")) == {}
    assert check([*map(str, folders), "--classes", "bus, traffic light"]) == 0
    assert "nothing wrong found in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "kind", "example"),
    [
        (_truncate_image, "broken image", "train0.png: the image file is damaged"),
        (
            _replace_image_by_text,
            "broken image",
            "train0.png: the file is not an image",
        ),
        (
            _delete_image,
            "image missing",
            "JPEGImages/train0 is labelled or listed, but not there",
        ),
        (_copy_image, "same image twice", "train0.png is "),
        (_copy_image_from_val, "same image in two splits", "val1.png is "),
        (
            _resize_image,
            "size differs",
            "train0.png is 80 x 60, its labels say 40 x 30",
        ),
        (_truncate_label, "labels with errors", "train0.xml:2: not XML"),
    ],
)
def test_a_damaged_file_is_found(
    tmp_path: Path, damage: Callable[[Path], None], kind: str, example: str
) -> None:
    train, val = _write_split(tmp_path, "train"), _write_split(tmp_path, "val", seed=10)
    damage(train)
    [fault] = check_datasets([str(train), str(val)])
    assert fault.kind == kind
    assert example in fault.example


@pytest.mark.parametrize(
    ("box", "kind"),
    [
        ((12, 3, 2, 9), "reversed box"),
        ((2, 9, 12, 3), "reversed box"),
        ((2, 3, 2, 9), "empty box"),
        ((2, 3, 12, 3), "empty box"),
        ((-2, 3, 12, 9), "box outside its image"),
        ((2, 3, 41.5, 9), "box outside its image"),
        ((2, -8, 12, 9), "box outside its image"),
        ((50, 40, 60, 50), "box outside its image"),
        ((2, 3, 12.5, 9), "same box twice"),
        ((-1, 0, 41, 31), None),
    ],
)
def test_a_bad_box_is_found(
    tmp_path: Path, box: Sequence[float], kind: str | None
) -> None:
    assert _fault_kinds(_write_split(tmp_path, "train", Annotation(box, "bus"))) == (
        {kind: 1} if kind else {}
    )


@pytest.mark.parametrize(
    "other",
    ["Bus", "buses", "BUSES", "Traffic Lights", "traffic_light", "traffic-lights"],
)
def test_names_that_differ_only_in_case_or_plural_are_found(
    tmp_path: Path, other: str
) -> None:
    assert _fault_kinds(
        _write_split(tmp_path, "train", Annotation((5, 5, 9, 9), other))
    ) == {"names differ only in case or plural": 1}


def test_asked_names_are_compared_with_those_of_the_labels(tmp_path: Path) -> None:
    [variant, absent] = check_datasets(
        [str(_write_split(tmp_path, "train"))], ["Bus", "traffic light", "dog"]
    )
    assert (variant.kind, variant.example) == (
        "names differ only in case or plural",
        "'Bus' (0 boxes, asked for), 'bus' (2 boxes)",
    )
    assert (absent.kind, absent.example) == (
        "class without a box",
        "'dog'; there are bus, traffic light",
    )


@pytest.mark.parametrize(
    ("name", "other", "same"),
    [
        ("bus", "Buses", True),
        ("house", "houses", True),
        ("horse", "horses", True),
        ("berry", "berries", True),
        ("box", "boxes", True),
        ("person", "Person", True),
        ("car", "care", False),
        ("glass", "glas", False),
        ("bus", "bu", False),
        ("traffic light", "traffic sign", False),
    ],
)
def test_plurals(name: str, other: str, same: bool) -> None:
    assert is_same_class_name(name, other) is is_same_class_name(other, name) is same


def test_one_image_in_two_lists_of_a_folder_is_found(tmp_path: Path) -> None:
    train = _write_split(tmp_path, "train")
    (train / "ImageSets" / "Main" / "val.txt").write_text("train1\n")
    faults = check_datasets([f"{train}#train", f"{train}#val"])
    assert [f.kind for f in faults] == ["same image in two splits"]


def test_images_without_labels_are_checked_too(tmp_path: Path) -> None:
    _write_photo(tmp_path / "plain" / "[b]1.png", 1)
    _write_photo(tmp_path / "plain" / "2.png", 1)
    assert _fault_kinds(tmp_path / "plain", classes=("dog",)) == {"same image twice": 1}
    (tmp_path / "none").mkdir()
    assert _fault_kinds(tmp_path / "none") == {"no images": 1}


def test_the_command_counts_faults_and_shows_examples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [Annotation((n, 5, n, 9), "[red]") for n in range(5)]
    assert (
        check([str(_write_split(tmp_path, "train", *bad)), str(tmp_path / "nowhere")])
        == 1
    )
    out = "".join(capsys.readouterr().out.replace("│", " ").split())
    assert "emptybox5" in out
    assert "[red]" in out
    assert "and2more" in out
    assert "can'tberead1nosuchfolder" in out


def test_an_image_that_labels_list_twice_is_found(tmp_path: Path) -> None:
    _write_photo(tmp_path / "images" / "a.png", 1)
    images = [
        {"id": n, "file_name": "a.png", "width": 40, "height": 30} for n in (1, 2)
    ]
    (tmp_path / "annotations.json").write_text(
        json.dumps({"images": images, "annotations": [], "categories": []})
    )
    [fault] = check_datasets([str(tmp_path)])
    assert fault.kind == "can't be read"
    assert "lists the image images/a.png twice" in fault.example
