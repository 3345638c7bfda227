"""PASCAL VOC: ``Annotations/*.xml``, ``JPEGImages/``, image lists in
``ImageSets/Main/*.txt``.

VOC counts pixels from 1 and names the first and the last one inside: edges are xmin -
1, ymin - 1, xmax, ymax (VOC devkit, where a box is xmax - xmin + 1 wide). Reading takes
that 1 off, writing adds it.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence

from coin_ray import storage
from coin_ray.data.formats.record import (
    IMAGE_SUFFIXES,
    Annotation,
    Dataset,
    DatasetFolder,
    ImageRecord,
    collect_class_names,
    format_number,
    image_size,
    map_in_threads,
    parse_number,
    strip_suffix,
)
from coin_ray.data.formats.xml import parse_xml
from coin_ray.errors import InputError

DIFFICULT = {
    "": False,
    "0": False,
    "false": False,
    "unspecified": False,
    "1": True,
    "true": True,
}


def is_voc(place: DatasetFolder) -> bool:
    return bool(place.folder("JPEGImages")) and bool(place.folder("Annotations"))


def read_voc(place: DatasetFolder) -> Dataset:
    """Images without XML are not annotated. Raises InputError naming file and line."""
    images, labels = (
        place.stems("JPEGImages", *IMAGE_SUFFIXES),
        place.stems("Annotations", ".xml"),
    )
    lists = place.stems("ImageSets/Main", ".txt") if place.split else {}
    chosen = [
        name
        for path in place.choose(lists, "list ImageSets/Main/*.txt")
        for name in place.listed(path, images)
    ]
    wanted = (
        dict.fromkeys(chosen)
        if place.split
        else dict.fromkeys(sorted(images.keys() | labels.keys()))
    )
    present = [name for name in wanted if name in images]

    def record(name: str) -> ImageRecord:
        file, uri = images[name].removeprefix("JPEGImages/"), place.uris[images[name]]
        if name not in labels:
            return ImageRecord.of(file, uri, image_size(uri), [], annotated=False)
        return _annotated(file, uri, place.uris[labels[name]])

    records = tuple(map_in_threads(record, present))
    return Dataset(
        "voc",
        records,
        collect_class_names(records),
        tuple(f"JPEGImages/{name}" for name in wanted if name not in images),
    )


def _annotated(file: str, uri: str, label_uri: str) -> ImageRecord:
    root, lines = parse_xml(storage.read_bytes(label_uri), label_uri, "annotation")
    found = [
        _object(node, f"{label_uri}:{lines[node]}") for node in root.iterfind("object")
    ]
    sides = [root.findtext(f"size/{side}", "0") for side in ("width", "height")]
    width, height = (int(parse_number(text, f"{label_uri}: size")) for text in sides)
    return ImageRecord.of(
        file, uri, (width, height) if width and height else image_size(uri), found
    )


def _object(node: ET.Element, where: str) -> Annotation:
    label = (node.findtext("name") or "").strip()
    if not label:
        raise InputError(f"{where}: an object without <name>")
    left, top, right, bottom = (
        parse_number(node.findtext(f"bndbox/{edge}"), f"{where}: <{edge}>")
        for edge in ("xmin", "ymin", "xmax", "ymax")
    )
    difficult = (node.findtext("difficult") or "").strip().lower()
    if difficult not in DIFFICULT:
        raise InputError(f"{where}: <difficult> must be 0 or 1, got {difficult!r}")
    return Annotation((left - 1, top - 1, right, bottom), label, DIFFICULT[difficult])


def write_voc(records: Sequence[ImageRecord], root: str, split: str) -> None:
    for record in records:
        if record.annotated:
            storage.write_bytes(
                storage.join(root, "Annotations", f"{strip_suffix(record.file)}.xml"),
                _xml(record),
            )
    storage.write_bytes(
        storage.join(root, "ImageSets/Main", f"{split}.txt"),
        "".join(f"{strip_suffix(r.file)}\n" for r in records).encode(),
    )


def _xml(record: ImageRecord) -> bytes:
    root = ET.Element("annotation")
    _leaf(root, "filename", record.file)
    size = ET.SubElement(root, "size")
    for side, value in (
        ("width", record.width),
        ("height", record.height),
        ("depth", 3),
    ):
        _leaf(size, side, str(value))
    for (left, top, right, bottom), label, difficult in zip(
        record.boxes.tolist(), record.labels, record.difficult, strict=True
    ):
        node = ET.SubElement(root, "object")
        _leaf(node, "name", label)
        _leaf(node, "difficult", str(int(difficult)))
        box = ET.SubElement(node, "bndbox")
        for edge, value in (
            ("xmin", left + 1),
            ("ymin", top + 1),
            ("xmax", right),
            ("ymax", bottom),
        ):
            _leaf(box, edge, format_number(value))
    ET.indent(root)
    return bytes(ET.tostring(root, "utf-8"))


def _leaf(parent: ET.Element, tag: str, text: str) -> None:
    ET.SubElement(parent, tag).text = text
