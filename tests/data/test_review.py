"""Labels to Label Studio, CVAT and FiftyOne, and back."""

from __future__ import annotations

import json
import string
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from coin_ray import storage, tables
from coin_ray.data.review import cvat, fiftyone, label_studio
from coin_ray.data.review.reviews import (
    KINDS,
    Review,
    ReviewedBox,
    reviews_by_disagreement,
)
from coin_ray.errors import InputError

CLASSES = ("cat", 'stop "sign" & <more>')
BOXES = [[0.0, 0.0, 40.0, 30.0], [1.0, 2.0, 11.0, 7.0], [4.0, 5.0, 8.0, 9.0]]
CLOUD = [[0.9, 0.05, 0.05], [0.75, 0.25, 0.0], [0.0, 0.4, 0.6]]
CLIP = [[0.8, 0.1, 0.1], [0.125, 0.625, 0.25], [0.0, 0.0, 0.0]]


def _image_rows(folder: Path) -> list[dict[str, Any]]:
    rows = []
    for name in ("agreed", "a/disputed", "unseen", "empty", "corrected"):
        path = folder / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30)).save(path)
        rows.append(
            {
                "image_id": name,
                "uri": str(path),
                "width": 40,
                "height": 30,
                "split": "train",
            }
        )
    return rows


def _separation_rows() -> list[dict[str, Any]]:
    box_kinds = ["consistent", "inconsistent", "private"]
    labels = {"cloud_labels": [0, 0, 1], "clip_labels": [0, 1, tables.NO_LABEL]}
    disagreeing = {
        "image_id": "a/disputed",
        "boxes": BOXES,
        "kind": box_kinds,
        "cloud_probs": CLOUD,
        "clip_probs": CLIP,
    } | labels
    agreeing = {
        name: column if isinstance(column, str) else column[:1]
        for name, column in disagreeing.items()
    } | {"image_id": "agreed"}
    corrected = agreeing | {"image_id": "corrected", "kind": ["reviewed"]}
    empty = {
        name: column if isinstance(column, str) else []
        for name, column in disagreeing.items()
    } | {"image_id": "empty"}
    return [disagreeing, agreeing, empty, corrected]


def _select_reviews(folder: Path, limit: int | None = None) -> list[Review]:
    uri = str(folder / "separation.parquet")
    storage.write_table(
        uri, pa.Table.from_pylist(_separation_rows(), schema=tables.SEPARATION)
    )
    reviews, total = reviews_by_disagreement(
        pa.Table.from_pylist(_image_rows(folder), schema=tables.IMAGES),
        uri,
        CLASSES,
        limit,
    )
    assert total == 3
    return reviews


def test_images_with_most_disagreement_come_first_and_corrected_ones_not_at_all(
    tmp_path: Path,
) -> None:
    reviews = _select_reviews(tmp_path)
    assert [(r.image_id, r.name, r.disagreement) for r in reviews] == [
        ("a/disputed", "a/disputed.jpg", 0.6667),
        ("agreed", "agreed.jpg", 0),
        ("empty", "empty.jpg", 0),
    ]
    assert _select_reviews(tmp_path, 2) == reviews[:2]
    assert reviews[0].counts == {"consistent": 1, "inconsistent": 1, "private": 1}
    assert not any(r.reviewed for r in reviews)


def test_a_box_has_its_kind_and_the_label_of_each_teacher(tmp_path: Path) -> None:
    assert [
        (b.label, b.kind, b.teacher_labels) for b in _select_reviews(tmp_path)[0].boxes
    ] == [
        ("cat", "consistent", "cloud cat 0.90, CLIP cat 0.80"),
        ("cat", "inconsistent", f"cloud cat 0.75, CLIP {CLASSES[1]} 0.62"),
        (CLASSES[1], "private", f"{CLASSES[1]} 0.40"),
    ]


# What is written reads back the same

Writer = Callable[[Sequence[Review], Path], list[Review]]


def _pass_through_label_studio(reviews: Sequence[Review], folder: Path) -> list[Review]:
    label_studio.write_label_studio(reviews, str(folder), CLASSES)
    return label_studio.read_label_studio(str(folder / "tasks.json"))


def _pass_through_cvat(reviews: Sequence[Review], folder: Path) -> list[Review]:
    (folder / "x.xml").write_bytes(cvat.cvat_xml(reviews))
    return cvat.read_cvat(str(folder / "x.xml"))


def _pass_through_fiftyone(reviews: Sequence[Review], folder: Path) -> list[Review]:
    (folder / "samples.json").write_text(
        json.dumps({"samples": [fiftyone.fiftyone_sample(r) for r in reviews]})
    )
    return fiftyone.read_fiftyone(str(folder))


