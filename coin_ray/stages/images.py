"""The images of a run: the usable ones, the rejected ones with the reason, and
annotations where they exist.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict

import pyarrow as pa
import pyarrow.compute as pc

from coin_ray import storage, tables
from coin_ray.cloud.label_map import LabelMap
from coin_ray.config import DemoScenes, Folder, PipelineConfig
from coin_ray.data import formats
from coin_ray.data.formats import IMAGE_SUFFIXES, Dataset, ImageRecord
from coin_ray.data.inspect import Inspection, inspect_images
from coin_ray.errors import InputError
from coin_ray.runs.steps import Context, Metrics
from coin_ray.stages.common.progress import show_progress
from coin_ray.tables import TableBuilder

if TYPE_CHECKING:
    from coin_ray.demo.scenes import Scene

SAME_IMAGE = "same image as one in"
"""How the reason begins for an image that is in an earlier split too."""
SPLIT_SEEDS = {"train": 0, "val": 1_000_000, "test": 2_000_000}
REPORTED_REASONS = 20
"""Rejected images that the metrics name, at most."""
REJECTED = pa.schema(
    [("uri", pa.string()), ("split", pa.string()), ("reason", pa.string())]
)


class RejectedImage(TypedDict):
    """One row of ``REJECTED``."""

    uri: str
    split: str
    reason: str


class AnnotationRow(TypedDict):
    """One row of ``tables.ANNOTATIONS``."""

    image_id: str
    boxes: list[list[float]]
    labels: list[int]
    difficult: list[bool]


def run(context: Context[PipelineConfig]) -> Metrics:
    """Write ``images``, ``annotations``, ``rejected`` (and, for the demo, ``unknown``)
    below the step's folder.
    """
    data = context.config.data
    if isinstance(data, DemoScenes):
        return _write_demo(context, data)
    return _write_folder(context, data)


def _write_demo(context: Context[PipelineConfig], demo: DemoScenes) -> Metrics:
    from coin_ray.demo.drawings import load_drawings
    from coin_ray.demo.scenes import Artwork, compose

    drawings = [drawing for drawing in load_drawings() if drawing.share == "target"]
    artwork = Artwork.from_drawings(drawings)
    first_seed = demo.seed * 10_000_000

    def compose_scene(split: str, index: int) -> Scene:
        return compose(artwork, "target", first_seed + SPLIT_SEEDS[split] + index)

    counts = {"train": demo.train, "val": demo.val, "test": demo.test}
    return write_scenes(context.folder, compose_scene, counts)


def write_scenes(
    folder: str,
    compose_scene: Callable[[str, int], Scene],
    counts: Mapping[str, int],
) -> Metrics:
    """Write so many scenes of each split as JPEGs and tables; ``unknown`` marks the
    drawings that a teacher was trained on as difficult.
    """
    images = TableBuilder(tables.IMAGES)
    annotations = TableBuilder(tables.ANNOTATIONS)
    unknown = TableBuilder(tables.ANNOTATIONS)
    for split, count in counts.items():
        for index in range(count):
            scene = compose_scene(split, index)
            uri = storage.join(folder, "images", f"{split}_{index:04d}.jpg")
            image_id = _write_jpeg(scene, uri)
            images.append(
                {
                    "image_id": image_id,
                    "uri": uri,
                    "width": scene.image.width,
                    "height": scene.image.height,
                    "split": split,
                }
            )
            trained_on = [
                drawing.known_to_cloud or drawing.known_to_clip
                for drawing in scene.drawings
            ]
            never = [False] * len(trained_on)
            annotations.append(_scene_annotations(scene, image_id, difficult=never))
            unknown.append(_scene_annotations(scene, image_id, difficult=trained_on))
    image_table = images.table()
    _write_tables(folder, image_table, annotations.table(), [])
    storage.write_table(storage.join(folder, "unknown.parquet"), unknown.table())
    return _metrics(image_table, [], 0)


def _write_jpeg(scene: Scene, uri: str) -> str:
    """Write the scene's image and return its id."""
    buffer = io.BytesIO()
    scene.image.save(buffer, "JPEG", quality=90, subsampling=0)
    jpeg = buffer.getvalue()
    storage.write_bytes(uri, jpeg)
    return hashlib.sha256(jpeg).hexdigest()


