"""Evaluate: every teacher, baseline and student on the held-out images. The only stage that reads their truth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from coin_ray import storage, tables
from coin_ray.config import PipelineConfig
from coin_ray.evaluation.coco import coco_average_precision
from coin_ray.evaluation.fusion_baselines import clip_labelled, every_class, static_fusion
from coin_ray.evaluation.kinds import judged_kinds
from coin_ray.evaluation.voc import average_precision
from coin_ray.stages.knowledge import collected, image_rows
from coin_ray.stages.predicting import predictions
from coin_ray.stages.propagate import WEIGHTS
from coin_ray.steps import Context
from coin_ray.structures import Detections
from coin_ray.tables import Truth

NAMES = {"propagate": "clip_detector", "distill": "student", "pseudo_label": "pseudo_label", "oracle": "oracle"}
Results = dict[str, Mapping[str, Detections]]


def run(context: Context) -> dict[str, Any]:
    """Write ``predictions/NAME.parquet``; the metrics hold VOC and COCO AP50 by method and class. Without truth: no numbers."""
    images = image_rows(context.inputs["images"], "test")
    truth = _truth(context, "annotations", images)
    if not images or not truth:
        return {"map50": {}, "note": "no annotated test images: nothing to measure against"}
    weights = {NAMES[s]: storage.join(f, WEIGHTS) for s, f in context.inputs.items() if s in NAMES}
    students = predictions(weights, images, context.config)
    for name, table in students.items():
        storage.write_table(storage.join(context.folder, "predictions", f"{name}.parquet"), table)
    count = len(context.config.classes)
    results: Results = teachers(context) | {name: tables.read_detections(table, count) for name, table in students.items()}
    metrics: dict[str, Any] = _measure(results, truth, context.config) | {"knowledge": _knowledge(context)}
    if storage.exists(storage.join(context.inputs["images"], "unknown.parquet")):
        unknown = _truth(context, "unknown", images)
        metrics["map50_unknown"] = {
            n: _rounded(average_precision(r, unknown, count, plus_one=context.config.evaluate.plus_one).map) for n, r in results.items()
        }
    return metrics


def teachers(context: Context) -> Results:
    """Every class score of each box: the cloud with its full tail, CLIP's labels on its boxes, and the free fusion of both at test time."""
    config = context.config
    cloud = collected(context.inputs["collect"], "cloud", config)
    if config.collect.labeler == "none":
        return {"cloud": {i: every_class(d) for i, d in cloud.items()}}
    clip = collected(context.inputs["collect"], "clip_labels", config)
    return {
        "cloud": {i: every_class(d) for i, d in cloud.items()},
        "clip_labels": {i: every_class(clip_labelled(d, clip[i].probs)) for i, d in cloud.items()},
        "static_fusion": {i: every_class(static_fusion(d, clip[i].probs)) for i, d in cloud.items()},
    }


def _knowledge(context: Context) -> dict[str, dict[str, float]]:
    """How right each kind was on the training images, where those have truth."""
    separation = storage.read_table(storage.join(context.inputs["separate"], "separation.parquet")).to_pylist()
    return judged_kinds(separation, _truth(context, "annotations", image_rows(context.inputs["images"], "train")))


def _truth(context: Context, table: str, images: list[dict[str, object]]) -> dict[str, Truth]:
    wanted = {i["image_id"] for i in images}
    rows: pa.Table = storage.read_table(storage.join(context.inputs["images"], f"{table}.parquet"))
    return {i: t for i, t in tables.read_truth(rows).items() if i in wanted}


def _measure(results: Results, truth: dict[str, Truth], config: PipelineConfig) -> dict[str, Any]:
    count = len(config.classes)
    voc = {name: average_precision(found, truth, count, plus_one=config.evaluate.plus_one) for name, found in results.items()}
    return {
        "map50": {name: _rounded(report.map) for name, report in voc.items()},
        "per_class": {name: [_rounded(float(ap)) for ap in report.ap] for name, report in voc.items()},
        "coco_map50": {name: _rounded(coco_average_precision(found, truth, count).map50) for name, found in results.items()},
        "images": len(truth),
    }


def _rounded(value: float) -> float | None:
    return None if value != value else round(value, 4)
