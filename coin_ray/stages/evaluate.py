"""Evaluate: every teacher, baseline and student on the held-out images. The only stage
that reads their truth.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow.compute as pc

from coin_ray import storage, tables
from coin_ray.config import PipelineConfig
from coin_ray.evaluation.coco import coco_average_precision
from coin_ray.evaluation.fusion_baselines import (
    clip_labelled,
    every_class,
    static_fusion,
)
from coin_ray.evaluation.separation_accuracy import judged_kinds
from coin_ray.evaluation.voc import average_precision
from coin_ray.runs.steps import Context
from coin_ray.stages.common.prediction import write_predictions
from coin_ray.stages.common.teacher_outputs import collected, image_table, truth_of
from coin_ray.stages.propagate import WEIGHTS
from coin_ray.structures import Detections
from coin_ray.tables import Truth

NAMES = {
    "propagate": "clip_detector",
    "distill": "student",
    "pseudo_label": "pseudo_label",
    "oracle": "oracle",
}
Results = dict[str, Mapping[str, Detections]]


def run(context: Context) -> dict[str, Any]:
    """Write ``predictions/NAME.parquet``; the metrics hold VOC and COCO AP50 by method
    and class. Without truth: no numbers.
    """
    images = image_table(context.inputs["images"], "test")
    truth = truth_of(context.inputs["images"]).of(images["image_id"])
    if not truth:
        return {
            "map50": {},
            "note": "no annotated test images: nothing to measure against",
        }
    weights = {
        NAMES[s]: storage.join(f, WEIGHTS)
        for s, f in context.inputs.items()
        if s in NAMES
    }
    folder, count = (
        storage.join(context.folder, "predictions"),
        len(context.config.classes),
    )
    write_predictions(weights, images, context.config, folder)
    students = {
        name: tables.open_detections(storage.join(folder, f"{name}.parquet"), count)
        for name in weights
    }
    results: Results = teachers(context, truth) | students
    metrics: dict[str, Any] = _measure(results, truth, context.config) | {
        "knowledge": _knowledge(context)
    }
    if storage.exists(storage.join(context.inputs["images"], "unknown.parquet")):
        unknown = truth_of(context.inputs["images"], "unknown").of(images["image_id"])
        metrics["map50_unknown"] = {
            n: _rounded(
                average_precision(
                    r, unknown, count, plus_one=context.config.evaluate.plus_one
                ).map
            )
            for n, r in results.items()
        }
    return metrics


def teachers(context: Context, images: Iterable[str]) -> Results:
    """Of those images that the cloud has answered every class score of each box: the
    cloud with its full tail, CLIP's labels on its boxes, and the free fusion of both at
    test time.
    """
    config = context.config
    answered = collected(context.inputs["collect"], "cloud", config)
    cloud = {i: answered[i] for i in images if i in answered}
    if config.collect.labeler == "none":
        return {"cloud": {i: every_class(d) for i, d in cloud.items()}}
    clip = collected(context.inputs["collect"], "clip_labels", config)
    return {
        "cloud": {i: every_class(d) for i, d in cloud.items()},
        "clip_labels": {
            i: every_class(clip_labelled(d, clip[i].probs)) for i, d in cloud.items()
        },
        "static_fusion": {
            i: every_class(static_fusion(d, clip[i].probs)) for i, d in cloud.items()
        },
    }


def _knowledge(context: Context) -> dict[str, dict[str, float]]:
    """How right each kind was on the training images, where those have truth."""
    truth, train = (
        truth_of(context.inputs["images"]),
        image_table(context.inputs["images"], "train")["image_id"],
    )
    known = truth.ids.filter(pc.is_in(truth.ids, value_set=train))
    return judged_kinds(
        tables.rows_of(
            storage.join(context.inputs["separate"], "separation.parquet"), known
        ),
        truth,
    )


def _measure(
    results: Results, truth: dict[str, Truth], config: PipelineConfig
) -> dict[str, Any]:
    count = len(config.classes)
    voc = {
        name: average_precision(found, truth, count, plus_one=config.evaluate.plus_one)
        for name, found in results.items()
    }
    return {
        "map50": {name: _rounded(report.map) for name, report in voc.items()},
        "per_class": {
            name: [_rounded(float(ap)) for ap in report.ap]
            for name, report in voc.items()
        },
        "coco_map50": {
            name: _rounded(coco_average_precision(found, truth, count).map50)
            for name, found in results.items()
        },
        "images": len(truth),
    }


def _rounded(value: float) -> float | None:
    return None if value != value else round(value, 4)
