"""Find files that look like labels and that no reader took, and say what they look
like.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from coin_ray.data.formats.folder import DatasetFolder
from coin_ray.data.formats.parsing import read_head
from coin_ray.data.formats.record import UnreadFile

EXAMINED_PER_FOLDER = 20
"""Files of one kind in one folder that are opened; the others count as the same."""
LAYOUT_OF_SUFFIX = {
    ".tfrecord": "TFRecord",
    ".tfrecords": "TFRecord",
    ".manifest": "SageMaker Ground Truth",
    **dict.fromkeys((".parquet", ".arrow", ".feather"), "an Arrow table"),
    **dict.fromkeys((".h5", ".hdf5"), "HDF5"),
    **dict.fromkeys((".mat", ".npz", ".npy", ".pkl"), "arrays"),
    **dict.fromkeys((".db", ".sqlite", ".xlsx"), "a table"),
    **dict.fromkeys(
        (".zip", ".tar", ".tgz", ".gz", ".7z", ".rar"), "an archive, to be unpacked"
    ),
}
JSON_KEYS = (
    ("LabelMe", (b'"shapes"', b'"imagePath"')),
    ("VGG Image Annotator", (b'"regions"', b'"shape_attributes"')),
    ("COCO", (b'"images"', b'"annotations"')),
    ("COCO", (b'"image_id"', b'"bbox"')),
    ("COCO", (b'"file_name"', b'"height"')),
    ("BDD100K", (b'"box2d"',)),
    ("Cityscapes", (b'"imgWidth"', b'"objects"')),
    ("Supervisely", (b'"objects"', b'"classTitle"')),
    ("Supervisely", (b'"objects"', b'"exterior"')),
    ("Datumaro", (b'"items"', b'"categories"')),
    ("Label Studio", (b'"rectanglelabels"',)),
    ("Label Studio", (b'"annotations"', b'"data"')),
    ("CreateML", (b'"image"', b'"coordinates"')),
    ("FiftyOne", (b'"samples"', b'"filepath"')),
    ("Labelbox", (b'"data_row"',)),
    ("labels", (b'"bbox"',)),
    ("labels", (b'"boxes"',)),
    ("labels", (b'"bounding', b'"label')),
    ("labels", (b'"xmin"',)),
)
CSV_WORDS = re.compile(rb"(?i)\b(x_?min|xmin|bbox|left|x1|x_center|region_shape)")
NUMBER = r"-?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
TEXT_LINES = (
    ("YOLO", re.compile(rf"\d+(?:\.0)?(?:\s+{NUMBER}){{4,}}\s*")),
    ("KITTI", re.compile(rf"[^\d\s-]\S*(?:\s\S+)*?(?:\s+{NUMBER}){{14,15}}\s*")),
    ("DOTA", re.compile(rf"(?:{NUMBER}\s+){{8}}\S.*")),
    ("comma-separated boxes", re.compile(rf"(?:{NUMBER}\s*,\s*){{4,}}.*")),
    (
        "a list of images and boxes",
        re.compile(rf".+\.\w+[ ,]{NUMBER}(?:,{NUMBER}){{3}}.*"),
    ),
    ("a class name and a box", re.compile(rf"[^\d\s]\S*(?:\s+{NUMBER}){{4,5}}\s*")),
)
SUFFIXES = (
    *(".json", ".jsonl", ".ndjson", ".xml", ".txt", ".csv", ".tsv", ".yaml", ".yml"),
    *(".data", *LAYOUT_OF_SUFFIX),
)


def find_unread_files(folder: DatasetFolder) -> tuple[UnreadFile, ...]:
    """Return the files outside ``folder.read_paths`` that look like labels."""
    groups: dict[tuple[str, str], list[str]] = {}
    for path in folder.list_paths("", *SUFFIXES):
        if path not in folder.read_paths:
            parent, _, name = path.rpartition("/")
            suffix = f".{name.rpartition('.')[2].lower()}"
            groups.setdefault((parent, suffix), []).append(path)
    return tuple(
        UnreadFile(folder.uris[path], layout)
        for (_, suffix), paths in groups.items()
        for path, layout in _layouts(folder, suffix, paths)
    )


def _layouts(
    folder: DatasetFolder, suffix: str, paths: Sequence[str]
) -> list[tuple[str, str]]:
    """Return each path that looks like labels, with its layout."""
    layouts = []
    for path in paths[:EXAMINED_PER_FOLDER]:
        layout = layout_of(read_head(folder.uris[path]), suffix)
        if layout:
            layouts.append((path, layout))
    if layouts:
        usual_layout = layouts[-1][1]
        layouts += [(path, usual_layout) for path in paths[EXAMINED_PER_FOLDER:]]
    return layouts


def layout_of(head: bytes, suffix: str) -> str:
    """Tell what labels a file that begins with ``head`` looks like; "" if none."""
    if suffix in LAYOUT_OF_SUFFIX:
        return LAYOUT_OF_SUFFIX[suffix]
    if suffix in (".json", ".jsonl", ".ndjson"):
        matching = (
            name for name, keys in JSON_KEYS if all(key in head for key in keys)
        )
        return next(matching, "")
    if suffix == ".xml":
        match = re.search(rb"<(annotations?)[\s>]", head)
        if match is None:
            return ""
        return "CVAT for images" if match[1] == b"annotations" else "VOC"
    if suffix in (".csv", ".tsv"):
        first_line = head.partition(b"\n")[0]
        return (
            "a table of boxes" if CSV_WORDS.search(first_line) else _text_layout(head)
        )
    if suffix == ".txt":
        return _text_layout(head)
    has_names = re.search(rb"(?m)^\s*names\s*[:=]", head) is not None
    has_images = (
        re.search(rb"(?m)^\s*(train|val|valid|nc|test)\s*[:=]", head) is not None
    )
    return "YOLO" if has_names and has_images else ""


def _text_layout(head: bytes) -> str:
    lines = head.decode("utf-8", "replace").splitlines()[:5]
    for line in lines:
        for layout, pattern in TEXT_LINES:
            if pattern.fullmatch(line.strip()):
                return layout
    return ""
