"""Propagate: train a detector on labels as they are. CLIP's labels make the CLIP
detector; the cloud's or the truth make the baselines.
"""

from __future__ import annotations

from functools import partial

from coin_ray.config import PipelineConfig, Propagate
from coin_ray.config.students import is_region_student
from coin_ray.models.faster_rcnn_clip.backbone import load_backbone, starting_embeddings
from coin_ray.models.students.building import load_pretrained_student
from coin_ray.runs.graph import baseline_training
from coin_ray.runs.steps import Context, Metrics
from coin_ray.stages.common.own_opinion import (
    with_chosen_rendering,
    write_own_opinion,
)
from coin_ray.stages.common.students import (
    CLIP_DETECTOR,
    new_clip_detector,
    new_student,
    select_forward,
    student_input,
)
from coin_ray.stages.common.training_job import (
    TrainingJob,
    WeightFiles,
    run_training_job,
)
from coin_ray.stages.common.training_labels import (
    LabelSource,
    build_training_examples,
    count_labels,
    open_training_labels,
)
from coin_ray.stages.common.validation import plan_validation, validate_during_training
from coin_ray.training.direct import TargetTraining, plain_targets
from coin_ray.training.loop import TrainingTask
from coin_ray.training.propagate import Propagation

WEIGHTS = "detector.pt"
"""File of a detector's weights in the folder of the step that trained it."""


def run(context: Context[PipelineConfig]) -> Metrics:
    """Write ``detector.pt`` and ``curve.json``. Where the starting student is the second
    teacher, nothing is trained on CLIP's labels.
    """
    is_second_teacher = context.options["labels"] == "clip"
    if is_second_teacher and context.config.separate.second_teacher == "student":
        return write_own_opinion(context, WEIGHTS)
    return train_on_labels(context)


def train_on_labels(context: Context[PipelineConfig]) -> Metrics:
    """Train a detector on labels as they are."""
    config = with_chosen_rendering(context.config, context.inputs)
    images_folder = context.inputs["images"]
    source: LabelSource = context.options["labels"]
    propagate = config.propagate if source == "clip" else baseline_training(config)
    labels = open_training_labels(source, context.inputs, config)
    examples = build_training_examples(images_folder, labels, config.intensity_range)
    trains_targets = source != "clip" and not is_region_student(config.distill.student)
    validation = plan_validation(
        config,
        images_folder,
        context.folder,
        name=CLIP_DETECTOR if source == "clip" else context.name,
        state_key="average" if trains_targets else "detector",
        training=propagate.fit,
    )
    job = TrainingJob(
        title=context.name,
        build_task=partial(build_propagation, config, propagate, source),
        export_weights=export_propagation,
        examples=examples,
        training=propagate.fit,
        detector=config.detector if source == "clip" else student_input(config),
        seed=config.seed,
        folder=context.folder,
        on_checkpoint=validation.save_due_weights if validation else None,
    )
    with validate_during_training(validation):
        curve = run_training_job(job)
    return {
        "images": len(examples),
        "labels": count_labels(source, context.inputs, config),
        "last": curve[-1],
    }


def build_propagation(
    config: PipelineConfig, propagate: Propagate, source: LabelSource
) -> Propagation | TargetTraining:
    """Return the training task: the CLIP detector is a Faster R-CNN, baselines have the
    student's network and start.
    """
    if source != "clip" and not is_region_student(config.distill.student):
        return build_plain_training(config, propagate)
    backbone = load_backbone(config)
    new_detector = new_clip_detector if source == "clip" else new_student
    detector = new_detector(backbone, config, seed=config.seed)
    return Propagation(
        detector,
        starting_embeddings(backbone, config),
        propagate,
        select_forward(detector),
    )


def build_plain_training(
    config: PipelineConfig, propagate: Propagate
) -> TargetTraining:
    """Return the training of a student that was a detector before on certain labels."""
    distill = config.distill
    return TargetTraining(
        load_pretrained_student(distill, config.classes, seed=config.seed + 1),
        plain_targets,
        propagate.fit,
        average_rate=distill.teacher_rate,
        frozen_norms=distill.student_batch_norm == "frozen",
        zoom=distill.student_zoom,
    )


def export_propagation(task: TrainingTask) -> WeightFiles:
    """Return the trained detector's weights by file name."""
    if isinstance(task, TargetTraining):
        return {WEIGHTS: task.average.state_dict()}
    assert isinstance(task, Propagation)
    return {WEIGHTS: task.detector.state_dict()}