def _scene_annotations(
    scene: Scene, image_id: str, difficult: list[bool]
) -> AnnotationRow:
    return {
        "image_id": image_id,
        "boxes": scene.boxes.tolist(),
        "labels": scene.labels.tolist(),
        "difficult": difficult,
    }


def _write_folder(context: Context[PipelineConfig], data: Folder) -> Metrics:
    images = FolderImages(data.same_images)
    for split, folder in (
        ("train", data.images),
        ("val", data.val),
        ("test", data.test),
    ):
        if folder is None:
            continue
        dataset = formats.read_dataset(folder)
        class_indexes = _class_indexes(dataset, context.config.classes, folder)
        for record, inspection in _inspect_records(dataset.records, split):
            images.add(record, inspection, split, class_indexes)
    image_table = images.rows.table()
    annotations = images.annotation_table()
    _check_usable(image_table, annotations, images.rejected, data)
    _write_tables(context.folder, image_table, annotations, images.rejected)
    return _metrics(image_table, images.rejected, images.duplicates)


class FolderImages:
    """The images that are read from a user's folders, each in its first split.

    ``same_images``: a training image may be a test image too; then its annotations are
    those of the test set.
    """

    def __init__(self, same_images: bool) -> None:
        self.same_images = same_images
        self.rows = TableBuilder(tables.IMAGES)
        self.annotations = TableBuilder(tables.ANNOTATIONS)
        self.annotated_ids: set[str] = set()
        self.test_annotations: dict[str, AnnotationRow] = {}
        """Annotations by a test set of images that have others by then."""
        self.rejected: list[RejectedImage] = []
        self.split_by_id: dict[str, str] = {}
        self.duplicates = 0

    def add(
        self,
        record: ImageRecord,
        inspection: Inspection,
        split: str,
        class_indexes: Mapping[str, int],
    ) -> None:
        """Add an image, or record why it is rejected."""
        if isinstance(inspection, str):
            self._reject(record, split, inspection)
            return
        image_id: str = inspection["image_id"]
        earlier_split = self.split_by_id.get(image_id)
        allowed_twice = self.same_images and (earlier_split, split) == ("train", "test")
        if earlier_split is not None and not allowed_twice:
            self.duplicates += 1
            if earlier_split != split:
                self._reject(record, split, f"{SAME_IMAGE} {earlier_split}")
            return
        self.split_by_id[image_id] = split
        self.rows.append(inspection | {"split": split})
        if record.annotated:
            self._annotate(_annotation_row(image_id, record, class_indexes))

    def _reject(self, record: ImageRecord, split: str, reason: str) -> None:
        self.rejected.append({"uri": record.uri, "split": split, "reason": reason})

    def _annotate(self, row: AnnotationRow) -> None:
        image_id = row["image_id"]
        if image_id in self.annotated_ids:
            self.test_annotations[image_id] = row
        else:
            self.annotations.append(row)
            self.annotated_ids.add(image_id)

    def annotation_table(self) -> pa.Table:
        """Return the annotations, one row for each annotated image."""
        annotations = self.annotations.table()
        if not self.test_annotations:
            return annotations
        rows = [
            self.test_annotations.get(row["image_id"], row)
            for row in annotations.to_pylist()
        ]
        return pa.Table.from_pylist(rows, schema=tables.ANNOTATIONS)


def _inspect_records(
    records: Sequence[ImageRecord], split: str
) -> Iterator[tuple[ImageRecord, Inspection]]:
    """Yield each record with its image's row, or with the reason why its image can't be
    used.
    """
    uris = (record.uri for record in records)
    inspections = inspect_images(uris, len(records))
    with show_progress(f"images {split}", len(records)) as progress:
        pairs = zip(records, inspections, strict=True)
        for count, pair in enumerate(pairs, start=1):
            yield pair
            progress.update(count)


