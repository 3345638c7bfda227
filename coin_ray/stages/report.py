"""Report: one page with the figures, the curves and pictures of what each method saw."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from coin_ray import storage, tables
from coin_ray.config import DemoScenes, PipelineConfig
from coin_ray.configfile import to_yaml
from coin_ray.data.canonical import decode_rgb
from coin_ray.report.page import Box, GalleryImage, build_page
from coin_ray.stages.knowledge import collected, image_rows
from coin_ray.steps import Context
from coin_ray.structures import Detections
from coin_ray.summary import summarise
from coin_ray.tables import DetectionsTable

GALLERY = 24
LONG_SIDE = 640
SHOWN_FROM = {"cloud": 0.3, "clip_labels": 0.3, "clip_detector": 0.4, "student": 0.4}
FITS = ("propagate", "distill", "pseudo_label", "oracle")


def run(context: Context) -> dict[str, Any]:
    """Write ``report.html``."""
    config = context.config
    manifests = {name: storage.read_json(storage.join(folder, "manifest.json")) for name, folder in context.inputs.items()}
    summary = summarise(config, manifests)
    per_class = {name: [float("nan") if v is None else v for v in values] for name, values in summary.get("per_class", {}).items()}
    page = build_page(summary, per_class, _curves(context), _gallery(context), to_yaml(config), _command(context))
    path = storage.join(context.folder, "report.html")
    storage.write_bytes(path, page.encode())
    return {"page": path, "bytes": len(page.encode())}


def _command(context: Context) -> str:
    """The demo by its name; other runs read paths, which are in the config beside the steps."""
    config = context.config
    if isinstance(config.data, DemoScenes):
        student = "" if config.distill.student == "faster-rcnn" else f" --student {config.distill.student}"
        return f"python pipelines/full.py {config.preset}{student} --seed {config.seed}"
    return f"python pipelines/full.py --config {storage.join(context.root, 'config.yaml')}"


def _curves(context: Context) -> list[tuple[str, int, str, float]]:
    rows = []
    for name in FITS:
        folder = context.inputs.get(name)
        for point in storage.read_json(storage.join(folder, "curve.json")) if folder else []:
            rows += [(name, int(point["step"]), metric, value) for metric, value in point.items() if metric != "step"]
    return rows


def _gallery(context: Context) -> list[GalleryImage]:
    """Test images with everybody's results; training images with the kinds of knowledge. Evenly spread over each set."""
    config = context.config
    layers = _layers(context)
    truth = tables.read_truth(storage.read_table(storage.join(context.inputs["images"], "annotations.parquet")))
    separation = {r["image_id"]: r for r in storage.read_table(storage.join(context.inputs["separate"], "separation.parquet")).to_pylist()}
    chosen = _spread(image_rows(context.inputs["images"], "test"), GALLERY // 2)
    chosen += _spread([i for i in image_rows(context.inputs["images"], "train") if i["image_id"] in separation], GALLERY - len(chosen))
    images = []
    for image in chosen:
        image_id = str(image["image_id"])
        boxes = {name: _boxes(found[image_id], config, SHOWN_FROM[name]) for name, found in layers.items() if image_id in found}
        if image_id in truth:
            known = truth[image_id]
            boxes["truth"] = [_box(b, config.classes[int(c)]) for b, c in zip(known.boxes.tolist(), known.labels, strict=True)]
        if image_id in separation:
            boxes["separation"] = _kinds(separation[image_id], config)
        images.append(_picture(str(image["uri"]), boxes))
    return images


def _layers(context: Context) -> dict[str, DetectionsTable]:
    config = context.config
    names = ["cloud", *(["clip_labels"] if config.collect.labeler != "none" else [])]
    layers = {name: collected(context.inputs["collect"], name, config) for name in names}
    for name in ("clip_detector", "student"):
        path = storage.join(context.inputs["evaluate"], "predictions", f"{name}.parquet")
        if storage.exists(path):
            layers[name] = tables.read_detections(storage.read_table(path), len(config.classes))
    return layers


def _spread(rows: list[dict[str, object]], count: int) -> list[dict[str, object]]:
    return [rows[i * len(rows) // count] for i in range(min(count, len(rows)))] if rows else []


def _boxes(found: Detections, config: PipelineConfig, score_min: float) -> list[Box]:
    shown = found[found.scores >= score_min]
    return [_box(b, config.classes[int(c)], float(s)) for b, c, s in zip(shown.boxes.tolist(), shown.labels, shown.scores, strict=True)]


def _kinds(row: Mapping[str, Any], config: PipelineConfig) -> list[Box]:
    boxes = []
    for box, kind, cloud, clip in zip(row["boxes"], row["kind"], row["cloud_probs"], row["clip_probs"], strict=True):
        ours, theirs = _best(cloud, config), _best(clip, config)
        boxes.append(_box(box, f"{ours} / {theirs}" if kind == "inconsistent" else ours, None, kind))
    return boxes


def _best(probs: list[float], config: PipelineConfig) -> str:
    names = (*config.classes, "background")
    return names[max(range(len(names)), key=lambda k: probs[k])]


def _box(box: list[float], label: str, score: float | None = None, kind: str = "") -> Box:
    return Box((box[0], box[1], box[2], box[3]), label, score, kind)


def _picture(uri: str, boxes: dict[str, list[Box]]) -> GalleryImage:
    image = decode_rgb(storage.read_bytes(uri))
    width, height = image.size
    image.thumbnail((LONG_SIDE, LONG_SIDE))
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=85)
    return GalleryImage(encoded.getvalue(), width, height, uri.rsplit("/", 1)[-1], boxes)
