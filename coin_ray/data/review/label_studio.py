"""Label Studio: tasks with predictions to import, and JSON exports. Boxes are in
percent of the image (Label Studio's "task format").

A box's kind and what the teachers said stand in its ``meta``; a task's ``data`` counts
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
from coin_ray.data.formats.record import image_size, read_validated_json
from coin_ray.data.review.record import KINDS, Review, ReviewedBox
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
    """``tasks.json`` to import and ``labels.xml``, the labelling setup. ``url``: where
    Label Studio finds an image, from its ``{uri}``.
    """
    storage.write_bytes(
        storage.join(folder, "tasks.json"),
        json.dumps([label_studio_task(r, url) for r in reviews], indent=1).encode(),
    )
    storage.write_bytes(
        storage.join(folder, "labels.xml"), labelling_setup(classes).encode()
    )


def label_studio_task(review: Review, url: str = "{uri}") -> dict[str, Any]:
    """A prediction's score is the share of boxes that the teachers agree on: sorted by
    it, the images in dispute come first.
    """
    result = [_region(number, review, box) for number, box in enumerate(review.boxes)]
    known = {
        "image_id": review.image_id,
        "uri": review.uri,
        "name": review.name,
        "width": review.width,
        "height": review.height,
    }
    data = (
        known
        | {
            "image": url.replace("{uri}", review.uri),
            "disagreement": review.disagreement,
        }
        | review.counts
    )
    if review.reviewed:
        return {
            "data": data,
            "annotations": [{"result": result, "was_cancelled": False}],
        }
    return {
        "data": data,
        "predictions": [
            {
                "model_version": "coin_ray",
                "score": 1 - review.disagreement,
                "result": result,
            }
        ],
    }


def _region(number: int, review: Review, box: ReviewedBox) -> dict[str, Any]:
    width, height = review.width, review.height
    left, top, right, bottom = box.edges
    value = {
        "x": left / width,
        "y": top / height,
        "width": (right - left) / width,
        "height": (bottom - top) / height,
    }
    region = {
        "id": f"box{number}",
        "type": "rectanglelabels",
        "from_name": "label",
        "to_name": "image",
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
        "value": (
            {k: 100 * v for k, v in value.items()}
            | {"rotation": 0, "rectanglelabels": [box.label]}
        ),
    }
    return region | (
        {"meta": {"text": [f"{box.kind}: {box.said}"]}} if box.kind else {}
    )


def labelling_setup(classes: Sequence[str]) -> str:
    """The XML that Label Studio asks for under "Labeling Interface"."""
    root = ET.Element("View")
    ET.SubElement(root, "Image", name="image", value="$image", zoom="true")
    labels = ET.SubElement(root, "RectangleLabels", name="label", toName="image")
    for name in classes:
        ET.SubElement(labels, "Label", value=name)
    ET.indent(root)
    return ET.tostring(root, "unicode")


def read_label_studio(uri: str) -> list[Review]:
    """A JSON export. Reviewed is what has an annotation that was not skipped: of
    several the one updated last.

    Raises InputError naming the task for what is no upright box, and for tasks that
    were not written by ``write_label_studio``.
    """
    exported: list[_Task] = read_validated_json(
        EXPORT, uri, "a JSON export of Label Studio"
    )
    return [
        _review(label_studio_task, f"{uri}: task {number}")
        for number, label_studio_task in enumerate(exported)
    ]


def _review(found: _Task, where: str) -> Review:
    data = found.data
    uri, image_id = data.get("uri"), data.get("image_id")
    if not isinstance(uri, str) or not isinstance(image_id, str):
        raise InputError(
            f"{where} has no data.uri and data.image_id: only tasks that coin_ray wrote"
            " can be read back"
        )
    width, height = (
        (data["width"], data["height"])
        if {"width", "height"} <= data.keys()
        else image_size(uri)
    )
    if (
        not isinstance(width, int)
        or not isinstance(height, int)
        or min(width, height) < 1
    ):
        raise InputError(f"{where}: {uri} is no image that can be read")
    done = [a for a in found.annotations if not a.was_cancelled]
    predicted = [p for p in found.predictions if isinstance(p, _Result)]
    kept = (
        max(done, key=lambda a: a.updated_at)
        if done
        else predicted[-1]
        if predicted
        else _Result([])
    )
    boxes = tuple(
        _box(region, (width, height), where)
        for region in kept.result
        if region.type == "rectanglelabels"
    )
    return Review(
        image_id,
        uri,
        str(data.get("name") or uri.rpartition("/")[2]),
        width,
        height,
        boxes,
        bool(done),
    )


def _box(region: _Region, size: tuple[int, int], where: str) -> ReviewedBox:
    value = region.value
    if (
        isinstance(value, dict)
        or len(value.rectanglelabels) != 1
        or value.rotation % 360
    ):
        raise InputError(
            f"{where}: expected an upright box with one label, got {value}"
        )
    left, top = value.x * size[0] / 100, value.y * size[1] / 100
    right, bottom = (
        left + value.width * size[0] / 100,
        top + value.height * size[1] / 100,
    )
    kind, said = _told(region.meta.get("text"))
    return ReviewedBox((left, top, right, bottom), value.rectanglelabels[0], kind, said)


def _told(text: object) -> tuple[str, str]:
    """Kind and what the teachers said; both empty if a person has drawn the box or
    rewritten its text.
    """
    first = text[0] if isinstance(text, list) and text else text
    kind, colon, said = (
        first.partition(": ") if isinstance(first, str) else ("", "", "")
    )
    return (kind, said) if colon and kind in KINDS else ("", "")