def _class_indexes(
    dataset: Dataset, classes: tuple[str, ...], folder: str
) -> dict[str, int]:
    """Return the index of the class by each name in the annotations, as far as it names
    a class; case, plural, hyphens and underscores are ignored. Raises InputError if none
    does.
    """
    label_map = LabelMap.of_classes(classes)
    matches = {name: label_map.find([name]) for name in dataset.names}
    annotated = any(record.annotated for record in dataset.records)
    if annotated and not any(matches.values()):
        names = ", ".join(sorted({name.lower() for name in dataset.names}))
        raise InputError(
            f"{folder} has none of the classes {', '.join(classes)}; it has"
            f" {names[:300] or 'no names'}"
        )
    return {name: match[0] for name, match in matches.items() if match is not None}


def _annotation_row(
    image_id: str, record: ImageRecord, class_indexes: Mapping[str, int]
) -> AnnotationRow:
    """Return the record's boxes of the run's classes."""
    numbers = [
        number for number, name in enumerate(record.labels) if name in class_indexes
    ]
    return {
        "image_id": image_id,
        "boxes": record.boxes[numbers].tolist(),
        "labels": [class_indexes[record.labels[number]] for number in numbers],
        "difficult": record.difficult[numbers].tolist(),
    }


def _check_usable(
    images: pa.Table,
    annotations: pa.Table,
    rejected: Sequence[RejectedImage],
    data: Folder,
) -> None:
    """Raise InputError without a training image, or if a given val or test folder has no
    annotated image.
    """
    if not pc.any(pc.equal(images["split"], "train")).as_py():
        raise InputError(
            f"no usable image below {data.images}: expected files ending in"
            f" {', '.join(IMAGE_SUFFIXES)} that can be decoded"
        )
    annotated = pc.is_in(images["image_id"], value_set=annotations["image_id"])
    for split, folder in (("val", data.val), ("test", data.test)):
        annotated_in_split = pc.and_(pc.equal(images["split"], split), annotated)
        if not folder or pc.any(annotated_in_split).as_py():
            continue
        in_earlier_split = sum(
            image["split"] == split and image["reason"].startswith(SAME_IMAGE)
            for image in rejected
        )
        if in_earlier_split:
            raise InputError(
                f"data.{split} {folder}: no annotated image is left; {in_earlier_split}"
                " are in an earlier split too, and an image has one (--data.same-images"
                " lets test images be training images)"
            )
        raise InputError(
            f"data.{split} {folder}: no annotated image; expected annotations in the"
            f" format {formats.READABLE} (docs/formats.md)"
        )


def _write_tables(
    folder: str,
    images: pa.Table,
    annotations: pa.Table,
    rejected: Sequence[RejectedImage],
) -> None:
    rejected_table = pa.Table.from_pylist(list(rejected), schema=REJECTED)
    for name, table in (
        ("images", images),
        ("annotations", annotations),
        ("rejected", rejected_table),
    ):
        storage.write_table(storage.join(folder, f"{name}.parquet"), table)


def _metrics(
    images: pa.Table, rejected: Sequence[RejectedImage], duplicates: int
) -> Metrics:
    image_ids = images["image_id"]
    counts = {
        split: int(pc.sum(pc.equal(images["split"], split)).as_py() or 0)
        for split in SPLIT_SEEDS
    }
    reasons = [
        f"{image['uri']}: {image['reason']}" for image in rejected[:REPORTED_REASONS]
    ]
    metrics: Metrics = {
        "digest": _digest_ids(image_ids),
        "count": counts,
        "rejected": len(rejected),
        "duplicates": duplicates,
        "reasons": reasons,
    }
    in_both = len(images) - len(image_ids.unique())
    if in_both:
        metrics["in_both"] = in_both
    return metrics


def _digest_ids(image_ids: pa.ChunkedArray) -> str:
    """Return the SHA-256 of the sorted ids written as JSON."""
    digest = hashlib.sha256(b"[")
    for number, image_id in enumerate(image_ids.take(pc.sort_indices(image_ids))):
        separator = ", " if number else ""
        digest.update(f'{separator}"{image_id}"'.encode())
    digest.update(b"]")
    return digest.hexdigest()
