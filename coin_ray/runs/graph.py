"""The steps of an adaptation: what each depends on, and what identifies its results."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from coin_ray import storage
from coin_ray.config import Detector, Distill, Labeler, PipelineConfig, Propagate
from coin_ray.config.fingerprints import to_identity
from coin_ray.config.students import is_region_student
from coin_ray.runs.steps import Step

ORDER = (
    "images",
    "corrections",
    "collect",
    "propagate",
    "separate",
    "distill",
    "pseudo_label",
    "oracle",
    "choose",
    "evaluate",
    "export",
    "report",
)


def build_steps(config: PipelineConfig, *, baselines: bool = False) -> dict[str, Step]:
    """Return all steps by name, in the order in which they run.

    Corrections, if there are any, are checked before a call is paid. ``baselines`` adds
    two students with the same network, first weights and number of steps: one trained
    on plain cloud labels, one on the truth. With ``strategy`` auto the first is always
    trained, and ``choose`` delivers the better of it and COIN's.
    """
    identities = _Identities(config)
    teaching = _teaching_steps(config, identities)
    images, collect = teaching.images, teaching.collect
    propagate, separate = teaching.propagate, teaching.separate
    corrections = teaching.corrections
    distill = Step(
        "distill",
        "distill",
        identities.distillation,
        (images, collect, propagate, separate, *corrections),
    )
    pseudo_label, oracle = _baseline_steps(config, identities, teaching)
    plain: tuple[Step, ...] = (pseudo_label, oracle) if baselines else ()
    choice: tuple[Step, ...] = ()
    if config.strategy != "coin":
        plain = plain or (pseudo_label,)
        candidates = (images, separate, distill, pseudo_label)
        choice = (Step("choose", "choose", identities.choice, candidates),)
    evaluated = (images, collect, separate, propagate, distill, *plain, *choice)
    evaluate = Step("evaluate", "evaluate", identities.evaluation, evaluated)
    export = Step("export", "export", identities.export, choice or (distill,))
    report = Step(
        "report",
        "report",
        config.preset,
        (*evaluated, evaluate, export, *corrections),
        version=2,
    )
    steps = [images, *corrections, collect, propagate, separate, distill]
    steps += [*plain, *choice, evaluate, export, report]
    return {step.name: step for step in steps}


@dataclass(frozen=True)
class _TeachingSteps:
    """The steps that all students share."""

    images: Step
    corrections: tuple[Step, ...]
    """One step, or none."""
    collect: Step
    propagate: Step
    separate: Step


def _teaching_steps(config: PipelineConfig, identities: _Identities) -> _TeachingSteps:
    images = Step("images", "images", config.data)
    corrections = _corrections_steps(config, images)
    collect = Step("collect", "collect", identities.collection, (images,))
    own_opinion = config.separate.second_teacher == "student"
    propagate = Step(
        "propagate",
        "propagate",
        identities.propagation,
        (images,) if own_opinion else (images, collect, *corrections),
        options={"labels": "clip"},
    )
    separate = Step(
        "separate",
        "separate",
        identities.separation,
        (images, collect, propagate, *corrections),
        version=2,
    )
    return _TeachingSteps(images, corrections, collect, propagate, separate)


def _baseline_steps(
    config: PipelineConfig, identities: _Identities, teaching: _TeachingSteps
) -> tuple[Step, Step]:
    """Return the trainings of the student's network on plain cloud labels and on the
    truth.
    """
    images = teaching.images
    needs_weights = config.distill.student_rendering == "auto"
    start = (teaching.propagate,) if needs_weights else ()
    pseudo_label = Step(
        "pseudo_label",
        "propagate",
        identities.pseudo_label,
        (images, teaching.collect, *teaching.corrections, *start),
        options={"labels": "cloud"},
    )
    oracle = Step(
        "oracle",
        "propagate",
        identities.oracle,
        (images, *start),
        options={"labels": "truth"},
    )
    return pseudo_label, oracle


def delivered_step(steps: Mapping[str, Step]) -> Step:
    """Return the step whose weights are the delivered student's."""
    return steps.get("choose", steps["distill"])


def baseline_training(config: PipelineConfig) -> Propagate:
    """Return the settings of the baselines' training on plain labels.

    Baselines train with the student's schedule, over as many steps as the student makes
    after its weights leave CLIP.
    """
    training = config.distill.fit
    steps_before = 0
    leaves_clip = is_region_student(config.distill.student)
    if leaves_clip and config.distill.start_from == "clip_detector":
        steps_before = config.propagate.fit.steps
    baseline = replace(
        training,
        steps=steps_before + training.steps,
        milestones=tuple(steps_before + m for m in training.milestones),
    )
    return replace(config.propagate, soft_labels=False, fit=baseline)


