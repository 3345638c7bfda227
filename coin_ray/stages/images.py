"""The images of a run: which there are, which can't be used and why, and annotations where they exist."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from coin_ray import storage, tables
from coin_ray.config import DemoScenes, Folder
from coin_ray.data.canonical import decode_rgb
from coin_ray.errors import InputError
from coin_ray.steps import Context

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
SPLIT_SEEDS = {"train": 0, "val": 1_000_000, "test": 2_000_000}


def run(context: Context) -> dict[str, Any]:
    """Write ``images``, ``annotations``, ``rejected`` (and, for the demo, ``unknown``) below the step's folder."""
    data = context.config.data
    return _demo(context, data) if isinstance(data, DemoScenes) else _folder(context, data)


def _demo(context: Context, data: DemoScenes) -> dict[str, Any]:
    from coin_ray.demo.drawings import load_drawings
    from coin_ray.demo.scenes import Artwork, compose

    artwork = Artwork.of([d for d in load_drawings() if d.share == "target"])
    images, annotations, unknown = [], [], []
    for split, count in (("train", data.train), ("val", data.val), ("test", data.test)):
        for index in range(count):
            scene = compose(artwork, "target", data.seed * 10_000_000 + SPLIT_SEEDS[split] + index)
            encoded = io.BytesIO()
            scene.image.save(encoded, "JPEG", quality=90, subsampling=0)
            uri = storage.join(context.folder, "images", f"{split}_{index:04d}.jpg")
            storage.write_bytes(uri, encoded.getvalue())
            image_id = hashlib.sha256(encoded.getvalue()).hexdigest()
            images.append({"image_id": image_id, "uri": uri, "width": scene.image.width, "height": scene.image.height, "split": split})
            known = [d.known_to_cloud or d.known_to_clip for d in scene.drawings]
            row = {"image_id": image_id, "boxes": scene.boxes.tolist(), "labels": scene.labels.tolist()}
            annotations.append(row | {"difficult": [False] * len(known)})
            unknown.append(row | {"difficult": known})
    _write(context, images, annotations, [])
    storage.write_table(storage.join(context.folder, "unknown.parquet"), pa.Table.from_pylist(unknown, schema=tables.ANNOTATIONS))
    return _metrics(images, [], 0)


def _folder(context: Context, data: Folder) -> dict[str, Any]:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    rejected: list[dict[str, str]] = []
    seen: dict[str, str] = {}
    duplicates = 0
    for split, place in (("train", data.images), ("val", data.val), ("test", data.test)):
        if place is None:
            continue
        place = storage.absolute(place)
        truth = _coco(place, context.config.classes)
        for uri, row in _inspect(image_files(place)):
            if isinstance(row, str):
                rejected.append({"uri": uri, "split": split, "reason": row})
            elif row["image_id"] in seen:
                duplicates += 1
                if seen[row["image_id"]] != split:
                    rejected.append({"uri": uri, "split": split, "reason": f"same image as one in {seen[row['image_id']]}"})
            else:
                seen[row["image_id"]] = split
                images.append(row | {"split": split})
                if truth is not None:
                    annotations.append({"image_id": row["image_id"], **truth.get(uri.rsplit("/", 1)[-1], _nothing())})
    _check(images, annotations, data)
    _write(context, images, annotations, rejected)
    return _metrics(images, rejected, duplicates)


def _check(images: list[dict[str, Any]], annotations: list[dict[str, Any]], data: Folder) -> None:
    if not any(i["split"] == "train" for i in images):
        raise InputError(f"no usable image below {data.images}: expected files ending in {', '.join(IMAGE_SUFFIXES)} that can be decoded")
    for split, place in (("val", data.val), ("test", data.test)):
        annotated = {a["image_id"] for a in annotations}
        if place and not any(i["split"] == split and i["image_id"] in annotated for i in images):
            raise InputError(f"data.{split} {place}: no annotated image; expected annotations.json (COCO) beside images/")


def image_files(place: str) -> list[str]:
    if not storage.exists(place):
        raise InputError(f"no such folder: {place}")
    return [uri for uri in storage.list_files(place) if uri.lower().endswith(IMAGE_SUFFIXES)]


def _inspect(uris: Iterable[str]) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Each file with its row, or with the reason why it can't be used."""

    def look(uri: str) -> tuple[str, dict[str, Any] | str]:
        raw = storage.read_bytes(uri)
        try:
            width, height = decode_rgb(raw).size
        except InputError as error:
            return uri, str(error)
        return uri, {"image_id": hashlib.sha256(raw).hexdigest(), "uri": uri, "width": width, "height": height}

    with ThreadPoolExecutor(4) as pool:
        yield from pool.map(look, uris)


def _nothing() -> dict[str, list[Any]]:
    return {"boxes": [], "labels": [], "difficult": []}


def _coco(place: str, classes: tuple[str, ...]) -> dict[str, dict[str, list[Any]]] | None:
    """Annotations by file name of a COCO folder, for the asked classes; None without annotations.json. Crowds count as difficult."""
    path = storage.join(place, "annotations.json")
    if not storage.exists(path):
        return None
    content = storage.read_json(path)
    try:
        names = {c["id"]: c["name"].lower() for c in content["categories"]}
        files = {i["id"]: i["file_name"].rsplit("/", 1)[-1] for i in content["images"]}
        index = {c.lower(): k for k, c in enumerate(classes)}
        found = {name: _nothing() for name in files.values()}
        for a in content["annotations"]:
            label = index.get(names[a["category_id"]])
            if label is None:
                continue
            x, y, w, h = a["bbox"]
            row = found[files[a["image_id"]]]
            row["boxes"].append([x, y, x + w, y + h])
            row["labels"].append(label)
            row["difficult"].append(bool(a.get("iscrowd", 0)))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not COCO json: {type(error).__name__} {error}") from error
    if not set(names.values()) & set(index):
        raise InputError(f"{path} has none of the classes {', '.join(classes)}; it has {', '.join(sorted(set(names.values())))[:300]}")
    return found


def _write(context: Context, images: list[dict[str, Any]], annotations: list[dict[str, Any]], rejected: list[dict[str, str]]) -> None:
    storage.write_table(storage.join(context.folder, "images.parquet"), pa.Table.from_pylist(images, schema=tables.IMAGES))
    storage.write_table(storage.join(context.folder, "annotations.parquet"), pa.Table.from_pylist(annotations, schema=tables.ANNOTATIONS))
    schema = pa.schema([("uri", pa.string()), ("split", pa.string()), ("reason", pa.string())])
    storage.write_table(storage.join(context.folder, "rejected.parquet"), pa.Table.from_pylist(rejected, schema=schema))


def _metrics(images: list[dict[str, Any]], rejected: list[dict[str, str]], duplicates: int) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps(sorted(i["image_id"] for i in images)).encode()).hexdigest()
    counts = {split: sum(i["split"] == split for i in images) for split in SPLIT_SEEDS}
    reasons = [f"{r['uri']}: {r['reason']}" for r in rejected[:20]]
    return {"digest": digest, "count": counts, "rejected": len(rejected), "duplicates": duplicates, "reasons": reasons}
