"""The figures of the report: computed from finished tables, so that an old run gets
them without any prediction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import numpy as np

from coin_ray import storage, tables
from coin_ray.config import PipelineConfig
from coin_ray.evaluation.bootstrap import (
    bootstrap_average_precision,
    draw_bootstrap_samples,
    mean_ap,
    percentile_interval,
)
from coin_ray.evaluation.fusion_baselines import relabel_with_clip
from coin_ray.evaluation.operating import best_f1
from coin_ray.evaluation.teacher_agreement import teacher_confusion
from coin_ray.evaluation.voc import (
    Floats,
    MatchedDetections,
    match_detections,
    mean_over_classes,
)
from coin_ray.runs.steps import Context, Metrics
from coin_ray.stages.common.image_tables import open_annotations, read_images
from coin_ray.stages.common.teacher_outputs import open_collected
from coin_ray.stages.evaluate import (
    METHOD_OF_STEP,
    PredictionsByMethod,
    open_teacher_class_scores,
)
from coin_ray.structures import Detections
from coin_ray.tables import Truth

RECALLS = np.linspace(0, 1, 41)
ANSWERING_TEACHERS = ("cloud", "clip_labels")
"""Teachers that give each box one label; at a threshold they are judged by that label,
not by every class score."""
MatchesByMethod = dict[str, tuple[MatchedDetections, ...]]
"""Matched detections of each class by method."""


def read_test_annotations(context: Context[PipelineConfig]) -> dict[str, Truth]:
    """Return the truth of the annotated test images by image id."""
    images_folder = context.inputs["images"]
    image_ids = read_images(images_folder, "test")["image_id"]
    return open_annotations(images_folder).select(image_ids)


def open_detector_predictions(context: Context[PipelineConfig]) -> PredictionsByMethod:
    """Open the predictions of the trained detectors in the test images, which the
    evaluation wrote.
    """
    folder = storage.join(context.inputs["evaluate"], "predictions")
    predictions: PredictionsByMethod = {}
    for name in METHOD_OF_STEP.values():
        uri = storage.join(folder, f"{name}.parquet")
        if storage.exists(uri):
            predictions[name] = tables.open_detections(uri, len(context.config.classes))
    return predictions


def open_teacher_answers(context: Context[PipelineConfig]) -> PredictionsByMethod:
    """Open the teachers' answers as they are, with one label for each box."""
    config = context.config
    has_clip = config.collect.labeler != "none"
    names = ANSWERING_TEACHERS if has_clip else ANSWERING_TEACHERS[:1]
    return {
        name: open_collected(context.inputs["collect"], name, config) for name in names
    }


def match_methods(
    context: Context[PipelineConfig], truth: dict[str, Truth]
) -> tuple[MatchesByMethod, MatchesByMethod]:
    """Match each method's boxes with the truth: first with every class score, as mAP is
    measured; second as the method is used, with one label for each box of a teacher.
    """
    config = context.config

    def match(by_image: Mapping[str, Detections]) -> tuple[MatchedDetections, ...]:
        return match_detections(
            by_image,
            truth,
            len(config.classes),
            plus_one=config.evaluate.plus_one,
        )

    detectors = {
        name: match(by_image)
        for name, by_image in open_detector_predictions(context).items()
    }
    class_scores = {
        name: match(by_image)
        for name, by_image in open_teacher_class_scores(context, truth).items()
    }
    answers = open_teacher_answers(context)
    if "clip_labels" in answers:
        cloud = answers["cloud"]
        clip = answers["clip_labels"]
        answers["clip_labels"] = {
            image_id: relabel_with_clip(cloud[image_id], clip[image_id].probs)
            for image_id in truth
            if image_id in cloud
        }
    single_labels = {name: match(by_image) for name, by_image in answers.items()}
    return class_scores | detectors, single_labels | detectors


def compute_intervals(matches: MatchesByMethod, seed: int) -> Metrics:
    """Return 95 % intervals of every mAP50 and of its difference to the cloud's, and of
    the student's change by class.
    """
    num_images = len(matches["cloud"][0].required)
    samples = draw_bootstrap_samples(num_images, seed)
    ap_by_class = {
        name: bootstrap_average_precision(classes, samples)
        for name, classes in matches.items()
    }
    maps = {name: mean_ap(ap) for name, ap in ap_by_class.items()}
    intervals: Metrics = {
        "map50_interval": {name: _interval(draws) for name, draws in maps.items()},
        "vs_cloud_interval": {
            name: _interval(draws - maps["cloud"])
            for name, draws in maps.items()
            if name != "cloud"
        },
        "truth_boxes": [int(matched.required.sum()) for matched in matches["cloud"]],
    }
    if "student" in ap_by_class:
        change = ap_by_class["student"] - ap_by_class["cloud"]
        intervals["class_change_interval"] = [
            list(percentile_interval(draws) or (None, None)) for draws in change.T
        ]
    return intervals


def _interval(draws: Floats) -> dict[str, float]:
    bounds = percentile_interval(draws)
    if bounds is None:
        return {}
    low, high = bounds
    return {"low": round(low, 4), "high": round(high, 4)}


def measure_best_f1(matches: MatchesByMethod) -> dict[str, dict[str, float]]:
    """Return ``score``, ``precision``, ``recall`` and ``f1`` at the threshold with the
    best F1, by method.
    """
    points = {}
    for name, classes in matches.items():
        point = best_f1(classes)
        if point is not None:
            points[name] = {
                field: round(figure, 4) for field, figure in asdict(point).items()
            }
    return points


def precision_recall_curves(classes: tuple[MatchedDetections, ...]) -> Floats:
    """Return precision [K, R] at ``RECALLS``, made to fall with recall; rows of NaN for
    classes without truth.
    """
    curves = np.full((len(classes), len(RECALLS)), np.nan)
    for curve, matched in zip(curves, classes, strict=True):
        required = matched.required.sum()
        if not required:
            continue
        true_positives = matched.correct.cumsum()
        counts = np.arange(1, len(true_positives) + 1)
        precision = true_positives / counts
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        first_reached = np.searchsorted(true_positives / required, RECALLS - 1e-12)
        positions = np.minimum(first_reached, len(envelope))
        curve[:] = np.append(envelope, 0.0)[positions]
    return curves


def mean_curve(curves: Floats) -> list[float]:
    """Return the mean [R] over the classes that have truth."""
    return [round(mean_over_classes(precision), 4) for precision in curves.T]


def count_teacher_confusion(context: Context[PipelineConfig]) -> list[list[int]]:
    """Return the training boxes [K+1, K+1] by the cloud's label and CLIP's."""
    blocks = storage.stream_table(
        storage.join(context.inputs["separate"], "separation.parquet")
    )
    counts = teacher_confusion(blocks, len(context.config.classes))
    confusion: list[list[int]] = counts.tolist()
    return confusion
