"""Label Studio: a run's boxes go out with their kind, so that people look first where the teachers disagree, and come back as records.

python -m coin_ray.data.formats.label_studio out SEPARATE IMAGES --classes a,b --out FOLDER [--url '/data/local-files/?d={uri}']
python -m coin_ray.data.formats.label_studio back EXPORT.json --out FOLDER [--format coco]

SEPARATE and IMAGES are the folders of those steps of a run. ``out`` writes tasks.json to import and labels.xml, the labelling setup.
Tasks and JSON exports are as in Label Studio's "task format": boxes in percent of the image.
"""

from __future__ import annotations

import argparse
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from coin_ray import storage
from coin_ray.data.formats import IMAGE_FOLDERS, write
from coin_ray.data.formats.record import Annotation, Record, image_size, read_json
from coin_ray.errors import CoinError, InputError

KINDS = ("consistent", "inconsistent", "private")


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
    value: Annotated[_Value | dict[str, Any], Field(union_mode="left_to_right")] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Annotation:
    result: list[_Region]
    was_cancelled: bool = False
    updated_at: str = ""


@dataclass(frozen=True, slots=True)
class _Task:
    data: dict[str, Any]
    annotations: list[_Annotation] = field(default_factory=list)


EXPORT = TypeAdapter(list[_Task])


def tasks(
    images: Sequence[Mapping[str, Any]], separation: Sequence[Mapping[str, Any]], classes: Sequence[str], url: str = "{uri}"
) -> list[dict[str, Any]]:
    """Tasks from rows of ``tables.IMAGES`` and ``tables.SEPARATION``; ``url``: where Label Studio finds an image, from its ``{uri}``.

    A prediction's score is the share of boxes that the teachers agree on: sorted by it, the images in dispute come first.
    """
    rows = {row["image_id"]: row for row in separation}
    return [_task(image, rows[image["image_id"]], classes, url) for image in images if image["image_id"] in rows]


def _task(image: Mapping[str, Any], row: Mapping[str, Any], classes: Sequence[str], url: str) -> dict[str, Any]:
    regions = [
        _region(number, image, box, kind, _best(cloud, classes), _best(clip, classes))
        for number, (box, kind, cloud, clip) in enumerate(
            zip(row["boxes"], row["kind"], row["cloud_probs"], row["clip_probs"], strict=True)
        )
    ]
    counts = Counter(row["kind"])
    agreed = counts["consistent"] / len(regions) if regions else 1.0
    known = {"image_id": image["image_id"], "uri": image["uri"], "image": url.replace("{uri}", image["uri"])}
    return {
        "data": known | {kind: counts[kind] for kind in KINDS},
        "predictions": [{"model_version": "coin_ray", "score": agreed, "result": regions}],
    }


def _region(
    number: int, image: Mapping[str, Any], box: Sequence[float], kind: str, cloud: tuple[str, float], clip: tuple[str, float]
) -> dict[str, Any]:
    """``cloud`` and ``clip``: best class and its probability; of a private box only ``cloud`` counts, and may be either teacher's."""
    width, height = image["width"], image["height"]
    left, top, right, bottom = box
    value = {"x": left / width, "y": top / height, "width": (right - left) / width, "height": (bottom - top) / height}
    said = f"{cloud[0]} {cloud[1]:.2f}" if kind == "private" else f"cloud {cloud[0]} {cloud[1]:.2f}, CLIP {clip[0]} {clip[1]:.2f}"
    return {
        "id": f"box{number}",
        "type": "rectanglelabels",
        "from_name": "label",
        "to_name": "image",
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
        "value": {k: 100 * v for k, v in value.items()} | {"rotation": 0, "rectanglelabels": [cloud[0]]},
        "score": cloud[1],
        "meta": {"text": [f"{kind}: {said}"]},
    }


def _best(probs: Sequence[float], classes: Sequence[str]) -> tuple[str, float]:
    """Best class, background left out: ``probs`` [K+1], background last."""
    best = max(range(len(classes)), key=lambda k: probs[k])
    return classes[best], float(probs[best])


