"""PASCAL VOC: one XML file per image, ``Annotations/*.xml`` with ``JPEGImages/`` and
image lists in ``ImageSets/Main/*.txt``; also beside the images, or in folders named
otherwise.

VOC counts pixels from 1 and names the first and the last one inside: edges are xmin -
1, ymin - 1, xmax, ymax (VOC devkit, where a box is xmax - xmin + 1 wide). Reading takes
that 1 off, writing adds it. Most other tools count from 0: a minimum of 0 anywhere in
the folder, or a maker that is known to, tells.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence

from coin_ray import storage
from coin_ray.data.formats.conventions import CORNERS, check_records
from coin_ray.data.formats.folder import (
    DatasetFolder,
    match_key,
    plain_path,
    strip_suffix,
)
from coin_ray.data.formats.parsing import (
    format_number,
    image_size,
    parse_number,
    read_head,
)
from coin_ray.data.formats.record import (
    Annotation,
    Dataset,
    ImageRecord,
    UnreadableLabels,
    check_readable,
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
LABEL_FOLDERS = ("annotations", "annotation", "xmls", "xml", "labels")
IMAGE_FOLDERS = ("JPEGImages", "images", "Images", "image", "imgs", "img", "data")
OWN_SOURCE = "coin_ray"
"""The ``<source><annotation>`` of written files, which count from 1."""
FROM_ZERO = (b"<name>Label Studio</name>",)
"""Texts of makers that count from 0."""
LABEL_MAP, LABEL_MAP_HEAD = "labelmap.txt", b"# label:color_rgb"
"""The file beside the labels that Datumaro and CVAT write, which count from 0."""
FROM_ONE = (f"<annotation>{OWN_SOURCE}</annotation>".encode(),)
ZERO_MINIMUM = re.compile(rb"<[xy]min>\s*0*(?:0|\.0|0?\.\d+)\d*\s*</")
"""Possibly a minimum of 0 <= x < 1; parts of an object have minima too."""
SHOWN_SNIFFS = 5


def is_voc(folder: DatasetFolder) -> bool:
    """Tell whether the folder is in the VOC format."""
    labels = _label_paths(folder)
    if _is_devkit(folder):
        return True
    return bool(labels)


def _is_devkit(folder: DatasetFolder) -> bool:
    has_images = folder.first_folder("JPEGImages")
    return bool(has_images) and bool(folder.first_folder("Annotations"))


def _label_paths(folder: DatasetFolder) -> list[str]:
    """List the XML files whose kind, told by some of each folder, is VOC's."""
    if _is_devkit(folder):
        return folder.list_paths("Annotations", ".xml")
    paths_by_folder: dict[str, list[str]] = {}
    for path in folder.list_paths("", ".xml"):
        paths_by_folder.setdefault(path.rpartition("/")[0], []).append(path)
    return [
        path
        for paths in paths_by_folder.values()
        if any(_looks_like_voc(folder.uris[path]) for path in paths[:SHOWN_SNIFFS])
        for path in paths
        if len(paths) > SHOWN_SNIFFS or _looks_like_voc(folder.uris[path])
    ]


def _looks_like_voc(uri: str) -> bool:
    return re.search(rb"<annotation[\s>]", read_head(uri)) is not None


def read_voc(folder: DatasetFolder) -> Dataset:
    """Read a VOC folder. Images without XML are not annotated. Raises InputError naming
    file and line.
    """
    all_labels = _label_paths(folder)
    folder.read_paths.update(all_labels)
    if _is_devkit(folder):
        image_folder = "JPEGImages"
        images = folder.list_images(image_folder)
        labels = {
            f"JPEGImages/{strip_suffix(path.removeprefix('Annotations/'))}": path
            for path in all_labels
        }
        label_of_image, unmatched = folder.match_labels(images, labels)
        listed, missing = folder.select_listed("ImageSets/Main", images, image_folder)
    else:
        listed, label_of_image, unmatched = _match_beside(folder, all_labels)
        image_folder, missing = "", []
    if not folder.split or not _is_devkit(folder):
        missing += unmatched
    from_zero, notes = _find_counting(folder, all_labels)
    start = len(image_folder) + 1 if image_folder else 0
    image_names = {match_key(path.rpartition("/")[2]) for path in folder.list_images()}
    contradictions: list[str] = []
    unreadable: list[UnreadableLabels] = []

    def read_record(path: str) -> ImageRecord:
        uri, label = folder.uris[path], label_of_image.get(path)
        if label is not None:
            label_uri = folder.uris[label]
            try:
                record, named = _read_annotated(path[start:], uri, label_uri, from_zero)
            except InputError as error:
                unreadable.append(UnreadableLabels(label_uri, str(error)))
            else:
                if named != match_key(path.rpartition("/")[2]) and named in image_names:
                    contradictions.append(label)
                return record
        return ImageRecord.from_annotations(
            path[start:], uri, image_size(uri), [], annotated=False
        )

    records = tuple(map_in_threads(read_record, listed))
    check_records(records, CORNERS, folder.root)
    names = collect_class_names(records)
    if contradictions:
        example = min(contradictions)
        notes += (
            f"{len(contradictions)} label files name another image of the folder in"
            f" <filename>, e.g. {example}; their own names count",
        )
    annotated_count = sum(record.annotated for record in records)
    errors = check_readable(unreadable, annotated_count)
    return Dataset(
        "voc", records, names, tuple(missing), notes=notes, unreadable=errors
    )