TOOLS = {
    "label studio": _pass_through_label_studio,
    "cvat": _pass_through_cvat,
    "fiftyone": _pass_through_fiftyone,
}
names = (
    st.text(
        string.ascii_letters + string.digits + "äß犬 &<>\"'-_:.",
        min_size=1,
        max_size=12,
    )
    .map(str.strip)
    .filter(bool)
)
coordinates = st.floats(0, 3000, allow_subnormal=False)
# a set of boxes near the first corner may be shares of the sides
far_coordinates = st.floats(31, 3000)
edges = st.tuples(coordinates, coordinates, far_coordinates, coordinates)
file_names = names.map("{}.jpg".format)
kinds_and_labels = st.one_of(
    st.tuples(st.just(""), st.just("")), st.tuples(st.sampled_from(KINDS), names)
)
boxes = st.builds(
    lambda box_edges, label, kind_and_labels: ReviewedBox(
        box_edges, label, *kind_and_labels
    ),
    edges,
    names,
    kinds_and_labels,
)
review = st.builds(
    lambda name, **fields: Review(uri=f"s3://bucket/{name}", name=name, **fields),
    name=file_names,
    image_id=names,
    width=st.integers(8, 3000),
    height=st.integers(8, 3000),
    boxes=st.lists(boxes, max_size=4).map(tuple),
    reviewed=st.booleans(),
)


@pytest.mark.parametrize("tool", TOOLS)
@given(reviews=st.lists(review, min_size=1, max_size=3))
def test_exported_reviews_are_read_back_the_same(
    tmp_path_factory: pytest.TempPathFactory, tool: str, reviews: list[Review]
) -> None:
    read_reviews = TOOLS[tool](reviews, tmp_path_factory.mktemp("x"))
    if tool == "cvat":
        reviews = sorted(reviews, key=lambda review: review.name)
    assert [replace(r, boxes=()) for r in read_reviews] == [
        replace(r, boxes=()) for r in reviews
    ]
    for read_review, written_review in zip(read_reviews, reviews, strict=True):
        assert [replace(b, edges=(0, 0, 0, 0)) for b in read_review.boxes] == [
            replace(b, edges=(0, 0, 0, 0)) for b in written_review.boxes
        ]
        for box, other in zip(read_review.boxes, written_review.boxes, strict=True):
            assert box.edges == pytest.approx(other.edges, abs=1e-9)


def test_images_go_along_to_cvat_and_fiftyone(tmp_path: Path) -> None:
    reviews = _select_reviews(tmp_path / "in")
    cvat.write_cvat(reviews, str(tmp_path / "cvat"), CLASSES)
    fiftyone.write_fiftyone(reviews, str(tmp_path / "fiftyone"))
    for folder in (tmp_path / "cvat" / "images", tmp_path / "fiftyone" / "data"):
        assert (folder / "a" / "disputed.jpg").read_bytes() == (
            tmp_path / "in" / "a" / "disputed.jpg"
        ).read_bytes()
    assert cvat.read_cvat(str(tmp_path / "cvat" / "annotations.xml")) == sorted(
        reviews, key=lambda review: review.name
    )
    assert [r.image_id for r in fiftyone.read_fiftyone(str(tmp_path / "fiftyone"))] == [
        r.image_id for r in reviews
    ]


# Label Studio


def test_tasks_can_be_sorted_by_disagreement(tmp_path: Path) -> None:
    first, second, _ = (
        label_studio.label_studio_task(r, "/data/local-files/?d={uri}")
        for r in _select_reviews(tmp_path)
    )
    assert [t["predictions"][0]["score"] for t in (first, second)] == [
        pytest.approx(1 / 3, abs=1e-4),
        1,
    ]
    expected_fields = {
        "image": f"/data/local-files/?d={tmp_path}/a/disputed.jpg",
        "disagreement": 0.6667,
        "inconsistent": 1,
        "private": 1,
    }
    assert expected_fields.items() <= first["data"].items()
    region = first["predictions"][0]["result"][1]
    assert region["meta"]["text"] == [
        f"inconsistent: cloud cat 0.75, CLIP {CLASSES[1]} 0.62"
    ]
    expected_rectangle = {
        "x": 2.5,
        "y": pytest.approx(20 / 3),
        "width": 25,
        "height": pytest.approx(50 / 3),
        "rotation": 0,
        "rectanglelabels": ["cat"],
    }
    assert region["value"] == expected_rectangle
    assert (region["original_width"], region["original_height"]) == (40, 30)


def _label_studio_tasks(folder: Path) -> list[dict[str, Any]]:
    return [label_studio.label_studio_task(r) for r in _select_reviews(folder)]


