"""Label Studio: tasks with predictions to import, and JSON exports. Boxes are in
percent of the image (Label Studio's "task format").

A box's kind and the teachers' labels stand in its ``meta``; a task's ``data`` counts
the kinds, and can be sorted and filtered by them.
"""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from pydantic import TypeAdapter

from coin_ray import storage
from coin_ray.data.formats.parsing import image_size, read_validated_json
from coin_ray.data.review.regions import (
    check_shown_images,
    check_units,
    make_upright,
    read_regions,
)
from coin_ray.data.review.reviews import KINDS, Review, ReviewedBox
from coin_ray.errors import InputError
from coin_ray.storage import JsonObject

EXPORT = TypeAdapter(list[JsonObject])
BOX_PARTS = ("x", "y", "width", "height")
PLACES = {*BOX_PARTS, "points", "vertices", "rle", "radiusX", "radiusY"}
"""Entries of a region's value that place it in the image."""
WITHOUT_PLACE = {
    "choices",
    "datetime",
    "number",
    "pairwise",
    "ranker",
    "rating",
    "relation",
    "table",
    "taxonomy",
    "textarea",
}
"""Types of entries that say something of an image, or of a region of their id, and lie
nowhere themselves."""
LABELS = ("rectanglelabels", "labels")
"""Entries that hold the labels of a box: of <RectangleLabels>, and of <Labels> with
<Rectangle>."""
SHAPE_TOLERANCE = 0.02
"""Relative difference of two aspect ratios that rounding explains."""


def write_label_studio(
    reviews: Sequence[Review], folder: str, classes: Sequence[str], url: str = "{uri}"
) -> None:
    """Write ``tasks.json`` to import and ``labels.xml``, the labelling setup. ``url``:
    address of an image for Label Studio, made from its ``{uri}``, which is quoted
    unless the address begins with it.
    """
    tasks = [label_studio_task(review, url) for review in reviews]
    text = json.dumps(tasks, indent=1)
    storage.write_bytes(storage.join(folder, "tasks.json"), text.encode())
    setup = labelling_setup(classes)
    storage.write_bytes(storage.join(folder, "labels.xml"), setup.encode())


def label_studio_task(review: Review, url: str = "{uri}") -> JsonObject:
    """Convert a review to a task. The score of its prediction is the share of boxes
    that the teachers agree on: sorted by it, the images with the highest disagreement
    come first.
    """
    regions = [_region(number, review, box) for number, box in enumerate(review.boxes)]
    task_fields = {
        "image_id": review.image_id,
        "uri": review.uri,
        "name": review.name,
        "width": review.width,
        "height": review.height,
        "image": _image_address(review.uri, url),
        "disagreement": review.disagreement,
        **review.counts,
    }
    if review.reviewed:
        annotation = {"result": regions, "was_cancelled": False}
        return {"data": task_fields, "annotations": [annotation]}
    prediction = {
        "model_version": "coin_ray",
        "score": 1 - review.disagreement,
        "result": regions,
    }
    return {"data": task_fields, "predictions": [prediction]}


def _image_address(uri: str, url: str) -> str:
    """Put the URI into the pattern of an address: quoted inside another address, as it
    is where it is the address itself.
    """
    is_whole_address = url.startswith("{uri}")
    return url.replace("{uri}", uri if is_whole_address else quote(uri, safe="/:"))


def _region(number: int, review: Review, box: ReviewedBox) -> JsonObject:
    width, height = review.width, review.height
    x1, y1, x2, y2 = box.edges
    rectangle = {
        "x": 100 * (x1 / width),
        "y": 100 * (y1 / height),
        "width": 100 * ((x2 - x1) / width),
        "height": 100 * ((y2 - y1) / height),
        "rotation": 0,
        "rectanglelabels": [box.label],
    }
    region = {
        "id": f"box{number}",
        "type": "rectanglelabels",
        "from_name": "label",
        "to_name": "image",
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
        "value": rectangle,
    }
    if box.kind:
        region["meta"] = {"text": [f"{box.kind}: {box.teacher_labels}"]}
    return region


def labelling_setup(classes: Sequence[str]) -> str:
    """Return the XML for Label Studio's "Labeling Interface"."""
    root = ET.Element("View")
    ET.SubElement(root, "Image", name="image", value="$image", zoom="true")
    attributes = {"name": "label", "toName": "image", "canRotate": "false"}
    labels = ET.SubElement(root, "RectangleLabels", attributes)
    for name in classes:
        ET.SubElement(labels, "Label", value=name)
    ET.indent(root)
    return ET.tostring(root, "unicode")


