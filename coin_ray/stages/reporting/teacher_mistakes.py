"""What the teachers would have taught in the images that people have corrected."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from coin_ray import storage, tables
from coin_ray.config import PipelineConfig
from coin_ray.evaluation.operating import count_by_image
from coin_ray.evaluation.voc import match_detections
from coin_ray.runs.steps import Context, Metrics
from coin_ray.stages.common.teacher_outputs import (
    open_corrections,
    select_clip_labels,
    select_cloud_labels,
)
from coin_ray.stages.evaluate import PredictionsByMethod
from coin_ray.stages.reporting.measurements import open_teacher_answers
from coin_ray.structures import Detections
from coin_ray.tables import Truth


def count_teacher_mistakes(context: Context[PipelineConfig]) -> Metrics:
    """Return how many images people have labelled, and for each teacher's labels there:
    ``boxes``, those ``wrong``, objects ``missed``, and ``images`` with either. Empty for
    a run without corrections.
    """
    num_classes = len(context.config.classes)
    reviewed = open_corrections(context.inputs, context.config)
    truth = {
        image_id: _as_truth(correction) for image_id, correction in reviewed.items()
    }
    if not truth:
        return {}
    taught = _taught_labels(context, list(truth))
    return {
        "images": len(truth),
        "boxes": sum(len(objects.boxes) for objects in truth.values()),
        "empty": sum(not len(objects.boxes) for objects in truth.values()),
        "teachers": {
            name: _count_mistakes(by_image, truth, num_classes)
            for name, by_image in taught.items()
        },
    }


def _as_truth(correction: Detections) -> Truth:
    difficult = torch.zeros(len(correction), dtype=torch.bool)
    return Truth(correction.boxes, correction.labels, difficult)


def _taught_labels(
    context: Context[PipelineConfig], image_ids: list[str]
) -> PredictionsByMethod:
    """Return the labels that propagation and separation would have got from each
    teacher; images without an answer are left out.
    """
    config = context.config
    answers = open_teacher_answers(context)
    cloud = answers["cloud"]
    answered = [image_id for image_id in image_ids if image_id in cloud]
    taught: PredictionsByMethod = {
        "cloud": {
            image_id: select_cloud_labels(cloud[image_id], config.labels)
            for image_id in answered
        }
    }
    if "clip_labels" in answers:
        clip = answers["clip_labels"]
        taught["clip_labels"] = {
            image_id: select_clip_labels(cloud[image_id], clip[image_id], config.labels)
            for image_id in answered
        }
    taught["clip_detector"] = _confident_clip_detections(context, image_ids)
    return taught


def _confident_clip_detections(
    context: Context[PipelineConfig], image_ids: list[str]
) -> dict[str, Detections]:
    config = context.config
    clip_detector = tables.open_detections(
        storage.join(context.inputs["separate"], "clip_detector.parquet"),
        len(config.classes),
    )
    confident = {}
    for image_id in image_ids:
        detections = clip_detector.get(image_id)
        if detections is not None:
            mask = detections.scores > config.separate.clip_score_min
            confident[image_id] = detections[mask]
    return confident


def _count_mistakes(
    by_image: Mapping[str, Detections], truth: Mapping[str, Truth], num_classes: int
) -> dict[str, int]:
    counts = count_by_image(match_detections(by_image, truth, num_classes), 0.0)
    missed = counts.truth - counts.detected
    has_mistake = (missed > 0) | (counts.wrong > 0)
    return {
        "boxes": int((counts.detected + counts.wrong).sum()),
        "wrong": int(counts.wrong.sum()),
        "missed": int(missed.sum()),
        "images": int(has_mistake.sum()),
    }
