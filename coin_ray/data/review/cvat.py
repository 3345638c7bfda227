"""CVAT: "CVAT for images 1.1", annotations and their attributes in one XML file.

A box has the attributes ``kind`` and ``teachers``. A tag ``review`` on each image
carries its id, counts of the kinds and the disagreement; whoever has looked at an image
ticks its ``reviewed``.
"""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Sequence
from typing import Any

from coin_ray import storage
from coin_ray.data.formats.record import format_number, map_in_threads, parse_number
from coin_ray.data.formats.xml import parse_xml
from coin_ray.data.review.record import KINDS, Review, ReviewedBox
from coin_ray.errors import InputError

FILE = "annotations.xml"
TAG = "review"
BY_HAND = "by hand"
"""The kind of a box that a person drew."""
EDGES = ("xtl", "ytl", "xbr", "ybr")
SHAPES = ("polygon", "polyline", "points", "cuboid", "mask", "skeleton", "ellipse")


def write_cvat(reviews: Sequence[Review], folder: str, classes: Sequence[str]) -> None:
    """``images/`` to make a task of, ``labels.json`` for its constructor (Raw), and
    ``annotations.xml`` to upload to it.
    """
    if TAG in classes:
        raise InputError(
            f"CVAT gets a tag of the name {TAG!r}, so no class can have it"
        )
    map_in_threads(
        lambda r: storage.write_bytes(
            storage.join(folder, "images", r.name), storage.read_bytes(r.uri)
        ),
        reviews,
    )
    storage.write_json(storage.join(folder, "labels.json"), cvat_labels(classes))
    storage.write_bytes(storage.join(folder, FILE), cvat_xml(reviews))


def cvat_labels(classes: Sequence[str]) -> list[dict[str, Any]]:
    """What CVAT's label constructor takes."""
    texts = [
        _attribute(name, "text", "", [""])
        for name in ("image_id", "uri", *KINDS, "disagreement")
    ]
    tag = {
        "name": TAG,
        "type": "tag",
        "attributes": [_attribute("reviewed", "checkbox", "false", ["false"]), *texts],
    }
    told = [
        _attribute("kind", "select", BY_HAND, [BY_HAND, *KINDS]),
        _attribute("teachers", "text", "", [""]),
    ]
    return [
        tag,
        *({"name": name, "type": "rectangle", "attributes": told} for name in classes),
    ]


def _attribute(name: str, kind: str, default: str, values: list[str]) -> dict[str, Any]:
    return {
        "name": name,
        "mutable": False,
        "input_type": kind,
        "default_value": default,
        "values": values,
    }


def cvat_xml(reviews: Sequence[Review]) -> bytes:
    root = ET.Element("annotations")
    ET.SubElement(root, "version").text = "1.1"
    for place, review in enumerate(reviews):
        image = ET.SubElement(
            root,
            "image",
            id=str(place),
            name=review.name,
            width=str(review.width),
            height=str(review.height),
        )
        for box in review.boxes:
            edges = {
                name: format_number(value)
                for name, value in zip(EDGES, box.edges, strict=True)
            }
            node = ET.SubElement(
                image,
                "box",
                {
                    "label": box.label,
                    "source": "auto",
                    "occluded": "0",
                    **edges,
                    "z_order": "0",
                },
            )
            _set(node, {"kind": box.kind or BY_HAND, "teachers": box.said})
        known = {
            "reviewed": str(review.reviewed).lower(),
            "image_id": review.image_id,
            "uri": review.uri,
        }
        counted = {kind: str(count) for kind, count in review.counts.items()}
        _set(
            ET.SubElement(image, "tag", label=TAG, source="auto"),
            known | counted | {"disagreement": format_number(review.disagreement)},
        )
    ET.indent(root)
    return bytes(ET.tostring(root, "utf-8", xml_declaration=True))


def _set(node: ET.Element, values: dict[str, str]) -> None:
    for name, value in values.items():
        ET.SubElement(node, "attribute", name=name).text = value


def read_cvat(uri: str) -> list[Review]:
    """An export as it comes (.zip) or its ``annotations.xml``; images without the tag
    that ``write_cvat`` gave them are left out.

    Raises InputError naming the line for what is no upright box, and if no image has
    the tag.
    """
    root, lines = parse_xml(_xml(uri), uri, "annotations")
    found = [
        r
        for image in root.iterfind("image")
        if (r := _review(image, uri, lines)) is not None
    ]
    if not found:
        raise InputError(
            f"{uri}: no image has the tag {TAG!r} with its image_id: only what coin_ray"
            " wrote for CVAT can be read back"
        )
    return found


def _xml(uri: str) -> bytes:
    data = storage.read_bytes(uri)
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return data
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if FILE not in archive.namelist():
            raise InputError(
                f"{uri} has no {FILE}: export the task as 'CVAT for images 1.1'"
            )
        return archive.read(FILE)


def _review(image: ET.Element, uri: str, lines: dict[ET.Element, int]) -> Review | None:
    where = f"{uri}:{lines[image]}"
    tag = next(
        (
            t
            for t in image.iterfind("tag")
            if t.get("label") == TAG and _attributes(t).get("image_id")
        ),
        None,
    )
    if tag is None:
        return None
    known = _attributes(tag)
    other = next((node for shape in SHAPES for node in image.iterfind(shape)), None)
    if other is not None:
        raise InputError(
            f"{uri}:{lines[other]}: expected boxes, got a {other.tag} of"
            f" {other.get('label')!r}"
        )
    width, height = (
        int(parse_number(image.get(side), f"{where}: {side}"))
        for side in ("width", "height")
    )
    boxes = tuple(_box(node, f"{uri}:{lines[node]}") for node in image.iterfind("box"))
    return Review(
        known["image_id"],
        known.get("uri", ""),
        image.get("name", ""),
        width,
        height,
        boxes,
        known.get("reviewed") == "true",
    )


def _attributes(node: ET.Element) -> dict[str, str]:
    return {a.get("name", ""): a.text or "" for a in node.iterfind("attribute")}


def _box(node: ET.Element, where: str) -> ReviewedBox:
    if parse_number(node.get("rotation", "0"), f"{where}: rotation") % 360:
        raise InputError(
            f"{where}: expected an upright box, got one turned by"
            f" {node.get('rotation')} degrees"
        )
    left, top, right, bottom = (
        parse_number(node.get(edge), f"{where}: {edge}") for edge in EDGES
    )
    told = _attributes(node)
    kind = told.get("kind", "")
    return ReviewedBox(
        (left, top, right, bottom),
        node.get("label", ""),
        kind if kind in KINDS else "",
        told.get("teachers", ""),
    )
