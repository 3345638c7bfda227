"""What the cloud, CLIP and people have found in the images. Thresholds and choices of
labels are applied here, when the tables are read, so that changing them costs no call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from coin_ray import storage, tables
from coin_ray.config import Labels, PipelineConfig
from coin_ray.data.examples import LabelLookup
from coin_ray.evaluation.fusion_baselines import static_fusion
from coin_ray.fusion.vectors import CLOUD_VECTOR_FORMS
from coin_ray.structures import Detections
from coin_ray.tables import DetectionsTable

TEACHER_OUTPUTS = ("cloud", "clip", "clip_labels")
"""Names of the teacher outputs for one image that distillation gets: detections of the
cloud, of the CLIP detector, and the cloud's boxes as CLIP classifies them."""


def open_collected(
    collect_folder: str, name: str, config: PipelineConfig
) -> DetectionsTable:
    """Open ``cloud`` or ``clip_labels`` of all answered images, at every score."""
    uri = storage.join(collect_folder, f"{name}.parquet")
    return tables.open_detections(uri, len(config.classes))


def open_corrections(
    folders: Mapping[str, str], config: PipelineConfig
) -> Mapping[str, Detections]:
    """Open the labels of the images that people have reviewed; empty in a run without
    corrections.
    """
    folder = folders.get("corrections")
    if folder is None:
        return {}
    uri = storage.join(folder, "corrections.parquet")
    return tables.open_detections(uri, len(config.classes))


def normalize_foreground(detections: Detections) -> Detections:
    """Return the detections with probabilities that sum to 1 over the classes, and the
    background exactly 0: the published form. Scores stay as they are.
    """
    class_probs = detections.probs[:, :-1]
    total = class_probs.sum(1, keepdim=True).clamp(min=1e-12)
    return Detections(
        detections.boxes,
        detections.scores,
        detections.labels,
        F.pad(class_probs / total, (0, 1)),
    )


def passes_threshold(cloud: Detections, labels: Labels) -> Tensor:
    """Return for each of the cloud's detections [N] whether its score reaches the
    training threshold, or that of its class.
    """
    thresholds = labels.thresholds(cloud.num_classes)
    if thresholds is None:
        return cloud.scores >= labels.score_min
    return cloud.scores >= torch.tensor(thresholds)[cloud.labels]


def select_cloud_labels(cloud: Detections, labels: Labels) -> Detections:
    """Return the cloud's detections above the training threshold."""
    confident = cloud[passes_threshold(cloud, labels)]
    if labels.probabilities == "published":
        return normalize_foreground(confident)
    return confident


def prepare_cloud_for_separation(cloud: Detections, labels: Labels) -> Detections:
    """Return the cloud's detections above the training threshold, with the form of
    class vectors that separation gets.
    """
    convert = CLOUD_VECTOR_FORMS[labels.cloud_vectors]
    return convert(select_cloud_labels(cloud, labels))


def select_clip_labels(
    cloud: Detections, clip: Detections, labels: Labels
) -> Detections:
    """Return the cloud's boxes above the thresholds with CLIP's labels; row i of
    ``clip`` is CLIP's classification of row i of ``cloud``.
    """
    selected = passes_threshold(cloud, labels)
    selected &= clip.scores >= labels.clip_score_min
    if labels.clip_background == "drop":
        selected &= clip.probs.argmax(1) < clip.num_classes
    return clip[selected]


def select_clip_labels_with_background(
    cloud: Detections, clip: Detections, labels: Labels
) -> Detections:
    """Return the cloud's boxes above the threshold as CLIP classifies them: where CLIP
    sees background, the label is K, which no cloud label equals.
    """
    confident = clip[passes_threshold(cloud, labels)]
    best = confident.probs.max(1)
    return Detections(confident.boxes, best.values, best.indices, confident.probs)


def make_teacher_lookup(
    cloud: DetectionsTable,
    clip_detector: DetectionsTable,
    collect_folder: str,
    config: PipelineConfig,
) -> LabelLookup:
    """Return a function from an image id to its ``TEACHER_OUTPUTS``.

    ``clip_labels`` takes part in separation with the CLIP detector's results; it is
    empty unless ``separate.clip_labels``.
    """
    clip_labels = None
    if config.separate.clip_labels and config.collect.labeler != "none":
        clip_labels = open_collected(collect_folder, "clip_labels", config)
    return partial(
        _look_up_teacher_outputs, cloud, clip_detector, clip_labels, config.labels
    )


def _look_up_teacher_outputs(
    cloud: DetectionsTable,
    clip_detector: DetectionsTable,
    clip_labels: DetectionsTable | None,
    labels: Labels,
    image_id: str,
) -> dict[str, Detections]:
    cloud_detections = cloud[image_id]
    if clip_labels is None:
        classified = Detections.empty(cloud.num_classes)
    else:
        classified = select_clip_labels_with_background(
            cloud_detections, clip_labels[image_id], labels
        )
    return {
        "cloud": prepare_cloud_for_separation(cloud_detections, labels),
        "clip": clip_detector[image_id],
        "clip_labels": classified,
    }


def fuse_teacher_labels(
    image_ids: Iterable[str], folders: Mapping[str, str], config: PipelineConfig
) -> dict[str, Detections]:
    """Return by image id a person's labels where the image is reviewed, else the static
    fusion of the cloud and CLIP (the cloud alone without CLIP). Images without an answer
    are left out.
    """
    cloud = open_collected(folders["collect"], "cloud", config)
    reviewed = open_corrections(folders, config)
    clip = None
    if config.collect.labeler != "none":
        clip = open_collected(folders["collect"], "clip_labels", config)
    fused: dict[str, Detections] = {}
    for image_id in image_ids:
        if image_id in reviewed:
            fused[image_id] = reviewed[image_id]
        elif image_id not in cloud:
            continue
        elif clip is None:
            fused[image_id] = cloud[image_id]
        else:
            fused[image_id] = static_fusion(cloud[image_id], clip[image_id].probs)
    return fused