def read_label_studio(uri: str) -> list[Review]:
    """Read a JSON export. A task is reviewed if it has an annotation that was not
    skipped; of several annotations the starred one counts, else the one updated last.

    A region of a reviewed task that is not an upright box with one label is a problem
    of that image, and so are several annotations that differ and whose order nothing
    tells. Tasks that nobody reviewed and that can't be read are left out.
    Raises InputError if there is no task that ``write_label_studio`` wrote, if tasks
    show each other's images, and if the boxes are shares instead of percent.
    """
    tasks = read_validated_json(EXPORT, uri, "a JSON export of Label Studio")
    reviews: list[Review] = []
    problems = []
    addresses = []
    for number, task in enumerate(tasks):
        where = f"{uri}: task {number}"
        annotations = _submitted_annotations(task)
        try:
            reviews.append(_review(task, annotations, where))
            addresses.append(str(task["data"].get("image") or ""))
        except InputError as error:
            problems.append(str(error))
            if annotations:
                addresses.append("")
                name = f"task {number}"
                reviews.append(
                    Review("", "", name, 0, 0, reviewed=True, problems=(str(error),))
                )
    if problems and not any(review.image_id for review in reviews):
        raise InputError(problems[0])
    check_shown_images(reviews, addresses, uri)
    check_units(
        reviews,
        lambda review: (review.width / 100, review.height / 100),
        f"{uri}: expected boxes in percent of the image",
    )
    return reviews


def _submitted_annotations(task: Mapping[str, Any]) -> list[JsonObject]:
    annotations = task.get("annotations") or []
    if not isinstance(annotations, list):
        return []
    return [
        annotation
        for annotation in annotations
        if isinstance(annotation, dict) and annotation.get("was_cancelled") is not True
    ]


def _review(
    task: Mapping[str, Any], annotations: Sequence[JsonObject], where: str
) -> Review:
    task_fields = task.get("data")
    if not isinstance(task_fields, dict):
        task_fields = {}
    uri, image_id = task_fields.get("uri"), task_fields.get("image_id")
    if not isinstance(uri, str) or not isinstance(image_id, str) or not image_id:
        raise InputError(
            f"{where} has no data.uri and data.image_id: only tasks that coin_ray wrote"
            " can be read back"
        )
    width, height = task_fields.get("width"), task_fields.get("height")
    if not {"width", "height"} <= task_fields.keys():
        width, height = image_size(uri)
    if (
        not isinstance(width, int)
        or not isinstance(height, int)
        or min(width, height) < 1
    ):
        raise InputError(f"{where}: {uri} is no image that can be read")
    final, change = _final_annotation(annotations, where)
    listed = _listed_predictions(task) if final is None else _regions_of(final, where)
    regions = read_regions(
        _group_by_id(listed), lambda parts: _box(parts, (width, height), where)
    )
    changes = (change, *regions.changes) if change else regions.changes
    return Review(
        image_id,
        uri,
        str(task_fields.get("name") or uri.rpartition("/")[2]),
        width,
        height,
        regions.boxes,
        bool(annotations),
        regions.problems,
        changes,
    )


def _final_annotation(
    annotations: Sequence[JsonObject], where: str
) -> tuple[JsonObject | None, str]:
    """Return the annotation that counts and, if others differ from it, a sentence that
    says so: the starred one ("ground truth"), else the one updated last.

    Raises InputError if several could be the last one and differ, and if it is unclear
    whether one was skipped.
    """
    marks = [annotation.get("was_cancelled") for annotation in annotations]
    if any(mark not in (None, False) for mark in marks):
        raise InputError(f"{where}: expected was_cancelled true or false, got {marks}")
    starred = [a for a in annotations if a.get("ground_truth") is True]
    candidates = starred or list(annotations)
    if not candidates:
        return None, ""
    times = [_time_of_update(annotation) for annotation in candidates]
    latest = max(times)
    last = [a for a, time in zip(candidates, times, strict=True) if time == latest]
    if len(candidates) > 1 and datetime.min.replace(tzinfo=UTC) in times:
        last = candidates
    if any(annotation.get("result") != last[0].get("result") for annotation in last):
        raise InputError(
            f"{where}: expected one annotation, or a different updated_at in each; got"
            f" {len(last)} that differ and may all be the last: star one of them in"
            " Label Studio, or delete the others"
        )
    change = ""
    if any(a.get("result") != last[0].get("result") for a in annotations):
        reason = "starred one" if starred else "one updated last"
        change = f"{where}: of {len(annotations)} annotations the {reason} counts"
    return last[0], change


def _time_of_update(annotation: Mapping[str, Any]) -> datetime:
    """Return when an annotation was changed; the earliest time if it does not say."""
    text = str(annotation.get("updated_at") or annotation.get("created_at") or "")
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return datetime.min.replace(tzinfo=UTC)
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _regions_of(annotation: Mapping[str, Any], where: str) -> list[JsonObject]:
    regions = annotation.get("result")
    if not isinstance(regions, list) or not all(
        isinstance(region, dict) for region in regions
    ):
        raise InputError(
            f"{where}: expected an annotation with a list of regions as its"
            f" 'result', got {str(regions)[:100]}"
        )
    return regions


