"""The images of a run: which there are, which can't be used and why, and annotations
where they exist.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from coin_ray import storage, tables
from coin_ray.cloud.label_map import LabelMap
from coin_ray.config import DemoScenes, Folder, PipelineConfig
from coin_ray.data import formats
from coin_ray.data.formats import IMAGE_SUFFIXES, Dataset, ImageRecord
from coin_ray.data.inspect import inspect_images
from coin_ray.errors import InputError
from coin_ray.runs.steps import Context
from coin_ray.stages.common.progress import bar
from coin_ray.tables import TableBuilder

if TYPE_CHECKING:
    from coin_ray.demo.scenes import Scene

Inspected = tuple[ImageRecord, dict[str, Any] | str]
SAME = "same image as one in"
SPLIT_SEEDS = {"train": 0, "val": 1_000_000, "test": 2_000_000}


def run(context: Context[PipelineConfig]) -> dict[str, Any]:
    """Write ``images``, ``annotations``, ``rejected`` (and, for the demo, ``unknown``)
    below the step's folder.
    """
    data = context.config.data
    return (
        _demo(context, data) if isinstance(data, DemoScenes) else _folder(context, data)
    )


def _demo(context: Context[PipelineConfig], data: DemoScenes) -> dict[str, Any]:
    from coin_ray.demo.drawings import load_drawings
    from coin_ray.demo.scenes import Artwork, compose

    artwork = Artwork.from_drawings([d for d in load_drawings() if d.share == "target"])

    def scene(split: str, index: int) -> Scene:
        return compose(
            artwork, "target", data.seed * 10_000_000 + SPLIT_SEEDS[split] + index
        )

    return write_scenes(
        context, scene, {"train": data.train, "val": data.val, "test": data.test}
    )


def write_scenes(
    context: Context[PipelineConfig], scene: Callable[[str, int], Scene], counts: Mapping[str, int]
) -> dict[str, Any]:
    """So many scenes of each split, as JPEGs and tables; ``unknown`` marks drawings
    that a teacher has seen as difficult.
    """
    images, annotations, unknown = (
        TableBuilder(tables.IMAGES),
        TableBuilder(tables.ANNOTATIONS),
        TableBuilder(tables.ANNOTATIONS),
    )
    for split, count in counts.items():
        for index in range(count):
            made = scene(split, index)
            encoded = io.BytesIO()
            made.image.save(encoded, "JPEG", quality=90, subsampling=0)
            uri = storage.join(context.folder, "images", f"{split}_{index:04d}.jpg")
            storage.write_bytes(uri, encoded.getvalue())
            image_id = hashlib.sha256(encoded.getvalue()).hexdigest()
            images.append(
                {
                    "image_id": image_id,
                    "uri": uri,
                    "width": made.image.width,
                    "height": made.image.height,
                    "split": split,
                }
            )
            known = [d.known_to_cloud or d.known_to_clip for d in made.drawings]
            row = {
                "image_id": image_id,
                "boxes": made.boxes.tolist(),
                "labels": made.labels.tolist(),
            }
            annotations.append(row | {"difficult": [False] * len(known)})
            unknown.append(row | {"difficult": known})
    listed = images.table()
    _write(context, listed, annotations.table(), [])
    storage.write_table(
        storage.join(context.folder, "unknown.parquet"), unknown.table()
    )
    return _metrics(listed, [], 0)


def _folder(context: Context[PipelineConfig], data: Folder) -> dict[str, Any]:
    images, annotations = TableBuilder(tables.IMAGES), TableBuilder(tables.ANNOTATIONS)
    annotated: set[str] = set()
    # with data.same_images: what a test set says of a training image
    again: dict[str, dict[str, Any]] = {}
    rejected: list[dict[str, str]] = []
    seen: dict[str, str] = {}
    duplicates = 0
    for split, place in (
        ("train", data.images),
        ("val", data.val),
        ("test", data.test),
    ):
        if place is None:
            continue
        dataset = formats.read_dataset(place)
        indexes = _indexes(dataset, context.config.classes, place)
        for record, row in _shown(
            _inspect(dataset.records), split, len(dataset.records)
        ):
            if isinstance(row, str):
                rejected.append({"uri": record.uri, "split": split, "reason": row})
                continue
            image_id = row["image_id"]
            before = seen.get(image_id)
            if before is not None and not (
                data.same_images and (before, split) == ("train", "test")
            ):
                duplicates += 1
                if before != split:
                    rejected.append(
                        {
                            "uri": record.uri,
                            "split": split,
                            "reason": f"{SAME} {before}",
                        }
                    )
                continue
            seen[image_id] = split
            images.append(row | {"split": split})
            if record.annotated:
                truth = {"image_id": image_id, **_truth(record, indexes)}
                if image_id in annotated:
                    again[image_id] = truth
                else:
                    annotations.append(truth)
                    annotated.add(image_id)
    listed, known = images.table(), annotations.table()
    if again:
        known = pa.Table.from_pylist(
            [again.get(row["image_id"], row) for row in known.to_pylist()],
            schema=tables.ANNOTATIONS,
        )
    _check(listed, known, rejected, data)
    _write(context, listed, known, rejected)
    return _metrics(listed, rejected, duplicates)


def _shown(
    inspected: Iterable[Inspected], split: str, total: int
) -> Iterator[Inspected]:
    with bar(f"images {split}", total) as shown:
        for done, one in enumerate(inspected, 1):
            yield one
            shown.update(done)


def _check(
    images: pa.Table,
    annotations: pa.Table,
    rejected: list[dict[str, str]],
    data: Folder,
) -> None:
    if not pc.any(pc.equal(images["split"], "train")).as_py():
        raise InputError(
            f"no usable image below {data.images}: expected files ending in"
            f" {', '.join(IMAGE_SUFFIXES)} that can be decoded"
        )
    for split, place in (("val", data.val), ("test", data.test)):
        annotated = pc.is_in(images["image_id"], value_set=annotations["image_id"])
        if (
            place
            and not pc.any(pc.and_(pc.equal(images["split"], split), annotated)).as_py()
        ):
            shared = sum(
                r["split"] == split and r["reason"].startswith(SAME) for r in rejected
            )
            if shared:
                raise InputError(
                    f"data.{split} {place}: no annotated image is left; {shared} are in"
                    " an earlier split too, and an image has one (--data.same-images"
                    " lets test images be training images)"
                )
            raise InputError(
                f"data.{split} {place}: no annotated image; expected annotations in the"
                f" format {formats.READABLE} (docs/formats.md)"
            )


def list_image_files(place: str) -> list[str]:
    """URIs of the images of ``FOLDER`` or ``FOLDER#SPLIT``."""
    return [record.uri for record in formats.read_dataset(place).records]


