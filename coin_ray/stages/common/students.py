"""Which network a detector of the run has: the CLIP detector always a Faster R-CNN,
students the one that ``distill.student`` names. Students that describe given boxes are
built here, those that were detectors before in ``coin_ray.models.students.building``.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from coin_ray.config import Detector, PipelineConfig
from coin_ray.config.students import is_region_student
from coin_ray.models.co_detr.collaborative import base_state_dict
from coin_ray.models.co_detr.model import load_detector_weights
from coin_ray.models.co_detr.regional import (
    DetrWithRegionHead,
    RegionalDetr,
    load_clip_detector_weights,
)
from coin_ray.models.co_detr.text import TextDetr
from coin_ray.models.faster_rcnn_clip.backbone import (
    BackboneModel,
    new_embeddings,
    new_tower,
)
from coin_ray.models.faster_rcnn_clip.first_weights import load_first_weights
from coin_ray.models.faster_rcnn_clip.model import ClipDetector, build_detector
from coin_ray.models.students.base import DetectorStudent
from coin_ray.models.students.building import empty_student, training_side
from coin_ray.stages.common.training_job import load_weights
from coin_ray.training.distill import Student
from coin_ray.training.own_opinion import OwnOpinion, load_own_opinion
from coin_ray.training.queries import forward_detr_student
from coin_ray.training.student_outputs import StudentForward, forward_student

CLIP_DETECTOR = "clip_detector"
DeployedDetector = (
    ClipDetector | TextDetr | DetrWithRegionHead | DetectorStudent | OwnOpinion
)


def new_clip_detector(
    backbone: BackboneModel, config: PipelineConfig, *, seed: int
) -> ClipDetector:
    """Return a new CLIP detector with the first weights of the config; what has none is
    the backbone's, or drawn from ``seed``. Raises InputError.
    """
    detector = build_detector(backbone, config.classes, config.detector, seed=seed)
    if config.detector.weights:
        load_first_weights(detector, config.detector.weights)
    return detector


def new_student(
    backbone: BackboneModel, config: PipelineConfig, *, seed: int
) -> Student:
    """Return a new target detector: the first weights of the config, the backbone's
    visual weights and class embeddings, everything else drawn from ``seed``.
    """
    if config.distill.student == "faster-rcnn":
        return new_clip_detector(backbone, config, seed=seed)
    student = _build_regional_detr(backbone, config, seed=seed)
    if config.detector.weights:
        clip_detector = new_clip_detector(backbone, config, seed=seed)
        load_clip_detector_weights(student, clip_detector.state_dict())
    return student


def empty_region_student(
    backbone: BackboneModel, config: PipelineConfig, *, seed: int
) -> Student:
    """Return a target detector whose weights are to be loaded."""
    if config.distill.student == "faster-rcnn":
        return build_detector(backbone, config.classes, config.detector, seed=seed)
    return _build_regional_detr(backbone, config, seed=seed)


def _build_regional_detr(
    backbone: BackboneModel, config: PipelineConfig, *, seed: int
) -> RegionalDetr:
    base = new_detr(backbone, config, seed=seed)
    return RegionalDetr(base, backbone.embedding_size, config.detector)


def new_detr(backbone: BackboneModel, config: PipelineConfig, *, seed: int) -> TextDetr:
    """Return a new Co-DETR without auxiliary head, on the backbone's tower."""
    torch.manual_seed(seed)
    embeddings = new_embeddings(backbone, config.classes, config.detector)
    tower = new_tower(backbone, config.detector)
    return TextDetr(
        tower,
        embeddings,
        len(config.classes),
        backbone.embedding_size,
        config.distill.co_detr,
        has_text_classes=config.distill.co_detr_classes == "text",
        mean=backbone.mean,
        std=backbone.std,
    )


def student_from_clip_detector(
    student: Student, weights: dict[str, torch.Tensor]
) -> Student:
    """Return ``student`` with all weights that it shares with the CLIP detector: every
    one, or of another network the tower and the prompts.
    """
    if isinstance(student, RegionalDetr):
        return load_clip_detector_weights(student, weights)
    student.load_state_dict(weights)
    return student


def student_input(config: PipelineConfig) -> Detector:
    """Return the detector's settings with the size of the student's training images."""
    if is_region_student(config.distill.student):
        return config.detector
    side = training_side(config.distill)
    return replace(config.detector, short_side=side, long_side=side)


def with_target_labels(config: PipelineConfig) -> PipelineConfig:
    """Return the config with the threshold of cloud boxes that the student learns."""
    if is_region_student(config.distill.student):
        return config
    labels = replace(config.labels, score_min=config.distill.targets.score_min)
    return replace(config, labels=labels)


def select_forward(student: Student) -> StudentForward:
    """Return the function that runs this kind of student in training."""
    if isinstance(student, RegionalDetr):
        return forward_detr_student
    return forward_student


def load_trained_detector(
    name: str, uri: str, backbone: BackboneModel | None, config: PipelineConfig
) -> DeployedDetector:
    """Return the trained detector ``name`` in evaluation mode, as it is deployed: a
    Co-DETR without its auxiliary head, or with it. ``backbone``: None where no detector
    of the run has one.
    """
    weights = load_weights(uri)
    has_own_opinion = config.separate.second_teacher == "student"
    if name == CLIP_DETECTOR and has_own_opinion:
        return load_own_opinion(config.distill, config.classes, weights)
    is_region_detector = is_region_student(config.distill.student)
    if name != CLIP_DETECTOR and not is_region_detector:
        detector_student = empty_student(config.distill, config.classes)
        detector_student.load_state_dict(weights)
        detector_student.eval()
        return detector_student
    assert backbone is not None
    if name == CLIP_DETECTOR or config.distill.student == "faster-rcnn":
        detector = build_detector(
            backbone, config.classes, config.detector, seed=config.seed
        )
        detector.load_state_dict(weights)
        return detector.eval()
    if config.distill.co_detr_detects == "regions":
        student = empty_region_student(backbone, config, seed=config.seed)
        student.load_state_dict(weights)
        assert isinstance(student, RegionalDetr)
        return DetrWithRegionHead(student).eval()
    detr = new_detr(backbone, config, seed=config.seed)
    load_detector_weights(detr, base_state_dict(weights))
    return detr.eval()
