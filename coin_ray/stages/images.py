"""The images of a run: the usable ones, the rejected ones with the reason, and
annotations where they exist.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from coin_ray import storage, tables
from coin_ray.cloud.label_map import LabelMap
from coin_ray.config import DemoScenes, Folder, PipelineConfig
from coin_ray.data import formats
from coin_ray.data.formats import IMAGE_SUFFIXES, Dataset, ImageRecord
from coin_ray.data.formats.record import UnreadFile
from coin_ray.data.inspect import Inspection, inspect_images
from coin_ray.data.intensity import describe_intensity, earlier_range
from coin_ray.data.listing import addresses_by_split, list_versions, write_listing
from coin_ray.data.truth import check_complete
from coin_ray.errors import InputError
from coin_ray.runs.steps import Context, Metrics, read_reopened, remove_readers
from coin_ray.stages.common.progress import show_progress
from coin_ray.stages.reading.folder_images import (
    REJECTED,
    SAME_IMAGE,
    AnnotationRow,
    FolderImages,
    RejectedImage,
)
from coin_ray.stages.reading.place_report import (
    check_left_out,
    describe_left_out,
    print_dataset,
    print_other_classes,
    print_repairs,
)
from coin_ray.tables import TableBuilder

if TYPE_CHECKING:
    from coin_ray.demo.scenes import Scene

SPLIT_SEEDS = {"train": 0, "val": 1_000_000, "test": 2_000_000}
COLLECTED_FOLDERS = ("parts", "second_opinions")
"""Folders of a collection's answers, by image, which stay when images change."""
REPORTED_REASONS = 20
"""Rejected images that the metrics name, at most."""


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
    # before anything is read: what changes meanwhile is noticed by the next run
    versions = _list_versions(data, context.root)
    datasets: dict[str, Dataset] = {}
    class_indexes: dict[str, dict[str, int]] = {}
    for split, address in addresses_by_split(data).items():
        dataset = formats.read_dataset(address)
        print_dataset(split, address, dataset)
        check_complete(dataset, address)
        datasets[split] = dataset
        class_indexes[split] = _class_indexes(dataset, context.config.classes, address)
    unread = {split: dataset.unread_files for split, dataset in datasets.items()}
    former = read_reopened(context.folder)
    former_metrics = {} if former is None else former.metrics
    intensity_range = earlier_range(former_metrics, data.intensity_range)
    images = FolderImages(data.same_images, intensity_range)
    repairs: Counter[str] = Counter()
    totals: dict[str, int] = {}
    for split in addresses_by_split(data):
        dataset = datasets.pop(split)
        for record, inspection in _inspect_records(dataset.records, split):
            images.add(record, inspection, split)
        for image in dataset.left_out:
            images.reject(image.uri, split, image.reason)
        split_repairs = images.annotate(split, class_indexes[split])
        repairs += split_repairs
        print_other_classes(split, dataset, class_indexes[split])
        print_repairs(split, split_repairs)
        totals[split] = len(dataset.records) + len(dataset.left_out)
    image_table = images.rows.table()
    annotations = images.annotation_table()
    _check_usable(image_table, annotations, images.rejected, data, unread)
    _check_left_out(images.rejected, totals, data)
    _remove_outdated_readers(context, image_table, annotations)
    _write_tables(context.folder, image_table, annotations, images.rejected)
    if versions is not None:
        write_listing(context.folder, versions)
    metrics = _metrics(image_table, images.rejected, images.duplicates)
    metrics |= images.intensity.metrics()
    if line := describe_intensity(metrics):
        print(f"images: {line}", flush=True)
    if repairs:
        metrics["repairs"] = dict(repairs)
    return metrics


def _list_versions(data: Folder, root: str) -> dict[str, str] | None:
    """Return the sizes and times of the files that are read; None if they can't be
    listed, which the reader will explain.
    """
    try:
        return list_versions(data, root)
    except OSError:
        return None


def _remove_outdated_readers(
    context: Context[PipelineConfig], images: pa.Table, annotations: pa.Table
) -> None:
    """Remove the results of the steps that read other images or annotations from this
    step's folder, if it was finished before; the runner makes them again.

    A collection keeps its answers, which belong to single images.
    """
    if not storage.exists(storage.join(context.folder, "images.parquet")):
        return
    for name, table in (("images", images), ("annotations", annotations)):
        uri = storage.join(context.folder, f"{name}.parquet")
        if not storage.exists(uri) or not storage.read_table(uri).equals(table):
            break
    else:
        print("images: the images and labels are the same as before", flush=True)
        return
    outdated = remove_readers(context.root, context.folder, keep=COLLECTED_FOLDERS)
    if outdated:
        print(f"images: made again: {', '.join(outdated)}", flush=True)


def _check_left_out(
    rejected: Sequence[RejectedImage], totals: Mapping[str, int], data: Folder
) -> None:
    """Print which images of each folder are left out. Raises InputError if they are too
    many of its images.
    """
    for split, address in addresses_by_split(data).items():
        images = [image for image in rejected if image["split"] == split]
        setting = f"--{'images' if split == 'train' else split} {address}"
        check_left_out(setting, images, totals[split], data.max_left_out_share)


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


def _check_usable(
    images: pa.Table,
    annotations: pa.Table,
    rejected: Sequence[RejectedImage],
    data: Folder,
    unread: Mapping[str, Sequence[UnreadFile]],
) -> None:
    """Raise InputError without a training image, or if a given val or test folder has no
    annotated image. ``unread``: by split, files that look like labels.
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
        left_out = [image for image in rejected if image["split"] == split]
        reasons = f"; left out: {describe_left_out(left_out)}" if left_out else ""
        raise InputError(
            f"data.{split} {folder}: no annotated image; expected annotations in the"
            f" format {formats.READABLE} (docs/formats.md)"
            f"{_describe_unread(unread[split])}{reasons}"
        )


def _describe_unread(files: Sequence[UnreadFile]) -> str:
    """Return the end of a message: an example of the label files that were not read."""
    if not files:
        return ""
    uri, layout = files[0]
    return f"; {len(files)} files were not read, as {uri}, which looks like {layout}"


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