def _inspect(records: Sequence[ImageRecord]) -> Iterator[Inspected]:
    """Each record with its row, or with the reason why its image can't be used."""
    return zip(
        records, inspect_images((record.uri for record in records), len(records)), strict=True
    )


def _indexes(dataset: Dataset, classes: tuple[str, ...], place: str) -> dict[str, int]:
    """The asked class of each name in the annotations; case, plural, hyphens and
    underscores don't count. InputError if none is asked.
    """
    asked = LabelMap.of_classes(classes)
    found = {name: asked.find([name]) for name in dataset.names}
    if not any(found.values()) and any(r.annotated for r in dataset.records):
        names = (
            ", ".join(sorted({n.lower() for n in dataset.names}))[:300] or "no names"
        )
        raise InputError(
            f"{place} has none of the classes {', '.join(classes)}; it has {names}"
        )
    return {name: match[0] for name, match in found.items() if match is not None}


def _truth(record: ImageRecord, indexes: dict[str, int]) -> dict[str, list[Any]]:
    """Annotations of the asked classes, as a row of ``tables.ANNOTATIONS`` without the
    image.
    """
    kept = [n for n, label in enumerate(record.labels) if label in indexes]
    labels = [indexes[record.labels[n]] for n in kept]
    return {
        "boxes": record.boxes[kept].tolist(),
        "labels": labels,
        "difficult": record.difficult[kept].tolist(),
    }


def _write(
    context: Context[PipelineConfig],
    images: pa.Table,
    annotations: pa.Table,
    rejected: list[dict[str, str]],
) -> None:
    storage.write_table(storage.join(context.folder, "images.parquet"), images)
    storage.write_table(
        storage.join(context.folder, "annotations.parquet"), annotations
    )
    schema = pa.schema(
        [("uri", pa.string()), ("split", pa.string()), ("reason", pa.string())]
    )
    storage.write_table(
        storage.join(context.folder, "rejected.parquet"),
        pa.Table.from_pylist(rejected, schema=schema),
    )


def _metrics(
    images: pa.Table, rejected: list[dict[str, str]], duplicates: int
) -> dict[str, Any]:
    ids = images["image_id"]
    digest = hashlib.sha256(b"[")  # of the sorted ids as JSON
    for number, image_id in enumerate(ids.take(pc.sort_indices(ids))):
        digest.update(f'{", " if number else ""}"{image_id}"'.encode())
    digest.update(b"]")
    counts = {
        split: int(pc.sum(pc.equal(images["split"], split)).as_py() or 0)
        for split in SPLIT_SEEDS
    }
    reasons = [f"{r['uri']}: {r['reason']}" for r in rejected[:20]]
    in_both = len(images) - len(ids.unique())
    metrics = {
        "digest": digest.hexdigest(),
        "count": counts,
        "rejected": len(rejected),
        "duplicates": duplicates,
        "reasons": reasons,
    }
    return metrics | ({"in_both": in_both} if in_both else {})