def _match_beside(
    folder: DatasetFolder, labels: Sequence[str]
) -> tuple[list[str], dict[str, str], list[str]]:
    """Return the images of the split, the label file of each, and label files without
    an image, where XML files are beside images or in a folder beside theirs.
    """
    if folder.split:
        prefix = f"{folder.split}/"
        labels = [path for path in labels if path.startswith(prefix)]
        if not labels:
            raise InputError(
                f"{folder.root} has no split {folder.split!r}: there is no VOC label"
                f" file below {folder.root}/{folder.split}"
            )
    images = folder.list_images(folder.split)
    stems = {strip_suffix(path) for path in images}
    label_of_stem: dict[str, str] = {}
    for path in labels:
        candidates = _image_stems(strip_suffix(path))
        stem = next((name for name in candidates if name in stems), candidates[0])
        if stem in label_of_stem:
            raise InputError(
                f"{folder.root}: {label_of_stem[stem]} and {path} are labels of one"
                " image; leave one"
            )
        label_of_stem[stem] = path
    label_of_image, unmatched = folder.match_labels(images, label_of_stem)
    return images, label_of_image, unmatched


def _image_stems(label_stem: str) -> list[str]:
    """Return where an image may be, without suffix: beside its label file, or in the
    folder of images beside that of labels.
    """
    parts = label_stem.split("/")
    stems = [label_stem]
    for index in range(len(parts) - 2, -1, -1):
        if parts[index].lower() in LABEL_FOLDERS:
            before, after = parts[:index], parts[index + 1 :]
            stems += ["/".join([*before, name, *after]) for name in IMAGE_FOLDERS]
            stems.append("/".join([*before, *after]))
    return stems


def _find_counting(
    folder: DatasetFolder, labels: Sequence[str]
) -> tuple[bool, tuple[str, ...]]:
    """Tell whether the files that name no known maker count pixels from 0: a minimum
    of 0 in any of them, of any split, or the label map of Datumaro and CVAT.
    """
    maps = folder.list_paths("", LABEL_MAP)
    if any(read_head(folder.uris[path]).startswith(LABEL_MAP_HEAD) for path in maps):
        return True, (f"VOC pixels are counted from 0: {maps[0]} is Datumaro's",)

    def has_zero_minimum(path: str) -> bool:
        uri = folder.uris[path]
        raw = storage.read_bytes(uri)
        if any(mark in raw for mark in (*FROM_ONE, *FROM_ZERO)):
            return False
        if ZERO_MINIMUM.search(raw) is None:
            return False
        try:
            return _has_zero_minimum(raw, uri)
        except InputError:  # told when it is read
            return False

    marks = map_in_threads(has_zero_minimum, labels)
    proof = next((path for path, mark in zip(labels, marks, strict=True) if mark), None)
    if proof is None:
        return False, ()
    return True, (f"VOC pixels are counted from 0: a minimum of {proof} is 0",)


def _has_zero_minimum(raw: bytes, uri: str) -> bool:
    root, lines = parse_xml(raw, uri, "annotation")
    for node in root.iterfind("object"):
        for edge in EDGES[:2]:
            text = node.findtext(f"bndbox/{edge}")
            if 0 <= parse_number(text, f"{uri}:{lines[node]}: <{edge}>") < 1:
                return True
    return False


def _read_annotated(
    file: str, uri: str, label_uri: str, from_zero: bool
) -> tuple[ImageRecord, str]:
    """Return the record, and the key of the image that <filename> names."""
    raw = storage.read_bytes(label_uri)
    root, lines = parse_xml(raw, label_uri, "annotation")
    if any(mark in raw for mark in (*FROM_ONE, *FROM_ZERO)):
        from_zero = any(mark in raw for mark in FROM_ZERO)
    _check_objects(root, label_uri)
    annotations = [
        _parse_object(node, f"{label_uri}:{lines[node]}", 0 if from_zero else 1)
        for node in root.iterfind("object")
    ]
    sides = (root.findtext(f"size/{side}", "0") for side in ("width", "height"))
    width, height = (int(parse_number(text, f"{label_uri}: size")) for text in sides)
    size = (width, height) if width and height else image_size(uri)
    named = match_key(plain_path(root.findtext("filename", "")).rpartition("/")[2])
    return ImageRecord.from_annotations(file, uri, size, annotations), named


def _check_objects(root: ET.Element, label_uri: str) -> None:
    """Raise InputError if boxes of the file are not where VOC has them: one in each
    <object> of <annotation>. They would be left out unnoticed.
    """
    boxes = [node for node in root.iter() if node.tag.lower().endswith("bndbox")]
    objects = root.findall("object")
    box_count = sum(len(list(node.iter("bndbox"))) for node in objects)
    has_several = any(len(node.findall("bndbox")) > 1 for node in objects)
    if has_several or len(boxes) > box_count:
        raise InputError(
            f"{label_uri}: expected one <bndbox> in each <object> of <annotation>, got"
            f" {len(boxes)} boxes in {len(objects)} objects, or in other places"
        )


def _parse_object(node: ET.Element, where: str, first_pixel: int) -> Annotation:
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
    edges = (x1 - first_pixel, y1 - first_pixel, x2, y2)
    return Annotation(edges, label, DIFFICULT[difficult])


def voc_files(records: Sequence[ImageRecord], split: str) -> dict[str, bytes]:
    """Return one XML file per annotated image and the image list of the split."""
    files = {
        f"Annotations/{strip_suffix(record.file)}.xml": voc_xml(record)
        for record in records
        if record.annotated
    }
    names = "".join(f"{strip_suffix(record.file)}\n" for record in records)
    files[f"ImageSets/Main/{split}.txt"] = names.encode()
    return files


def voc_xml(record: ImageRecord) -> bytes:
    """Return the XML file of an image."""
    root = ET.Element("annotation")
    _add_text(root, "filename", record.file)
    _add_text(ET.SubElement(root, "source"), "annotation", OWN_SOURCE)
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