def _write_export(folder: Path, tasks_json: Any) -> str:
    (folder / "export.json").write_text(json.dumps(tasks_json))
    return str(folder / "export.json")


def _annotate(task: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return the task after a review, with its prediction as a number, as exported."""
    return task | {
        "predictions": [7],
        "annotations": [
            {"result": task["predictions"][0]["result"], "was_cancelled": False}
            | changes
        ],
    }


def test_only_finished_tasks_count_as_reviewed_and_the_last_annotation_counts(
    tmp_path: Path,
) -> None:
    first, second, third = _label_studio_tasks(tmp_path)
    late = {"result": [], "updated_at": "2026-02-01T00:00:00Z"}
    early = {
        "result": first["predictions"][0]["result"],
        "updated_at": "2026-01-01T00:00:00Z",
    }
    exported_tasks = [
        first | {"annotations": [late, early]},
        _annotate(second, was_cancelled=True),
        third | {"annotations": []},
    ]
    reviews = label_studio.read_label_studio(_write_export(tmp_path, exported_tasks))
    assert [(r.image_id, r.reviewed, len(r.boxes)) for r in reviews] == [
        ("a/disputed", True, 0),
        ("agreed", False, 0),
        ("empty", False, 0),
    ]


BOX_OF_CAT = {
    "type": "rectanglelabels",
    "value": {"x": 25, "y": 0, "width": 50, "height": 100, "rectanglelabels": ["cat"]},
}
BOXES_OF_CAT = (ReviewedBox((10, 0, 30, 30), "cat"),)


@pytest.mark.parametrize(
    ("of_cat", "empty", "change"),
    [
        # the dot of a fraction sorts before the Z
        ("2026-02-01T10:00:00.5Z", "2026-02-01T10:00:00Z", "the one updated last"),
        ("2026-02-01T10:00:00+02:00", "2026-02-01T07:59:00Z", "the one updated last"),
        ("2026-02-02T10:00:00", "2026-02-01T10:00:00Z", "the one updated last"),
    ],
)
def test_the_annotation_updated_last_counts_and_that_is_told(
    tmp_path: Path, of_cat: str, empty: str, change: str
) -> None:
    annotations = [
        {"result": [BOX_OF_CAT], "updated_at": of_cat},
        {"result": [], "updated_at": empty},
    ]
    for order in (annotations, annotations[::-1]):
        task = _label_studio_tasks(tmp_path)[0] | {"annotations": order}
        export = _write_export(tmp_path, [task])
        [review_of_task] = label_studio.read_label_studio(export)
        assert review_of_task.boxes == BOXES_OF_CAT
        assert "of 2 annotations the one updated last" in review_of_task.changes[0]


def test_a_starred_annotation_counts_before_later_ones(tmp_path: Path) -> None:
    starred = {"result": [BOX_OF_CAT], "updated_at": "2026-01-01", "ground_truth": True}
    annotations = [{"result": [], "updated_at": "2026-01-02"}, starred]
    task = _label_studio_tasks(tmp_path)[0] | {"annotations": annotations}
    export = _write_export(tmp_path, [task])
    [review_of_task] = label_studio.read_label_studio(export)
    assert review_of_task.boxes == BOXES_OF_CAT
    assert "of 2 annotations the starred one counts" in review_of_task.changes[0]


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ([{"result": []}, {"result": [BOX_OF_CAT]}], "got 2 that differ"),
        (
            [
                {"result": [], "updated_at": "2026-01-02"},
                {"result": [BOX_OF_CAT]},
            ],
            "got 2 that differ",
        ),
        (
            [
                {"result": [], "ground_truth": True, "updated_at": "2026-01-02"},
                {"result": [BOX_OF_CAT], "ground_truth": True},
            ],
            "star one of them",
        ),
        ([{"result": [], "was_cancelled": "yes"}], "expected was_cancelled true or"),
    ],
)
def test_annotations_whose_order_nothing_tells_are_a_problem(
    tmp_path: Path, annotations: list[dict[str, Any]], message: str
) -> None:
    first, second, _ = _label_studio_tasks(tmp_path)
    tasks = [first | {"annotations": annotations}, _annotate(second)]
    reviews = label_studio.read_label_studio(_write_export(tmp_path, tasks))
    assert message in reviews[0].problems[0]
    assert not reviews[1].problems


def test_equal_annotations_need_no_order(tmp_path: Path) -> None:
    annotations = [{"result": [BOX_OF_CAT]}, {"result": [BOX_OF_CAT]}]
    task = _label_studio_tasks(tmp_path)[0] | {"annotations": annotations}
    export = _write_export(tmp_path, [task])
    [review_of_task] = label_studio.read_label_studio(export)
    assert (review_of_task.boxes, review_of_task.changes) == (BOXES_OF_CAT, ())


def test_boxes_in_shares_instead_of_percent_are_an_error(tmp_path: Path) -> None:
    value = {"x": 0.25, "y": 0, "width": 0.5, "height": 1, "rectanglelabels": ["cat"]}
    result = [{"type": "rectanglelabels", "value": value}]
    tasks = [_annotate(t, result=result) for t in _label_studio_tasks(tmp_path)[:2]]
    with pytest.raises(InputError, match="expected boxes in percent of the image, got"):
        label_studio.read_label_studio(_write_export(tmp_path, tasks))
    tasks[0]["annotations"][0]["result"] = [BOX_OF_CAT]
    reviews = label_studio.read_label_studio(_write_export(tmp_path, tasks))
    assert reviews[0].boxes == BOXES_OF_CAT


@pytest.mark.parametrize(
    ("address", "is_other"),
    [
        ("http://h/data/upload/1/0a1b2c3d-agreed.jpg", True),
        ("s3://b/agreed.jpg?X-Amz=1", True),
        ("/data/local-files/?d=/x/agreed.jpg", True),
        ("/data/local-files/?d=/x/disputed.jpg", False),
        ("http://h/data/upload/1/0a1b2c3d-disputed.jpg", False),
        ("https://cdn/5fd1", False),
        ("", False),
    ],
)
def test_a_review_made_on_another_image_is_an_error(
    tmp_path: Path, address: str, is_other: bool
) -> None:
    first, second, _ = map(_annotate, _label_studio_tasks(tmp_path))
    first["data"]["image"] = address
    export = _write_export(tmp_path, [first, second])
    if not is_other:
        assert len(label_studio.read_label_studio(export)) == 2
        return
    message = r"the review of .*disputed\.jpg was made on the image"
    with pytest.raises(InputError, match=message):
        label_studio.read_label_studio(export)


def test_other_kinds_of_regions_are_left_out_and_drawn_boxes_have_no_kind(
    tmp_path: Path,
) -> None:
    choice = {"type": "choices", "value": {"choices": ["night"]}}
    drawn = {
        "type": "rectanglelabels",
        "value": {
            "x": 0,
            "y": 0,
            "width": 50,
            "height": 100,
            "rectanglelabels": ["cat"],
        },
    }
    [review_of_task] = label_studio.read_label_studio(
        _write_export(
            tmp_path,
            [_annotate(_label_studio_tasks(tmp_path)[0], result=[choice, drawn])],
        )
    )
    assert review_of_task.boxes == (ReviewedBox((0, 0, 20, 30), "cat"),)


PLACE = {"x": 25, "y": 0, "width": 50, "height": 100}
NOT_A_BOX = "task 0: expected an upright box with one label"


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([{"type": "rectanglelabels", "value": PLACE}], NOT_A_BOX),
        ([{"type": "rectangle", "value": PLACE}], NOT_A_BOX),
        ([{"type": "rectanglelabels", "value": None}], NOT_A_BOX),
        (
            [{"type": "labels", "value": PLACE | {"labels": ["cat", "dog"]}}],
            NOT_A_BOX,
        ),
        (
            [{"type": "labels", "value": PLACE | {"labels": ["cat"], "x": None}}],
            NOT_A_BOX,
        ),
        (
            [
                {"type": "rectangle", "id": "a", "value": PLACE},
                {"type": "labels", "id": "a", "value": {"labels": ["cat"]}},
                {"type": "labels", "id": "a", "value": {"labels": ["dog"]}},
            ],
            NOT_A_BOX,
        ),
        (
            [
                {
                    "type": "labels",
                    "id": "a",
                    "value": PLACE | {"x": x, "labels": ["cat"]},
                }
                for x in (25, 26)
            ],
            NOT_A_BOX,
        ),
        ([{"type": "labels", "value": {"labels": ["cat"]}}], "got labels"),
        ([{"type": "polygonlabels", "value": {}}], "got polygonlabels"),
        ([{"value": {"keypointlabels": ["cat"]}}], "got None"),
        (
            [{"type": "polygonlabels", "value": {"points": [], "labels": ["cat"]}}],
            "got polygonlabels",
        ),
        (
            [{"type": "brushlabels", "value": {"rle": [], "brushlabels": ["cat"]}}],
            "got brushlabels",
        ),
        (
            [
                {
                    "type": "rectanglelabels",
                    "value": PLACE | {"rectanglelabels": ["cat"], "rotation": 30},
                }
            ],
            "one turned by 30 degrees",
        ),
        (
            [
                {
                    "type": "rectanglelabels",
                    "image_rotation": 90,
                    "value": PLACE | {"rectanglelabels": ["cat"]},
                }
            ],
            "the image was turned by 90 degrees",
        ),
        (
            [
                {
                    "type": "rectanglelabels",
                    "original_width": 300,
                    "original_height": 400,
                    "value": PLACE | {"rectanglelabels": ["cat"]},
                }
            ],
            "drawn on an image of 300 x 400",
        ),
    ],
)
def test_what_is_no_box_of_label_studio_is_a_problem_of_its_image(
    tmp_path: Path, result: list[dict[str, Any]], message: str
) -> None:
    first, second, third = _label_studio_tasks(tmp_path)
    exported_tasks = [
        _annotate(first, result=result),
        _annotate(second),
        third | {"annotations": [], "predictions": [{"result": result}]},
    ]
    reviews = label_studio.read_label_studio(_write_export(tmp_path, exported_tasks))
    assert [review.reviewed for review in reviews] == [True, True, False]
    [problem] = reviews[0].problems
    assert message in problem
    assert (len(reviews[1].boxes), reviews[1].problems) == (1, ())


@pytest.mark.parametrize(
    "result",
    [
        [{"type": "labels", "value": PLACE | {"labels": ["cat"]}}],
        [{"type": "rectanglelabels", "value": PLACE | {"rectanglelabels": ["cat"]}}],
        [
            {"type": "rectangle", "id": "a", "value": PLACE},
            {"type": "labels", "id": "a", "value": PLACE | {"labels": ["cat"]}},
            {"type": "choices", "id": "a", "value": PLACE | {"choices": ["blurred"]}},
        ],
        [
            {
                "type": "rectanglelabels",
                "original_width": 4000,
                "original_height": 3000,
                "value": PLACE | {"rectanglelabels": ["cat"], "rotation": 360},
            },
            {"type": "relation", "from_id": "a", "to_id": "b"},
        ],
    ],
)
def test_every_setup_of_label_studio_gives_the_box(
    tmp_path: Path, result: list[dict[str, Any]]
) -> None:
    task = _annotate(_label_studio_tasks(tmp_path)[0], result=result)
    [review_of_task] = label_studio.read_label_studio(_write_export(tmp_path, [task]))
    assert review_of_task.boxes == (ReviewedBox((10, 0, 30, 30), "cat"),)
    assert (review_of_task.problems, review_of_task.changes) == ((), ())


@pytest.mark.parametrize(
    ("rotation", "edges"),
    [
        (-0.1, (10, 4.965, 30.017, 15)),
        (359.9, (10, 4.965, 30.017, 15)),
        (90, (0, 5, 10, 25)),
    ],
)
def test_a_turned_box_becomes_the_upright_one_around_it_and_that_is_told(
    tmp_path: Path, rotation: float, edges: tuple[float, ...]
) -> None:
    """Label Studio turns clockwise about the first corner, in pixels."""
    value = {"x": 25, "y": 100 / 6, "width": 50, "height": 100 / 3}
    turned = value | {"rectanglelabels": ["cat"], "rotation": rotation}
    result = [{"type": "rectanglelabels", "value": turned}]
    task = _annotate(_label_studio_tasks(tmp_path)[0], result=result)
    [review_of_task] = label_studio.read_label_studio(_write_export(tmp_path, [task]))
    assert review_of_task.boxes[0].edges == pytest.approx(edges, abs=1e-2)
    [change] = review_of_task.changes
    assert f"turned by {rotation:g} degrees" in change


def test_foreign_tasks_are_problems_if_somebody_submitted_them(tmp_path: Path) -> None:
    first, *_ = _label_studio_tasks(tmp_path)
    foreign = {"data": {"image": "x"}}
    exported_tasks = [first, foreign, foreign | {"annotations": [{"result": []}]}]
    reviews = label_studio.read_label_studio(_write_export(tmp_path, exported_tasks))
    assert [review.reviewed for review in reviews] == [False, True]
    assert "task 2 has no data.uri" in reviews[1].problems[0]


@pytest.mark.parametrize(
    ("pattern", "address"),
    [
        ("{uri}", "s3://b/a #1&2 50%+.jpg"),
        ("/data/?d={uri}", "/data/?d=s3://b/a%20%231%262%2050%25%2B.jpg"),
        ("http://h/files/{uri}", "http://h/files/s3://b/a%20%231%262%2050%25%2B.jpg"),
    ],
)
def test_an_address_inside_another_one_is_quoted(pattern: str, address: str) -> None:
    review_of_image = Review("x", "s3://b/a #1&2 50%+.jpg", "a.jpg", 4, 3)
    task = label_studio.label_studio_task(review_of_image, pattern)
    assert task["data"]["image"] == address


@pytest.mark.parametrize(
    ("exported", "message"),
    [
        ({}, "is not a JSON export of Label Studio"),
        (
            [{"data": {"image": "x"}, "annotations": [{"result": []}]}],
            "task 0 has no data.uri",
        ),
        (
            [
                {
                    "data": {
                        "image_id": "x",
                        "uri": "/nowhere.jpg",
                        "width": 0,
                        "height": 0,
                    }
                }
            ],
            "no image that can be read",
        ),
    ],
)
def test_an_export_of_something_else_is_an_error(
    tmp_path: Path, exported: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        label_studio.read_label_studio(_write_export(tmp_path, exported))


def test_the_labelling_setup_names_the_classes() -> None:
    labels = ET.fromstring(label_studio.labelling_setup(CLASSES)).iter("Label")
    assert [label.get("value") for label in labels] == list(CLASSES)


# CVAT

XML = """<annotations><version>1.1</version><meta><task><name>x</name></task></meta>
<image id="0" name="a.jpg" width="40" height="30">
<tag label="review" source="manual"><attribute name="image_id">abc</attribute>
<attribute name="reviewed">{reviewed}</attribute></tag>
{shapes}
</image><image id="1" name="other.jpg" width="4" height="3"/></annotations>"""
BOX = (
    '<box label="cat" source="manual" occluded="0" xtl="1.00" ytl="2.00" xbr="11.00"'
    ' ybr="7.00" {more}><attribute name="kind">{kind}</attribute><attribute'
    ' name="teachers">said</attribute></box>'
)


def _write_cvat_xml(folder: Path, shapes: str = "", reviewed: str = "true") -> str:
    (folder / "a.xml").write_text(XML.format(shapes=shapes, reviewed=reviewed))
    return str(folder / "a.xml")


def test_an_export_of_cvat_as_it_comes(tmp_path: Path) -> None:
    """Images that were added to the task by hand, without our tag, are left out."""
    export_path = _write_cvat_xml(
        tmp_path,
        BOX.format(kind="by hand", more='rotation="0.0"')
        + BOX.format(kind="private", more=""),
    )
    with zipfile.ZipFile(tmp_path / "job.zip", "w") as archive:
        archive.write(export_path, "annotations.xml")
    expected = Review(
        "abc",
        "",
        "a.jpg",
        40,
        30,
        (
            ReviewedBox((1, 2, 11, 7), "cat", "", "said"),
            ReviewedBox((1, 2, 11, 7), "cat", "private", "said"),
        ),
        reviewed=True,
    )
    assert (
        cvat.read_cvat(export_path)
        == cvat.read_cvat(str(tmp_path / "job.zip"))
        == [expected]
    )
    assert not cvat.read_cvat(_write_cvat_xml(tmp_path, reviewed="false"))[0].reviewed


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        (
            "<annotations><image/></annotations>",
            "no image has the tag 'review' with its image_id",
        ),
        ("<annotation/>", "expected <annotations>, got <annotation>"),
        ("<annotations>", "not XML"),
    ],
)
def test_a_file_that_is_no_review_of_cvat_is_an_error(
    tmp_path: Path, xml: str, message: str
) -> None:
    (tmp_path / "x.xml").write_text(xml)
    with pytest.raises(InputError, match=message):
        cvat.read_cvat(str(tmp_path / "x.xml"))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            BOX.format(kind="x", more='rotation="12.5"'),
            "a.xml:5: expected an upright box, got one turned by 12.5 degrees",
        ),
        (
            '<polygon label="cat" points="1,2;3,4"/>',
            "a.xml:5: expected boxes, got a polygon of 'cat'",
        ),
        ('<mask label="cat"/>', "a.xml:5: expected boxes, got a mask of 'cat'"),
        ('<cube label="cat"/>', "a.xml:5: expected boxes, got a cube of 'cat'"),
        (
            '<tag label="review"><attribute name="image_id">def</attribute></tag>',
            "a.jpg has tags 'review' of several images",
        ),
        (
            '<box label="cat" xtl="a"/>',
            "a.xml:5: xtl: expected a number, got 'a'",
        ),
    ],
)
def test_an_odd_shape_of_cvat_is_a_problem_of_its_image(
    tmp_path: Path, shapes: str, message: str
) -> None:
    export = _write_cvat_xml(tmp_path, shapes)
    [review_of_image] = cvat.read_cvat(export)
    assert len(review_of_image.problems) == 1
    assert message in review_of_image.problems[0]
    export = _write_cvat_xml(tmp_path, shapes, reviewed="false")
    assert not cvat.read_cvat(export)[0].reviewed


def test_a_second_upload_to_cvat_does_not_untick_an_image(tmp_path: Path) -> None:
    second = '<tag label="review"><attribute name="image_id">abc</attribute>{}</tag>'
    ticked = second.format('<attribute name="reviewed">true</attribute>')
    [review_of_image] = cvat.read_cvat(_write_cvat_xml(tmp_path, ticked, "false"))
    assert (review_of_image.reviewed, review_of_image.problems) == (True, ())


def test_boxes_of_cvat_in_shares_are_an_error(tmp_path: Path) -> None:
    shape = '<box label="cat" xtl="0.1" ytl="0" xbr="{}" ybr="1"/>'
    with pytest.raises(InputError, match="expected boxes in pixels, got no box that"):
        cvat.read_cvat(_write_cvat_xml(tmp_path, shape.format(0.9)))
    [review_of_image] = cvat.read_cvat(_write_cvat_xml(tmp_path, shape.format(2)))
    assert review_of_image.boxes == (ReviewedBox((0.1, 0, 2, 1), "cat"),)


def test_a_box_of_cvat_turns_about_its_centre(tmp_path: Path) -> None:
    export = _write_cvat_xml(tmp_path, BOX.format(kind="", more='rotation="90"'))
    [review_of_image] = cvat.read_cvat(export)
    assert review_of_image.boxes[0].edges == pytest.approx((3.5, -0.5, 8.5, 9.5))
    assert "turned by 90 degrees" in review_of_image.changes[0]


def test_images_of_cvat_are_in_the_order_of_its_frames(tmp_path: Path) -> None:
    """CVAT takes an image's id for the frame's number where it does not know the name."""
    reviews = [Review("x", "", name, 4, 3) for name in ("b.jpg", "a/c.jpg", "B.jpg")]
    root = ET.fromstring(cvat.cvat_xml(reviews, CLASSES))
    assert [(i.get("id"), i.get("name")) for i in root.iter("image")] == [
        ("0", "B.jpg"),
        ("1", "a/c.jpg"),
        ("2", "b.jpg"),
    ]
    labels = root.findall("meta/task/labels/label")
    assert [label.findtext("name") for label in labels] == ["review", *CLASSES]
    assert root.findtext("meta/task/size") == "3"


@pytest.mark.parametrize(
    ("name", "uri", "reviewed", "fits"),
    [
        ("a.jpg", "/x/a.jpg", True, True),
        ("images/a.jpg", "s3://b/x/a.jpg", True, True),
        ("u\u0308.jpg", "/x/\u00fc.jpg", True, True),
        ("b.jpg", "/x/a.jpg", True, False),
        ("b.jpg", "/x/a.jpg", False, True),
    ],
)
def test_a_name_that_contradicts_the_uri_is_an_error(
    tmp_path: Path, name: str, uri: str, reviewed: bool, fits: bool
) -> None:
    """CVAT has then put the labels on another image of the same size."""
    review_of_image = Review("x", uri, name, 4, 3, reviewed=reviewed)
    (tmp_path / "x.xml").write_bytes(cvat.cvat_xml([review_of_image]))
    if fits:
        assert cvat.read_cvat(str(tmp_path / "x.xml")) == [review_of_image]
        return
    with pytest.raises(InputError, match=r"the image b\.jpg carries the review of"):
        cvat.read_cvat(str(tmp_path / "x.xml"))


def test_an_archive_of_another_format_is_an_error(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "job.zip", "w") as archive:
        archive.writestr("instances.json", "{}")
    with pytest.raises(InputError, match=r"export the task as 'CVAT for images 1\.1'"):
        cvat.read_cvat(str(tmp_path / "job.zip"))


def test_cvat_labels_declare_every_attribute(tmp_path: Path) -> None:
    reviews = _select_reviews(tmp_path)
    declared = {
        label["name"]: {a["name"]: a for a in label["attributes"]}
        for label in cvat.cvat_labels(CLASSES)
    }
    root = ET.fromstring(cvat.cvat_xml(reviews))
    for node in (*root.iter("box"), *root.iter("tag")):
        for attribute in node.iterfind("attribute"):
            declaration = declared[node.get("label", "")][attribute.get("name", "")]
            assert declaration["input_type"] == "text" or attribute.text in declaration[
                "values"
            ] + [
                "true",
                "false",
            ]
    with pytest.raises(InputError, match="no class can have it"):
        cvat.write_cvat([], str(tmp_path / "x"), ("review",))


# FiftyOne


def test_a_fiftyone_export_with_fields_of_its_own(tmp_path: Path) -> None:
    """FiftyOneDataset writes ids, dates, and null for missing fields."""
    box = {
        "_id": {"$oid": "6"},
        "_cls": "Detection",
        "attributes": {},
        "tags": [],
        "label": "cat",
        "bounding_box": [0.25, 0, 0.5, 1],
        "mask": None,
    }
    foreign_fields = {
        "_id": {"$oid": "5"},
        "metadata": None,
        "created_at": {"$date": "2026-01-01T00:00:00Z"},
        "_media_type": "image",
    }
    sample_fields = {
        "filepath": "data/a.jpg",
        "image_id": "abc",
        "pixels_wide": 40,
        "pixels_high": 30,
        "tags": ["reviewed", "night"],
    }
    empty = sample_fields | {"image_id": "def", "tags": [], "ground_truth": None}
    dataset = {
        "samples": [
            foreign_fields
            | sample_fields
            | {"ground_truth": {"_cls": "Detections", "detections": [box]}},
            empty,
        ]
    }
    (tmp_path / "samples.json").write_text(json.dumps(dataset))
    first, second = fiftyone.read_fiftyone(str(tmp_path))
    assert (first.image_id, first.reviewed, first.boxes) == (
        "abc",
        True,
        (ReviewedBox((10, 0, 30, 30), "cat"),),
    )
    assert (second.reviewed, second.boxes) == (False, ())


def test_odd_samples_of_fiftyone_cost_themselves_only(tmp_path: Path) -> None:
    sound = {
        "image_id": "a",
        "pixels_wide": 40,
        "pixels_high": 30,
        "tags": ["reviewed"],
    }
    box = {"label": "cat", "bounding_box": [0, 0, 0.5, 1]}
    odd = {"label": "cat", "bounding_box": [0, 0, None, 1]}
    samples = [
        sound | {"ground_truth": {"detections": [box]}},
        sound | {"ground_truth": {"detections": [box, odd]}},
        {"filepath": "other.jpg", "tags": ["reviewed"]},
        {"filepath": "other.jpg"},
    ]
    (tmp_path / "samples.json").write_text(json.dumps({"samples": samples}))
    reviews = fiftyone.read_fiftyone(str(tmp_path))
    assert [len(review.problems) for review in reviews] == [0, 1, 1]
    assert "samples.1.detections.1.bounding_box.2" in reviews[1].problems[0]


@pytest.mark.parametrize(
    "field",
    [
        {},
        {"ground_truth": None},
        {"predictions": {"detections": []}},
        {"ground_truth": {"_cls": "Polylines", "polylines": []}},
        {"ground_truth": {"_cls": "Detections"}},
    ],
)
def test_a_reviewed_sample_without_detections_is_not_an_image_without_objects(
    tmp_path: Path, field: dict[str, Any]
) -> None:
    common = {"pixels_wide": 40, "pixels_high": 30, "tags": ["reviewed"]}
    empty = {"ground_truth": {"_cls": "Detections", "detections": []}}
    samples = [common | {"image_id": "a"} | field, common | {"image_id": "b"} | empty]
    (tmp_path / "samples.json").write_text(json.dumps({"samples": samples}))
    odd, sound = fiftyone.read_fiftyone(str(tmp_path))
    assert "ground_truth" in odd.problems[0]
    assert (sound.boxes, sound.problems) == ((), ())


@pytest.mark.parametrize(
    ("path", "is_other"),
    [
        ("data/b.jpg", True),
        ("data/b-2.jpg", True),
        ("data/a.jpg", False),
        ("data/a-2.jpg", False),
        ("data/5f.jpg", False),
    ],
)
def test_a_sample_with_the_file_of_another_one_is_an_error(
    tmp_path: Path, path: str, is_other: bool
) -> None:
    samples = [
        fiftyone.fiftyone_sample(Review(name, f"/x/{name}", name, 4, 3, reviewed=True))
        for name in ("a.jpg", "b.jpg")
    ]
    samples[0]["filepath"] = path
    (tmp_path / "samples.json").write_text(json.dumps({"samples": samples}))
    if not is_other:
        assert len(fiftyone.read_fiftyone(str(tmp_path))) == 2
        return
    with pytest.raises(InputError, match=f"made on the image {path}"):
        fiftyone.read_fiftyone(str(tmp_path))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"samples": [{"filepath": "a.jpg"}]}, "samples.0.image_id: Field required"),
        (
            {"samples": [{"image_id": "a", "pixels_wide": 0, "pixels_high": 3}]},
            "samples.0: an image needs pixels_wide",
        ),
    ],
)
def test_a_fiftyone_dataset_of_someone_else_is_an_error(
    tmp_path: Path, dataset: Any, message: str
) -> None:
    (tmp_path / "samples.json").write_text(json.dumps(dataset))
    with pytest.raises(InputError, match=message):
        fiftyone.read_fiftyone(str(tmp_path))
