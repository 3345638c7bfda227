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
from coin_ray.data.formats.folder import IMAGE_SUFFIXES, DatasetFolder, strip_suffix
from coin_ray.data.formats.parsing import format_number, image_size, parse_number
from coin_ray.data.formats.record import (
    Annotation,
    Dataset,
    ImageRecord,
    collect_class_names,
)
from coin_ray.data.formats.xml import parse_xml
from coin_ray.data.threads import map_in_threads
from coin_ray.errors import InputError

DIFFICULT = {
    "": False,
    "0": False,
    "false": False,
    "unspecified": False,
    "1": True,
    "true": True,
}
EDGES = ("xmin", "ymin", "xmax", "ymax")


def is_voc(folder: DatasetFolder) -> bool:
    """Tell whether the folder is in the VOC format."""
    has_images = folder.first_folder("JPEGImages")
    return bool(has_images) and bool(folder.first_folder("Annotations"))


def read_voc(folder: DatasetFolder) -> Dataset:
    """Read a VOC folder. Images without XML are not annotated. Raises InputError naming
    file and line.
    """
    images = folder.paths_by_stem("JPEGImages", *IMAGE_SUFFIXES)
    labels = folder.paths_by_stem("Annotations", ".xml")
    names = sorted(images.keys() | labels.keys())
    if folder.split:
        lists = folder.paths_by_stem("ImageSets/Main", ".txt")
        paths = folder.select_split(lists, "list ImageSets/Main/*.txt")
        names = [
            name for path in paths for name in folder.read_image_list(path, images)
        ]
        names = list(dict.fromkeys(names))

    def read_record(name: str) -> ImageRecord:
        file = images[name].removeprefix("JPEGImages/")
        uri = folder.uris[images[name]]
        if name in labels:
            return _read_annotated(file, uri, folder.uris[labels[name]])
        return ImageRecord.from_annotations(
            file, uri, image_size(uri), [], annotated=False
        )

    present = [name for name in names if name in images]
    missing = tuple(f"JPEGImages/{name}" for name in names if name not in images)
    records = tuple(map_in_threads(read_record, present))
    return Dataset("voc", records, collect_class_names(records), missing)


def _read_annotated(file: str, uri: str, label_uri: str) -> ImageRecord:
    root, lines = parse_xml(storage.read_bytes(label_uri), label_uri, "annotation")
    annotations = [
        _parse_object(node, f"{label_uri}:{lines[node]}")
        for node in root.iterfind("object")
    ]
    sides = (root.findtext(f"size/{side}", "0") for side in ("width", "height"))
    width, height = (int(parse_number(text, f"{label_uri}: size")) for text in sides)
    size = (width, height) if width and height else image_size(uri)
    return ImageRecord.from_annotations(file, uri, size, annotations)


def _parse_object(node: ET.Element, where: str) -> Annotation:
    label = (node.findtext("name") or "").strip()
    if not label:
        raise InputError(f"{where}: an object without <name>")
    x1, y1, x2, y2 = (
        parse_number(node.findtext(f"bndbox/{edge}"), f"{where}: <{edge}>")
        for edge in EDGES
    )
    difficult = (node.findtext("difficult") or "").strip().lower()
    if difficult not in DIFFICULT:
        raise InputError(f"{where}: <difficult> must be 0 or 1, got {difficult!r}")
    return Annotation((x1 - 1, y1 - 1, x2, y2), label, DIFFICULT[difficult])


def write_voc(records: Sequence[ImageRecord], root: str, split: str) -> None:
    """Write one XML file per annotated image and the image list of the split."""
    for record in records:
        if record.annotated:
            path = f"{strip_suffix(record.file)}.xml"
            uri = storage.join(root, "Annotations", path)
            storage.write_bytes(uri, _record_xml(record))
    names = "".join(f"{strip_suffix(record.file)}\n" for record in records)
    uri = storage.join(root, "ImageSets/Main", f"{split}.txt")
    storage.write_bytes(uri, names.encode())


def _record_xml(record: ImageRecord) -> bytes:
    root = ET.Element("annotation")
    _add_text(root, "filename", record.file)
    size = ET.SubElement(root, "size")
    _add_text(size, "width", str(record.width))
    _add_text(size, "height", str(record.height))
    _add_text(size, "depth", "3")
    rows = zip(record.boxes.tolist(), record.labels, record.difficult, strict=True)
    for (x1, y1, x2, y2), label, difficult in rows:
        node = ET.SubElement(root, "object")
        _add_text(node, "name", label)
        _add_text(node, "difficult", str(int(difficult)))
        box = ET.SubElement(node, "bndbox")
        pixels = (x1 + 1, y1 + 1, x2, y2)
        for edge, pixel in zip(EDGES, pixels, strict=True):
            _add_text(box, edge, format_number(pixel))
    ET.indent(root)
    return bytes(ET.tostring(root, "utf-8"))


def _add_text(parent: ET.Element, tag: str, text: str) -> None:
    ET.SubElement(parent, tag).text = text