def _listed_predictions(task: Mapping[str, Any]) -> list[JsonObject]:
    """Return the regions of the last prediction of a task that nobody reviewed."""
    # Label Studio exports some predictions as a number
    predictions = task.get("predictions") or []
    results = [p.get("result") for p in predictions if isinstance(p, dict)]
    regions = results[-1] if results else []
    if not isinstance(regions, list):
        return []
    return [region for region in regions if isinstance(region, dict)]


def _group_by_id(regions: Sequence[JsonObject]) -> list[list[JsonObject]]:
    """Return the placed regions, each with its parts: Label Studio exports a place, its
    label and its attributes as entries of one id. Entries of the types that have no
    place are left out; of any other type the place may have been lost.
    """
    parts_by_id: dict[object, list[JsonObject]] = {}
    for number, region in enumerate(regions):
        key = str(region["id"]) if region.get("id") else number
        parts_by_id.setdefault(key, []).append(region)
    return [
        parts
        for parts in parts_by_id.values()
        if any(_is_placed(r) or str(r.get("type")) not in WITHOUT_PLACE for r in parts)
    ]


def _is_placed(region: Mapping[str, Any]) -> bool:
    """Tell whether an entry lies somewhere in the image."""
    value = region.get("value")
    return isinstance(value, dict) and bool(PLACES & value.keys())


def _box(
    parts: Sequence[Mapping[str, Any]], size: tuple[int, int], where: str
) -> tuple[ReviewedBox, str]:
    """Read the entries of one region; return the box and what was changed."""
    placed = [region for region in parts if _is_placed(region)] or list(parts)
    value = placed[0].get("value")
    labels = _labels_of(parts)
    is_one_place = all(_place_of(region) == _place_of(placed[0]) for region in placed)
    is_clear = is_one_place and len(labels) == 1
    if not isinstance(value, dict) or not _is_box(value) or not is_clear:
        raise InputError(
            f"{where}: expected an upright box with one label, got"
            f" {placed[0].get('type')} {str(value)[:200]}"
        )
    _check_frame(placed[0], size, where)
    width, height = size
    x1, y1 = value["x"] * width / 100, value["y"] * height / 100
    x2 = x1 + value["width"] * width / 100
    y2 = y1 + value["height"] * height / 100
    try:
        edges, change = make_upright(
            (x1, y1, x2, y2), value.get("rotation") or 0.0, (x1, y1)
        )
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    kind, teacher_labels = _parse_meta(_meta_text(parts))
    box = ReviewedBox(edges, labels[0], kind, teacher_labels)
    return box, change and f"{where}: {change}"


def _place_of(region: Mapping[str, Any]) -> list[object]:
    """Return where an entry lies, to compare it with the others of its id."""
    value = region.get("value") or {}
    return [value.get(part) for part in (*BOX_PARTS, "rotation")]


def _labels_of(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the different labels of a region's entries."""
    labels: list[str] = []
    for region in parts:
        value = region.get("value")
        for name in LABELS:
            listed = value.get(name) if isinstance(value, dict) else None
            if isinstance(listed, list):
                labels += [str(label) for label in listed]
    return list(dict.fromkeys(labels))


def _is_box(value: Mapping[str, Any]) -> bool:
    if (PLACES - set(BOX_PARTS)) & value.keys():
        return False
    numbers = [value.get(part) for part in BOX_PARTS] + [value.get("rotation") or 0]
    return all(
        isinstance(number, (int, float)) and math.isfinite(number) for number in numbers
    )


def _check_frame(region: Mapping[str, Any], size: tuple[int, int], where: str) -> None:
    """Raise InputError for a region that was drawn on a turned image, or on one of
    another shape: its percentages are of that one.
    """
    turn = region.get("image_rotation") or 0
    if turn:
        raise InputError(
            f"{where}: the image was turned by {turn} degrees in Label Studio: turn it"
            " back and draw its boxes upright"
        )
    width, height = region.get("original_width"), region.get("original_height")
    if not isinstance(width, (int, float)) or not isinstance(height, (int, float)):
        return
    if min(width, height) <= 0:
        return
    ratio = (width / height) / (size[0] / size[1])
    # a small copy of the image has rounded sides
    tolerance = SHAPE_TOLERANCE + 1 / min(width, height)
    if abs(ratio - 1) > tolerance:
        raise InputError(
            f"{where}: the box was drawn on an image of {width} x {height}, the run's is"
            f" {size[0]} x {size[1]}: is the URL that of another or a turned image?"
        )


def _meta_text(parts: Sequence[Mapping[str, Any]]) -> object:
    for region in parts:
        meta = region.get("meta")
        if isinstance(meta, dict) and meta.get("text"):
            return meta["text"]
    return None


def _parse_meta(text: object) -> tuple[str, str]:
    """Return the kind and the teachers' labels; both empty if a person has drawn the
    box or rewritten its text.
    """
    if isinstance(text, list) and text:
        text = text[0]
    if not isinstance(text, str):
        return "", ""
    kind, separator, teacher_labels = text.partition(": ")
    return (kind, teacher_labels) if separator and kind in KINDS else ("", "")
