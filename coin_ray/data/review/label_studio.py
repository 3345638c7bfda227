"""Label Studio: tasks with predictions to import, and JSON exports. Boxes are in
percent of the image (Label Studio's "task format").

A box's kind and the teachers' labels stand in its ``meta``; a task's ``data`` counts
the kinds, and can be sorted and filtered by them.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from coin_ray import storage
from coin_ray.data.formats.parsing import image_size, read_validated_json
from coin_ray.data.review.reviews import KINDS, Review, ReviewedBox
from coin_ray.errors import InputError


@dataclass(frozen=True, slots=True)
class _Value:
    x: float
    y: float
    width: float
    height: float
    rectanglelabels: list[str]
    rotation: float = 0.0


@dataclass(frozen=True, slots=True)
class _Region:
    type: str = ""
    value: Annotated[_Value | dict[str, Any], Field(union_mode="left_to_right")] = (
        field(default_factory=dict)
    )
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Result:
    result: list[_Region]
    was_cancelled: bool = False
    updated_at: str = ""


@dataclass(frozen=True, slots=True)
class _Task:
    data: dict[str, Any]
    annotations: list[_Result] = field(default_factory=list)
    predictions: list[Annotated[_Result | int, Field(union_mode="left_to_right")]] = (
        field(default_factory=list)
    )


EXPORT = TypeAdapter(list[_Task])


def write_label_studio(
    reviews: Sequence[Review], folder: str, classes: Sequence[str], url: str = "{uri}"
) -> None:
    """Write ``tasks.json`` to import and ``labels.xml``, the labelling setup. ``url``:
    address of an image for Label Studio, made from its ``{uri}``.
    """
    tasks = [label_studio_task(review, url) for review in reviews]
    text = json.dumps(tasks, indent=1)
    storage.write_bytes(storage.join(folder, "tasks.json"), text.encode())
    setup = labelling_setup(classes)
    storage.write_bytes(storage.join(folder, "labels.xml"), setup.encode())


def label_studio_task(review: Review, url: str = "{uri}") -> dict[str, Any]:
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
        "image": url.replace("{uri}", review.uri),
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


def _region(number: int, review: Review, box: ReviewedBox) -> dict[str, Any]:
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
    labels = ET.SubElement(root, "RectangleLabels", name="label", toName="image")
    for name in classes:
        ET.SubElement(labels, "Label", value=name)
    ET.indent(root)
    return ET.tostring(root, "unicode")


def read_label_studio(uri: str) -> list[Review]:
    """Read a JSON export. A task is reviewed if it has an annotation that was not
    skipped; of several annotations the one updated last counts.

    Raises InputError naming the task for a region that is not an upright box, and for
    tasks that were not written by ``write_label_studio``.
    """
    tasks: list[_Task] = read_validated_json(
        EXPORT, uri, "a JSON export of Label Studio"
    )
    return [_review(task, f"{uri}: task {number}") for number, task in enumerate(tasks)]


def _review(task: _Task, where: str) -> Review:
    uri, image_id = task.data.get("uri"), task.data.get("image_id")
    if not isinstance(uri, str) or not isinstance(image_id, str):
        raise InputError(
            f"{where} has no data.uri and data.image_id: only tasks that coin_ray wrote"
            " can be read back"
        )
    width, height = task.data.get("width"), task.data.get("height")
    if not {"width", "height"} <= task.data.keys():
        width, height = image_size(uri)
    if (
        not isinstance(width, int)
        or not isinstance(height, int)
        or min(width, height) < 1
    ):
        raise InputError(f"{where}: {uri} is no image that can be read")
    annotations = [a for a in task.annotations if not a.was_cancelled]
    boxes = [
        _box(region, (width, height), where)
        for region in _final_regions(task, annotations)
        if region.type == "rectanglelabels"
    ]
    return Review(
        image_id,
        uri,
        str(task.data.get("name") or uri.rpartition("/")[2]),
        width,
        height,
        tuple(boxes),
        bool(annotations),
    )


def _final_regions(task: _Task, annotations: Sequence[_Result]) -> list[_Region]:
    """Return the regions of the annotation updated last, or of the last prediction."""
    if annotations:
        return max(annotations, key=lambda annotation: annotation.updated_at).result
    # Label Studio exports some predictions as a number
    predictions = [p for p in task.predictions if isinstance(p, _Result)]
    return predictions[-1].result if predictions else []


def _box(region: _Region, size: tuple[int, int], where: str) -> ReviewedBox:
    rectangle = region.value
    if (
        isinstance(rectangle, dict)
        or len(rectangle.rectanglelabels) != 1
        or rectangle.rotation % 360
    ):
        raise InputError(
            f"{where}: expected an upright box with one label, got {rectangle}"
        )
    width, height = size
    x1, y1 = rectangle.x * width / 100, rectangle.y * height / 100
    x2 = x1 + rectangle.width * width / 100
    y2 = y1 + rectangle.height * height / 100
    kind, teacher_labels = _parse_meta(region.meta.get("text"))
    [label] = rectangle.rectanglelabels
    return ReviewedBox((x1, y1, x2, y2), label, kind, teacher_labels)


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
