"""CVAT: "CVAT for images 1.1", annotations and their attributes in one XML file.

A box has the attributes ``kind`` and ``teachers``. A tag ``review`` on each image
carries its id, counts of the kinds and the disagreement; whoever has reviewed an image
ticks its ``reviewed``.
"""

from __future__ import annotations

import io
import unicodedata
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Sequence
from typing import Any

from coin_ray import storage
from coin_ray.data.formats.parsing import format_number, parse_number
from coin_ray.data.formats.xml import parse_xml
from coin_ray.data.review.regions import check_units, make_upright, read_regions
from coin_ray.data.review.reviews import KINDS, Review, ReviewedBox
from coin_ray.data.threads import map_in_threads
from coin_ray.errors import InputError

FILE = "annotations.xml"
TAG = "review"
BY_HAND = "by hand"
"""The kind of a box that a person drew."""
EDGES = ("xtl", "ytl", "xbr", "ybr")


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
    storage.write_bytes(storage.join(folder, FILE), cvat_xml(reviews, classes))


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


def cvat_xml(reviews: Sequence[Review], classes: Sequence[str] = ()) -> bytes:
    """Return the reviews as the content of ``annotations.xml``.

    Images are sorted by name, as CVAT sorts the frames of a task: where CVAT does not
    know a name it takes the image's ``id`` for the number of the frame. ``classes``
    are listed in the head; other labels of the boxes follow.
    """
    root = ET.Element("annotations")
    ET.SubElement(root, "version").text = "1.1"
    box_labels = {box.label for review in reviews for box in review.boxes}
    labels = [*classes, *sorted(box_labels.difference(classes))]
    _add_head(root, len(reviews), labels)
    for number, review in enumerate(sorted(reviews, key=lambda review: review.name)):
        _add_image(root, number, review)
    ET.indent(root)
    return bytes(ET.tostring(root, "utf-8", xml_declaration=True))


def _add_head(root: ET.Element, image_count: int, classes: Sequence[str]) -> None:
    """Add ``<meta>``, without which CVAT and datumaro refuse the file in a project."""
    task = ET.SubElement(ET.SubElement(root, "meta"), "task")
    ET.SubElement(task, "name").text = "coin_ray review"
    ET.SubElement(task, "size").text = str(image_count)
    ET.SubElement(task, "mode").text = "annotation"
    ET.SubElement(task, "start_frame").text = "0"
    ET.SubElement(task, "stop_frame").text = str(max(image_count - 1, 0))
    labels = ET.SubElement(task, "labels")
    for description in cvat_labels(classes):
        label = ET.SubElement(labels, "label")
        ET.SubElement(label, "name").text = description["name"]
        ET.SubElement(label, "type").text = description["type"]
        attributes = ET.SubElement(label, "attributes")
        for attribute in description["attributes"]:
            node = ET.SubElement(attributes, "attribute")
            ET.SubElement(node, "name").text = attribute["name"]
            ET.SubElement(node, "mutable").text = str(attribute["mutable"])
            ET.SubElement(node, "input_type").text = attribute["input_type"]
            ET.SubElement(node, "default_value").text = attribute["default_value"]
            ET.SubElement(node, "values").text = "\n".join(attribute["values"])


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

    A shape of a reviewed image that is not an upright box is a problem of that image.
    Raises InputError if no image has the tag, if a reviewed image's name is not that of
    its ``uri``: then CVAT has put the labels on other images, and if the boxes are
    shares instead of pixels.
    """
    root, lines = parse_xml(_read_xml(uri), uri, "annotations")
    optional_reviews = [_review(image, uri, lines) for image in root.iterfind("image")]
    reviews = [review for review in optional_reviews if review is not None]
    if not any(review.image_id for review in reviews):
        raise InputError(
            f"{uri}: no image has the tag {TAG!r} with its image_id: only what coin_ray"
            " wrote for CVAT can be read back"
        )
    check_units(reviews, lambda _: (1, 1), f"{uri}: expected boxes in pixels")
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
    where = f"{uri}:{lines[image]}"
    tags = _review_tags(image)
    if not tags:
        return None
    tag = next((tag for tag in tags if tag.get("image_id")), tags[0])
    name, image_uri = image.get("name", ""), tag.get("uri", "")
    reviewed = any(tag.get("reviewed") == "true" for tag in tags)
    if reviewed:
        _check_name(name, image_uri, where)
    problems = []
    if not tag.get("image_id"):
        problems.append(
            f"{where}: {name} has no image_id in its tag {TAG!r}: only images that"
            " coin_ray wrote can be read back"
        )
    if len({tag["image_id"] for tag in tags if tag.get("image_id")}) > 1:
        problems.append(
            f"{where}: {name} has tags {TAG!r} of several images: leave the one whose"
            " uri ends in its name"
        )
    width = height = 0
    try:
        width = int(parse_number(image.get("width"), f"{where}: width"))
        height = int(parse_number(image.get("height"), f"{where}: height"))
    except InputError as error:
        problems.append(str(error))
    shapes = [node for node in image if node.tag != "tag"]
    regions = read_regions(shapes, lambda node: _box(node, f"{uri}:{lines[node]}"))
    return Review(
        tag.get("image_id", ""),
        image_uri,
        name,
        width,
        height,
        regions.boxes,
        reviewed,
        (*problems, *regions.problems),
        regions.changes,
    )


def _check_name(name: str, uri: str, where: str) -> None:
    """Raise InputError if the last parts of an image's name and of its URI differ."""
    names = [
        unicodedata.normalize("NFC", path.replace("\\", "/").rpartition("/")[2])
        for path in (name, uri)
    ]
    if uri and names[0] != names[1]:
        raise InputError(
            f"{where}: the image {name} carries the review of {uri}, so CVAT has put the"
            " labels on other images: make the task of the folder images/ that"
            " coin_ray wrote, with names unchanged, and upload annotations.xml again"
        )


def _review_tags(image: ET.Element) -> list[dict[str, str]]:
    """Return the attributes of the image's review tags that have an image id or are
    ticked; a second upload of the file doubles them.
    """
    tags = [_attributes(tag) for tag in image.iterfind("tag[@label='review']")]
    return [t for t in tags if t.get("image_id") or t.get("reviewed") == "true"]


def _attributes(node: ET.Element) -> dict[str, str]:
    return {a.get("name", ""): a.text or "" for a in node.iterfind("attribute")}


def _box(node: ET.Element, where: str) -> tuple[ReviewedBox, str]:
    """Read a shape; return the box and what was changed."""
    if node.tag != "box":
        raise InputError(
            f"{where}: expected boxes, got a {node.tag} of {node.get('label')!r}"
        )
    x1, y1, x2, y2 = (
        parse_number(node.get(edge), f"{where}: {edge}") for edge in EDGES
    )
    degrees = parse_number(node.get("rotation", "0"), f"{where}: rotation")
    try:
        edges, change = make_upright(
            (x1, y1, x2, y2), degrees, ((x1 + x2) / 2, (y1 + y2) / 2)
        )
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    attributes = _attributes(node)
    kind = attributes.get("kind", "")
    box = ReviewedBox(
        edges,
        node.get("label", ""),
        kind if kind in KINDS else "",
        attributes.get("teachers", ""),
    )
    return box, change and f"{where}: {change}"
