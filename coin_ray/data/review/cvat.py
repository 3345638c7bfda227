"""CVAT: "CVAT for images 1.1", annotations and their attributes in one XML file.

A box has the attributes ``kind`` and ``teachers``. A tag ``review`` on each image
carries its id, counts of the kinds and the disagreement; whoever has reviewed an image
ticks its ``reviewed``.
"""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Sequence
from typing import Any

from coin_ray import storage
from coin_ray.data.formats.parsing import format_number, parse_number
from coin_ray.data.formats.xml import parse_xml
from coin_ray.data.review.reviews import KINDS, Review, ReviewedBox
from coin_ray.data.threads import map_in_threads
from coin_ray.errors import InputError

FILE = "annotations.xml"
TAG = "review"
BY_HAND = "by hand"
"""The kind of a box that a person drew."""
EDGES = ("xtl", "ytl", "xbr", "ybr")
SHAPES = ("polygon", "polyline", "points", "cuboid", "mask", "skeleton", "ellipse")


def write_cvat(reviews: Sequence[Review], folder: str, classes: Sequence[str]) -> None:
    """Write ``images/`` for a new task, ``labels.json`` for its label constructor (Raw),
    and ``annotations.xml`` to upload to the task.
    """
    if TAG in classes:
        raise InputError(
            f"CVAT gets a tag of the name {TAG!r}, so no class can have it"
        )

    def copy_image(review: Review) -> None:
        target = storage.join(folder, "images", review.name)
        storage.write_bytes(target, storage.read_bytes(review.uri))

    map_in_threads(copy_image, reviews)
    storage.write_json(storage.join(folder, "labels.json"), cvat_labels(classes))
    storage.write_bytes(storage.join(folder, FILE), cvat_xml(reviews))


def cvat_labels(classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return the labels that CVAT's label constructor imports."""
    text_names = ("image_id", "uri", *KINDS, "disagreement")
    texts = [_attribute(name, "text", "", [""]) for name in text_names]
    reviewed = _attribute("reviewed", "checkbox", "false", ["false"])
    box_attributes = [
        _attribute("kind", "select", BY_HAND, [BY_HAND, *KINDS]),
        _attribute("teachers", "text", "", [""]),
    ]
    labels: list[dict[str, Any]] = [
        {"name": TAG, "type": "tag", "attributes": [reviewed, *texts]}
    ]
    for name in classes:
        labels.append({"name": name, "type": "rectangle", "attributes": box_attributes})
    return labels


def _attribute(
    name: str, kind: str, default: str, choices: list[str]
) -> dict[str, Any]:
    return {
        "name": name,
        "mutable": False,
        "input_type": kind,
        "default_value": default,
        "values": choices,
    }


def cvat_xml(reviews: Sequence[Review]) -> bytes:
    """Return the reviews as the content of ``annotations.xml``."""
    root = ET.Element("annotations")
    ET.SubElement(root, "version").text = "1.1"
    for number, review in enumerate(reviews):
        _add_image(root, number, review)
    ET.indent(root)
    return bytes(ET.tostring(root, "utf-8", xml_declaration=True))


def _add_image(root: ET.Element, number: int, review: Review) -> None:
    image = ET.SubElement(
        root,
        "image",
        id=str(number),
        name=review.name,
        width=str(review.width),
        height=str(review.height),
    )
    for box in review.boxes:
        edges = zip(EDGES, map(format_number, box.edges), strict=True)
        attributes = {"label": box.label, "source": "auto", "occluded": "0"}
        attributes |= {**dict(edges), "z_order": "0"}
        node = ET.SubElement(image, "box", attributes)
        kind = box.kind or BY_HAND
        _add_attributes(node, {"kind": kind, "teachers": box.teacher_labels})
    tag = ET.SubElement(image, "tag", label=TAG, source="auto")
    counts = {kind: str(count) for kind, count in review.counts.items()}
    tag_attributes = {
        "reviewed": str(review.reviewed).lower(),
        "image_id": review.image_id,
        "uri": review.uri,
        **counts,
        "disagreement": format_number(review.disagreement),
    }
    _add_attributes(tag, tag_attributes)


def _add_attributes(node: ET.Element, attributes: dict[str, str]) -> None:
    for name, text in attributes.items():
        ET.SubElement(node, "attribute", name=name).text = text


def read_cvat(uri: str) -> list[Review]:
    """Read an export as it comes (.zip) or its ``annotations.xml``; images without the
    tag of ``write_cvat`` are left out.

    Raises InputError naming the line of a shape that is not an upright box, and if no
    image has the tag.
    """
    root, lines = parse_xml(_read_xml(uri), uri, "annotations")
    optional_reviews = [_review(image, uri, lines) for image in root.iterfind("image")]
    reviews = [review for review in optional_reviews if review is not None]
    if not reviews:
        raise InputError(
            f"{uri}: no image has the tag {TAG!r} with its image_id: only what coin_ray"
            " wrote for CVAT can be read back"
        )
    return reviews


def _read_xml(uri: str) -> bytes:
    raw = storage.read_bytes(uri)
    if not zipfile.is_zipfile(io.BytesIO(raw)):
        return raw
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        if FILE not in archive.namelist():
            raise InputError(
                f"{uri} has no {FILE}: export the task as 'CVAT for images 1.1'"
            )
        return archive.read(FILE)


def _review(image: ET.Element, uri: str, lines: dict[ET.Element, int]) -> Review | None:
    tag = _review_tag(image)
    if tag is None:
        return None
    for shape in SHAPES:
        for node in image.iterfind(shape):
            raise InputError(
                f"{uri}:{lines[node]}: expected boxes, got a {shape} of"
                f" {node.get('label')!r}"
            )
    where = f"{uri}:{lines[image]}"
    width = int(parse_number(image.get("width"), f"{where}: width"))
    height = int(parse_number(image.get("height"), f"{where}: height"))
    return Review(
        tag["image_id"],
        tag.get("uri", ""),
        image.get("name", ""),
        width,
        height,
        tuple(_box(node, f"{uri}:{lines[node]}") for node in image.iterfind("box")),
        tag.get("reviewed") == "true",
    )


def _review_tag(image: ET.Element) -> dict[str, str] | None:
    """Return the attributes of the image's review tag; None if it has none."""
    for tag in image.iterfind("tag"):
        attributes = _attributes(tag)
        if tag.get("label") == TAG and attributes.get("image_id"):
            return attributes
    return None


def _attributes(node: ET.Element) -> dict[str, str]:
    return {a.get("name", ""): a.text or "" for a in node.iterfind("attribute")}


def _box(node: ET.Element, where: str) -> ReviewedBox:
    rotation = node.get("rotation", "0")
    if parse_number(rotation, f"{where}: rotation") % 360:
        raise InputError(
            f"{where}: expected an upright box, got one turned by {rotation} degrees"
        )
    x1, y1, x2, y2 = (
        parse_number(node.get(edge), f"{where}: {edge}") for edge in EDGES
    )
    attributes = _attributes(node)
    kind = attributes.get("kind", "")
    return ReviewedBox(
        (x1, y1, x2, y2),
        node.get("label", ""),
        kind if kind in KINDS else "",
        attributes.get("teachers", ""),
    )
