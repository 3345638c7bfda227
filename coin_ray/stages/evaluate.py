"""Evaluate: every teacher, baseline and student on the test images. The only stage that
reads their truth.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import pyarrow.compute as pc

from coin_ray import storage, tables
from coin_ray.config import PipelineConfig
from coin_ray.evaluation.coco import coco_average_precision
from coin_ray.evaluation.fusion_baselines import (
    expand_to_all_classes,
    relabel_with_clip,
    static_fusion,
)
from coin_ray.evaluation.separation_accuracy import separation_accuracy
from coin_ray.evaluation.voc import average_precision
from coin_ray.runs.steps import Context, Metrics
from coin_ray.stages.common.image_tables import open_annotations, read_images
from coin_ray.stages.common.prediction import write_predictions
from coin_ray.stages.common.teacher_outputs import open_collected
from coin_ray.stages.propagate import WEIGHTS
from coin_ray.structures import Detections
from coin_ray.tables import Truth

METHOD_OF_STEP = {
    "propagate": "clip_detector",
    "distill": "student",
    "pseudo_label": "pseudo_label",
    "oracle": "oracle",
}
"""Names of the trained detectors by the step that trains them."""
METHOD_OF_STEP_WITH_CHOICE = METHOD_OF_STEP | {"distill": "coin", "choose": "student"}
"""The same where one of several students is delivered."""
PredictionsByMethod = dict[str, Mapping[str, Detections]]
"""Detections by method and image id."""


def run(context: Context[PipelineConfig]) -> Metrics:
    """Write ``predictions/NAME.parquet``; the metrics hold VOC and COCO AP50 by method
    and class. Without truth there are no figures.
    """
    config = context.config
    images_folder = context.inputs["images"]
    images = read_images(images_folder, "test")
    truth = open_annotations(images_folder).select(images["image_id"])
    if not truth:
        return {
            "map50": {},
            "note": "no annotated test images: nothing to measure against",
        }
    method_of_step = METHOD_OF_STEP
    if "choose" in context.inputs:
        method_of_step = METHOD_OF_STEP_WITH_CHOICE
    weights = {
        method_of_step[step]: storage.join(folder, WEIGHTS)
        for step, folder in context.inputs.items()
        if step in method_of_step
    }
    folder = storage.join(context.folder, "predictions")
    write_predictions(weights, images, config, folder)
    predictions = open_teacher_class_scores(context, truth)
    for name in weights:
        uri = storage.join(folder, f"{name}.parquet")
        predictions[name] = tables.open_detections(uri, len(config.classes))
    metrics = _measure_methods(predictions, truth, config)
    metrics["knowledge"] = _measure_separation(context)
    if storage.exists(storage.join(images_folder, "unknown.parquet")):
        unknown = open_annotations(images_folder, "unknown").select(images["image_id"])
        metrics["map50_unknown"] = _measure_map50(predictions, unknown, config)
    return metrics


def open_teacher_class_scores(
    context: Context[PipelineConfig], image_ids: Iterable[str]
) -> PredictionsByMethod:
    """Return every class score of each box in the images that the cloud has answered:
    the cloud's, CLIP's on the cloud's boxes, and the static fusion of both.
    """
    config = context.config
    collect_folder = context.inputs["collect"]
    answered = open_collected(collect_folder, "cloud", config)
    cloud = {
        image_id: answered[image_id] for image_id in image_ids if image_id in answered
    }
    predictions: PredictionsByMethod = {"cloud": _expand(cloud)}
    if config.collect.labeler == "none":
        return predictions
    clip = open_collected(collect_folder, "clip_labels", config)
    clip_labels = {}
    fused = {}
    for image_id, detections in cloud.items():
        clip_probs = clip[image_id].probs
        clip_labels[image_id] = relabel_with_clip(detections, clip_probs)
        fused[image_id] = static_fusion(detections, clip_probs)
    predictions["clip_labels"] = _expand(clip_labels)
    predictions["static_fusion"] = _expand(fused)
    return predictions


def _expand(by_image: Mapping[str, Detections]) -> dict[str, Detections]:
    return {
        image_id: expand_to_all_classes(detections)
        for image_id, detections in by_image.items()
    }


def _measure_separation(
    context: Context[PipelineConfig],
) -> dict[str, dict[str, float]]:
    """Return how often each kind was right in the training images that have truth."""
    annotations = open_annotations(context.inputs["images"])
    training_ids = read_images(context.inputs["images"], "train")["image_id"]
    annotated = annotations.ids.filter(
        pc.is_in(annotations.ids, value_set=training_ids)
    )
    uri = storage.join(context.inputs["separate"], "separation.parquet")
    return separation_accuracy(tables.stream_rows(uri, annotated), annotations)


def _measure_methods(
    predictions: PredictionsByMethod, truth: dict[str, Truth], config: PipelineConfig
) -> Metrics:
    num_classes = len(config.classes)
    plus_one = config.evaluate.plus_one
    map50: dict[str, float | None] = {}
    per_class: dict[str, list[float | None]] = {}
    coco_map50: dict[str, float | None] = {}
    for name, by_image in predictions.items():
        voc = average_precision(by_image, truth, num_classes, plus_one=plus_one)
        coco = coco_average_precision(by_image, truth, num_classes)
        map50[name] = _rounded_or_none(voc.map)
        per_class[name] = [_rounded_or_none(float(ap)) for ap in voc.ap]
        coco_map50[name] = _rounded_or_none(coco.map50)
    return {
        "map50": map50,
        "per_class": per_class,
        "coco_map50": coco_map50,
        "images": len(truth),
    }


def _measure_map50(
    predictions: PredictionsByMethod, truth: dict[str, Truth], config: PipelineConfig
) -> dict[str, float | None]:
    map50 = {}
    for name, by_image in predictions.items():
        report = average_precision(
            by_image, truth, len(config.classes), plus_one=config.evaluate.plus_one
        )
        map50[name] = _rounded_or_none(report.map)
    return map50


def _rounded_or_none(figure: float) -> float | None:
    return None if math.isnan(figure) else round(figure, 4)
