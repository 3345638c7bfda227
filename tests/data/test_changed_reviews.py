"""Any part of a review file permuted, renamed, dropped or doubled: an error, an image
that keeps the teachers' labels, or the same boxes; never other ones.

Not among the changes is what no reader can notice: a box that is dropped, boxes or
labels that change places, a mark of a review that goes to another image.
"""

from __future__ import annotations

import hashlib
import json
import random
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from coin_ray.data.review.corrections import correction_rows, read_reviews
from coin_ray.data.review.cvat import write_cvat
from coin_ray.data.review.fiftyone import write_fiftyone
from coin_ray.data.review.label_studio import write_label_studio
from coin_ray.data.review.reviews import Review, ReviewedBox
from coin_ray.errors import InputError

SIZE = (60, 40)
CLASSES = ("cat", "dog", "car")
NAMES = ("a.png", "b b.png", "ü.png", "empty.png", "unseen.png")
Truth = dict[str, set[tuple[Any, ...]]]
"""The labelled boxes of each reviewed image."""


def _make_reviews(folder: Path) -> list[Review]:
    reviews = []
    for number, name in enumerate(NAMES):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", SIZE, (40 * number, 9, 90)).save(path)
        labels = () if name == "empty.png" else ("cat", "car", "cat")[: number + 1]
        boxes = [
            ReviewedBox((2 + 19 * n, 3 + n + number, 18 + 19 * n, 30), label, kind)
            for n, (label, kind) in enumerate(
                zip(labels, ("", "private", "")[: len(labels)], strict=True)
            )
        ]
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        reviewed = name != "unseen.png"
        reviews.append(
            Review(digest, str(path), name, *SIZE, tuple(boxes), reviewed=reviewed)
        )
    return reviews


def _write_label_studio(reviews: Sequence[Review], folder: Path) -> Path:
    """Write an export; its first image has annotations of two people."""
    write_label_studio(reviews, str(folder), CLASSES, "/data/local-files/?d={uri}")
    path = folder / "tasks.json"
    tasks = json.loads(path.read_text())
    for number, task in enumerate(tasks):
        task["id"] = number
        for annotation in task.get("annotations", ()):
            annotation["updated_at"] = "2026-02-01T10:00:00.000001Z"
    early = {"result": [], "updated_at": "2026-02-01T10:00:00Z"}
    tasks[0]["annotations"].append(early)
    path.write_text(json.dumps(tasks))
    return path


def _write_cvat(reviews: Sequence[Review], folder: Path) -> Path:
    write_cvat(reviews, str(folder), CLASSES)
    return folder / "annotations.xml"


def _write_fiftyone(reviews: Sequence[Review], folder: Path) -> Path:
    write_fiftyone(reviews, str(folder))
    return folder / "samples.json"


TOOLS = {
    "label studio": _write_label_studio,
    "cvat": _write_cvat,
    "fiftyone": _write_fiftyone,
}


def _read_truth(path: Path, reviews: Sequence[Review]) -> Truth:
    address = path.parent if path.name == "samples.json" else path
    images = {
        review.image_id: {
            "uri": review.uri,
            "width": review.width,
            "height": review.height,
            "split": "train",
        }
        for review in reviews
    }
    indexes = {name: index for index, name in enumerate(CLASSES)}
    rows = correction_rows(
        read_reviews(str(address)), images, indexes, "x", lambda line: None
    )
    return {
        row["image_id"]: {
            (*(round(edge, 4) for edge in box), label)
            for box, label in zip(row["boxes"], row["labels"], strict=True)
        }
        for row in rows
    }


TRUTH_KEYS = {"annotations", "predictions", "result", "value", "x", "y", "height"}
TRUTH_KEYS |= {"rectanglelabels", "ground_truth", "detections", "bounding_box"}
TRUTH_KEYS |= {
    "data",
    "label",
    "tags",
    "updated_at",
    "xtl",
    "ytl",
    "xbr",
    "ybr",
    "reviewed",
}
"""Keys whose values may not change places: they are the boxes and the marks."""