class _Identities:
    """The configs that each step's results depend on."""

    def __init__(self, config: PipelineConfig) -> None:
        input_size = (config.detector.short_side, config.detector.long_side)
        detector = (
            config.clip,
            config.mobilenet,
            config.detector,
            config.classes,
            config.seed,
            *_first_weights_digest(config.detector),
        )
        # "cloud_vectors" is a setting of labels that separation reads, not propagation
        labels = to_identity(config.labels)
        labels.pop("cloud_vectors", None)
        separation = to_identity(config.separate)
        separation["cloud_vectors"] = config.labels.cloud_vectors
        baseline = baseline_training(config)
        student = config.distill.student
        network: tuple[Any, ...] = ()
        deployed_head = ""
        if student == "co-detr":
            network = (
                student,
                config.distill.co_detr,
                config.distill.co_detr_classes,
            )
            deployed_head = config.distill.co_detr_detects
        elif not is_region_student(student):
            network = _detector_student_start(config.distill)

        self.collection = (
            config.cloud,
            config.classes,
            config.collect,
            config.labeler_clip,
            input_size,
            *_other_clouds(config),
            *_own_labeler(config),
            *config.class_prompts,
        )
        self.propagation: tuple[Any, ...] = (detector, labels, config.propagate)
        if config.separate.second_teacher == "student":
            self.propagation = (
                "student",
                config.classes,
                config.seed,
                config.distill.student_rendering,
                *network,
            )
        self.separation = (labels, separation)
        self.distillation = (
            detector,
            labels,
            separation,
            config.distill,
            *_student_weights_digest(config.distill),
        )
        self.pseudo_label = (detector, labels, baseline, *network)
        self.oracle = (detector, baseline, *network)
        self.choice = (config.classes, config.detector, deployed_head)
        self.evaluation = (config.classes, config.evaluate, deployed_head)
        self.export = (config.detector, deployed_head)


def _detector_student_start(distill: Distill) -> tuple[Any, ...]:
    """Return what a student that was a detector before depends on, beside its labels."""
    return (
        distill.student,
        distill.student_side,
        distill.student_batch_norm,
        distill.student_weight_classes,
        distill.teacher_rate,
        *((distill.student_rendering,) if distill.student_rendering != "plain" else ()),
        *((distill.student_zoom,) if distill.student_zoom != (1.0, 1.0) else ()),
        *_student_weights_digest(distill),
    )


def _first_weights_digest(detector: Detector) -> tuple[str, ...]:
    """Return a hash of the file that the run's detectors start from, if there is one."""
    if not detector.weights:
        return ()
    return (_file_digest(detector.weights),)


def _student_weights_digest(distill: Distill) -> tuple[str, ...]:
    """Return a hash of the file the student starts from, if it is a file."""
    if not distill.student_weights:
        return ()
    return (_file_digest(distill.student_weights),)


def _corrections_steps(config: PipelineConfig, images: Step) -> tuple[Step, ...]:
    """Return the step that reads people's corrections, if the run has any."""
    if not config.corrections:
        return ()
    # imported only if needed, since it imports every label format
    from coin_ray.data.review.corrections import reviews_digest

    digests = [reviews_digest(uri) for uri in config.corrections]
    identity = (digests, config.classes)
    return (Step("corrections", "corrections", identity, (images,)),)


def _other_clouds(config: PipelineConfig) -> list[Any]:
    """Return what else cloud labels depend on.

    These are further clouds, the fusion of several, and the contents of label maps.
    """
    identity: list[Any] = []
    if config.more_clouds:
        identity.append(config.more_clouds)
    if len(config.clouds) > 1:
        identity.append(config.ensemble)
    label_maps = [cloud.label_map for cloud in config.clouds]
    return identity + [_file_digest(uri) for uri in label_maps if uri is not None]


def _own_labeler(config: PipelineConfig) -> list[Any]:
    """Return what the second opinions depend on if their model is not ``config.clip``."""
    labeler = config.labeler
    if labeler == Labeler():
        return []
    label_maps = [labeler.label_map] if labeler.label_map else []
    return [labeler, *(_file_digest(uri) for uri in label_maps)]


def _file_digest(uri: str) -> str:
    """Return a hash of the file, or "" if it can not be read.

    The step that needs an unreadable file raises the error.
    """
    try:
        return hashlib.sha256(storage.read_bytes(uri)).hexdigest()[:16]
    except OSError:
        return ""
