"""How well the teachers' probabilities are calibrated on the cloud's test boxes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from coin_ray.evaluation.calibration import expected_calibration_error, reliability_bins
from coin_ray.evaluation.separation_accuracy import overlapped_truth_labels
from coin_ray.evaluation.teacher_agreement import ckg_agreement_rates
from coin_ray.runs.steps import Metrics
from coin_ray.stages.evaluate import PredictionsByMethod
from coin_ray.structures import Detections
from coin_ray.tables import Truth


def measure_calibration(
    answers: PredictionsByMethod,
    ckg_probs: Mapping[str, Tensor],
    truth: Mapping[str, Truth],
    score_min: float,
) -> Metrics:
    """Return the calibration of the cloud, CLIP and CKG on the cloud's test boxes of at
    least ``score_min``, and with whom CKG agrees where cloud and CLIP differ.

    ``answers``: one label for each box, by teacher. ``ckg_probs`` [N, K+1] by image id;
    may be empty.
    """
    cloud = answers["cloud"]
    if "clip_labels" not in answers:
        image_ids = sorted(image_id for image_id in truth if image_id in cloud)
        labels = _true_labels(cloud, truth, image_ids, score_min)
        return _calibration(
            {"cloud": _confident_probs(cloud, image_ids, score_min)}, labels
        )
    clip = answers["clip_labels"]
    image_ids = sorted(
        image_id
        for image_id in truth
        if image_id in cloud
        and image_id in clip
        and (not ckg_probs or image_id in ckg_probs)
    )
    cloud_by_id = {image_id: cloud[image_id] for image_id in image_ids}
    labels = _true_labels(cloud_by_id, truth, image_ids, score_min)
    clip_probs = [
        clip[image_id].probs[cloud_by_id[image_id].scores >= score_min]
        for image_id in image_ids
    ]
    probs = {
        "cloud": _confident_probs(cloud_by_id, image_ids, score_min),
        "clip": _concatenate(clip_probs),
    }
    figures: Metrics = {}
    if ckg_probs:
        probs["ckg"] = _concatenate([ckg_probs[image_id] for image_id in image_ids])
        figures["ckg_sides"] = ckg_agreement_rates(
            probs["cloud"], probs["clip"], probs["ckg"], labels
        )
    return figures | _calibration(probs, labels)


def _calibration(probs_by_teacher: Mapping[str, Tensor], labels: Tensor) -> Metrics:
    """Compare the best class of each vector with the true labels [N]."""
    errors = {}
    bins_by_teacher = {}
    for teacher, probs in probs_by_teacher.items():
        if not len(probs):
            continue
        confidence, best_class = probs.max(1)
        correct = best_class == labels
        bins = reliability_bins(confidence.double().numpy(), correct.numpy())
        errors[teacher] = round(expected_calibration_error(bins), 4)
        bins_by_teacher[teacher] = [asdict(reliability_bin) for reliability_bin in bins]
    return {"calibration_error": errors, "reliability": bins_by_teacher}


def _confident_probs(
    by_image: Mapping[str, Detections], image_ids: list[str], score_min: float
) -> Tensor:
    probs = []
    for image_id in image_ids:
        detections = by_image[image_id]
        probs.append(detections.probs[detections.scores >= score_min])
    return _concatenate(probs)


def _true_labels(
    by_image: Mapping[str, Detections],
    truth: Mapping[str, Truth],
    image_ids: list[str],
    score_min: float,
) -> Tensor:
    """Return the true labels [N] of the boxes of at least ``score_min``; background
    where there is no object.
    """
    labels = [torch.zeros(0, dtype=torch.int64)]
    for image_id in image_ids:
        detections = by_image[image_id]
        boxes = detections.boxes[detections.scores >= score_min]
        labels.append(
            overlapped_truth_labels(boxes, truth[image_id], detections.num_classes)
        )
    return torch.cat(labels)


def _concatenate(probs: list[Tensor]) -> Tensor:
    return torch.cat(probs) if probs else torch.zeros(0, 1)