def _nodes_of(part: Any) -> Iterator[Any]:
    """Yield the objects and the lists of objects in a JSON value."""
    if isinstance(part, dict) or (isinstance(part, list) and part):
        yield part
    inner_parts = part.values() if isinstance(part, dict) else part
    for inner in inner_parts if isinstance(part, (dict, list)) else ():
        yield from _nodes_of(inner)


def _change_json(path: Path, kind: str, draw: random.Random) -> None:
    content = json.loads(path.read_text())
    nodes = list(_nodes_of(content))
    objects = [node for node in nodes if isinstance(node, dict) and node]
    lists = [n for n in nodes if isinstance(n, list) and isinstance(n[0], dict)]
    if not lists:
        return
    node = draw.choice(objects)
    key = draw.choice(sorted(node))
    if kind == "drop":
        del node[key]
    elif kind == "rename":
        other_keys = sorted(node.keys() - TRUTH_KEYS) or [key]
        new_keys = [key.upper(), f"{key}s", draw.choice(other_keys)]
        node[draw.choice(new_keys)] = node.pop(key)
    elif kind == "double":
        entries = draw.choice(lists)
        entries.insert(0, json.loads(json.dumps(draw.choice(entries))))
    elif kind == "shuffle":
        draw.shuffle(draw.choice(lists))
    elif kind == "exchange":
        partners = [other for other in objects if other.keys() == node.keys()]
        other = draw.choice(partners)
        if key not in TRUTH_KEYS and (key != "width" or "uri" in node):
            node[key], other[key] = other[key], node[key]
    path.write_text(json.dumps(content))


def _change_xml(path: Path, kind: str, draw: random.Random) -> None:
    root = ET.fromstring(path.read_bytes())
    node = draw.choice(list(root.iter()))
    key = draw.choice(sorted(node.keys())) if node.keys() else ""
    children = [child for child in node if child.tag != "box"]
    if kind == "drop" and key:
        del node.attrib[key]
    elif kind == "drop" and children:
        node.remove(draw.choice(children))
    elif kind == "rename" and key and draw.random() < 0.5:
        node.set(draw.choice([key.upper(), f"{key}s"]), node.attrib.pop(key))
    elif kind == "rename":
        node.tag = draw.choice([node.tag.upper(), f"{node.tag}s", "polygon"])
    elif kind == "double" and len(node):
        node.insert(0, draw.choice(list(node)))
    elif kind == "shuffle":
        children = list(node)
        draw.shuffle(children)
        node[:] = children
    elif kind == "exchange":
        other = draw.choice([n for n in root.iter() if n.tag == node.tag])
        is_place = key in TRUTH_KEYS or node.get("name") in TRUTH_KEYS
        if key and not is_place and key in other.attrib and key != "name":
            first, second = node.attrib[key], other.attrib[key]
            node.attrib[key], other.attrib[key] = second, first
        elif node.get("name") == other.get("name") and not is_place:
            node.text, other.text = other.text, node.text
    path.write_bytes(ET.tostring(root, "utf-8"))


KINDS = ("drop", "rename", "double", "shuffle", "exchange")


@pytest.mark.parametrize("tool", TOOLS)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 1 << 20),
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=2),
)
def test_a_changed_review_file_is_an_error_or_has_the_same_boxes(
    tmp_path_factory: pytest.TempPathFactory,
    tool: str,
    seed: int,
    kinds: Sequence[str],
) -> None:
    folder, draw = tmp_path_factory.mktemp("reviews"), random.Random(seed)
    reviews = _make_reviews(folder / "images")
    path = TOOLS[tool](reviews, folder / "export")
    truth = _read_truth(path, reviews)
    assert len(truth) == 4
    change: Callable[[Path, str, random.Random], None] = (
        _change_xml if path.suffix == ".xml" else _change_json
    )
    for kind in kinds:
        change(path, kind, draw)
    try:
        changed = _read_truth(path, reviews)
    except InputError:
        return
    for image_id, boxes in changed.items():
        assert boxes == truth[image_id]