def labelling_setup(classes: Sequence[str]) -> str:
    """The XML that Label Studio asks for under "Labeling Interface"."""
    root = ET.Element("View")
    ET.SubElement(root, "Image", name="image", value="$image", zoom="true")
    labels = ET.SubElement(root, "RectangleLabels", name="label", toName="image")
    for name in classes:
        ET.SubElement(labels, "Label", value=name)
    ET.indent(root)
    return ET.tostring(root, "unicode")


def read_export(uri: str) -> tuple[Record, ...]:
    """The images that a person has finished, from a JSON export: of several annotations the one updated last, none that was skipped.

    Raises InputError naming the task for what is no upright box, and for tasks that were not written by ``tasks``.
    """
    exported: list[_Task] = read_json(EXPORT, uri, "a JSON export of Label Studio")
    return tuple(
        _record(task.data, max(done, key=lambda a: a.updated_at), f"{uri}: task {number}")
        for number, task in enumerate(exported)
        if (done := [a for a in task.annotations if not a.was_cancelled])
    )


def _record(data: Mapping[str, Any], annotation: _Annotation, where: str) -> Record:
    uri = data.get("uri")
    if not isinstance(uri, str):
        raise InputError(f"{where} has no data.uri: only tasks that coin_ray wrote can be read back")
    width, height = image_size(uri)
    if not width:
        raise InputError(f"{where}: {uri} is no image that can be read")
    found = [_box(region.value, (width, height), where) for region in annotation.result if region.type == "rectanglelabels"]
    return Record.of(uri.rpartition("/")[2], uri, (width, height), found)


def _box(value: _Value | dict[str, Any], size: tuple[int, int], where: str) -> Annotation:
    if isinstance(value, dict) or len(value.rectanglelabels) != 1 or value.rotation % 360:
        raise InputError(f"{where}: expected an upright box with one label, got {value}")
    left, top = value.x * size[0] / 100, value.y * size[1] / 100
    right, bottom = left + value.width * size[0] / 100, top + value.height * size[1] / 100
    return Annotation((left, top, right, bottom), value.rectanglelabels[0])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m coin_ray.data.formats.label_studio", description="Labels to Label Studio and back.")
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("out", help="write tasks.json and labels.xml")
    out.add_argument("separate", help="folder with separation.parquet")
    out.add_argument("images", help="folder with images.parquet")
    out.add_argument("--classes", required=True, help="the run's classes in their order: a,b")
    out.add_argument("--url", default="{uri}", help="where Label Studio finds an image, from its {uri}")
    back = commands.add_parser("back", help="write the corrected labels as a data set")
    back.add_argument("export", help="JSON export of Label Studio")
    back.add_argument("--format", default="coco", choices=sorted(IMAGE_FOLDERS))
    for command in (out, back):
        command.add_argument("--out", required=True, metavar="FOLDER")
    given = parser.parse_args(arguments)
    try:
        if given.command == "out":
            _out(given)
        else:
            write(read_export(given.export), given.out, given.format)
    except CoinError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _out(given: argparse.Namespace) -> None:
    classes = [name.strip() for name in given.classes.split(",")]
    images = storage.read_table(storage.join(given.images, "images.parquet")).to_pylist()
    separation = storage.read_table(storage.join(given.separate, "separation.parquet")).to_pylist()
    width = next((len(row["cloud_probs"][0]) for row in separation if row["cloud_probs"]), len(classes) + 1)
    if width != len(classes) + 1:
        raise InputError(f"the run has {width - 1} classes, --classes names {len(classes)}: {', '.join(classes)}")
    storage.write_json(storage.join(given.out, "tasks.json"), tasks(images, separation, classes, given.url))
    storage.write_bytes(storage.join(given.out, "labels.xml"), labelling_setup(classes).encode())


if __name__ == "__main__":
    sys.exit(main())
