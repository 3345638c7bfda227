"""Build students that were detectors before, by their name in ``distill.student``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from typing_extensions import TypeIs

from coin_ray.config import Distill
from coin_ray.config.students import YOLOX_STUDENTS
from coin_ray.errors import ConfigError, InputError
from coin_ray.models.students.base import DetectorStudent, PostProcess
from coin_ray.models.students.transformers_student import TransformersStudent
from coin_ray.models.students.transformers_weights import (
    check_transformers_student,
    describe_transformers_student,
    empty_transformers_student,
    is_transformers_student,
    load_transformers_student,
    student_from_transformers_config,
)
from coin_ray.models.students.yolox import YoloxStudent
from coin_ray.models.students.yolox_network import YOLOX_SIZES
from coin_ray.models.students.yolox_weights import load_yolox_student

TRANSFORMERS_SIDE = 640
"""Longest side of training images for transformers' detectors, which resize them."""


def is_detector_student(detector: object) -> TypeIs[DetectorStudent]:
    """Tell whether a detector is a student that learns from ``Targets``."""
    return hasattr(detector, "detect_tensors")


def load_pretrained_student(
    settings: Distill, classes: Sequence[str], seed: int
) -> DetectorStudent:
    """Load the student with its pretrained weights; rows of unknown classes are drawn
    from ``seed``. Raises InputError or ConfigError if it can't start from them.
    """
    name = settings.student
    if name in YOLOX_STUDENTS:
        student = load_yolox_student(
            name,
            settings.student_weights,
            classes,
            settings.student_weight_classes,
            settings.student_side,
            seed,
        )
        if settings.student_rendering != "auto":
            student.set_rendering(settings.student_rendering)
        return student
    if not is_transformers_student(name):
        raise InputError(
            f"distill.student {name}: no such folder, or no config.json of a"
            " transformers detector in it"
        )
    if settings.student_weights:
        raise ConfigError(
            f"distill.student_weights is for YOLOX students; for {name} give"
            " --distill.student hf:OWNER/NAME or a folder"
        )
    return load_transformers_student(name, classes, seed=seed)


def empty_student(settings: Distill, classes: Sequence[str]) -> DetectorStudent:
    """Build the student; its weights are to be loaded."""
    if settings.student in YOLOX_STUDENTS:
        return YoloxStudent(settings.student, len(classes), settings.student_side)
    return empty_transformers_student(settings.student, classes)


def check_pretrained_student(settings: Distill, classes: Sequence[str]) -> None:
    """Raise InputError or ConfigError if the student can't start from its pretrained
    weights: they can't be reached or read, or are of another model or other classes.
    """
    if is_transformers_student(settings.student) and not settings.student_weights:
        check_transformers_student(settings.student, classes)
    else:
        load_pretrained_student(settings, classes, seed=0)


def training_side(settings: Distill) -> int:
    """Return the side of the square that training images are made to fit."""
    if settings.student_side:
        return settings.student_side
    size = YOLOX_SIZES.get(settings.student)
    return TRANSFORMERS_SIDE if size is None else size.side


def describe_student(student: DetectorStudent) -> dict[str, Any]:
    """Return what ``student_from_description`` needs, as plain data for a JSON file."""
    if isinstance(student, YoloxStudent):
        return {
            "network": student.name,
            "side": student.side,
            "post_process": asdict(student.post_process),
        }
    assert isinstance(student, TransformersStudent)
    return describe_transformers_student(student)


def student_from_description(
    description: Mapping[str, Any], num_classes: int
) -> DetectorStudent:
    """Build the described student; its weights are to be loaded. Raises ConfigError if
    it needs transformers and there is none.
    """
    if "transformers" in description:
        return student_from_transformers_config(description)
    student = YoloxStudent(description["network"], num_classes, description["side"])
    student.post_process = PostProcess(**description["post_process"])
    return student
