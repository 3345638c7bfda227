"""Distil: the target detector learns from both teachers' separated detections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pyarrow as pa
import torch

from coin_ray import storage, tables
from coin_ray.config import PipelineConfig
from coin_ray.config.students import is_region_student
from coin_ray.evaluation.teacher_agreement import PAIRED_KINDS, paired_probabilities
from coin_ray.fusion.rules import Annotators, dawid_skene
from coin_ray.models.faster_rcnn_clip.backbone import load_backbone, starting_embeddings
from coin_ray.models.faster_rcnn_clip.model import ClipDetector
from coin_ray.models.students.building import load_pretrained_student
from coin_ray.models.students.yolox import YoloxStudent
from coin_ray.runs.steps import Context, Metrics
from coin_ray.stages.common.own_opinion import with_chosen_rendering
from coin_ray.stages.common.students import (
    new_student,
    select_forward,
    student_from_clip_detector,
    student_input,
    with_target_labels,
)
from coin_ray.stages.common.teacher_outputs import (
    TEACHER_OUTPUTS,
    make_teacher_lookup,
    open_collected,
    open_corrections,
)
from coin_ray.stages.common.training_job import (
    TrainingJob,
    WeightFiles,
    load_weights,
    run_training_job,
)
from coin_ray.stages.common.training_labels import (
    TrainingLabels,
    add_corrections,
    build_training_examples,
    is_held_out,
)
from coin_ray.stages.common.validation import plan_validation, validate_during_training
from coin_ray.stages.propagate import WEIGHTS
from coin_ray.stages.reporting.ckg_probabilities import CKG_FILE, combine_fusion_modules
from coin_ray.tables import SEPARATION
from coin_ray.training.ckg_targets import CkgTargetTraining
from coin_ray.training.direct import (
    StudentTraining,
    TargetTraining,
    separation_targets,
)
from coin_ray.training.distill import Distillation
from coin_ray.training.loop import Curve, TrainingTask


def run(
    context: Context[PipelineConfig],
    train: Callable[[TrainingJob], Curve] = run_training_job,
) -> Metrics:
    """Write ``detector.pt`` (the student), ``teacher.pt``, ``ckg.pt`` and
    ``curve.json``. The option ``held_out`` is the share of the images left out.
    """
    config = with_chosen_rendering(context.config, context.inputs)
    images_folder = context.inputs["images"]
    training = config.distill.fit
    learns_regions = is_region_student(config.distill.student)
    labels = _open_teacher_labels(context)
    held_out_share = context.options.get("held_out", 0.0)
    if held_out_share:
        labels = _without_held_out(labels, held_out_share)
    examples = build_training_examples(images_folder, labels, config.intensity_range)
    clip_detector_uri = storage.join(context.inputs["propagate"], WEIGHTS)
    annotators = fit_annotators(context.inputs["separate"], config)
    validation = plan_validation(
        config,
        images_folder,
        context.folder,
        name="student",
        state_key="student" if learns_regions else "average",
        training=training,
    )
    build_task: Callable[[], TrainingTask] = partial(
        build_distillation, config, clip_detector_uri, annotators
    )
    export_weights: Callable[[TrainingTask], WeightFiles] = export_distillation
    if not learns_regions:
        build_task = partial(build_target_distillation, config, annotators)
        export_weights = export_target_distillation
    job = TrainingJob(
        title=context.name,
        build_task=build_task,
        export_weights=export_weights,
        examples=examples,
        training=training,
        detector=student_input(config),
        seed=config.seed,
        folder=context.folder,
        on_checkpoint=validation.save_due_weights if validation else None,
    )
    with validate_during_training(validation):
        curve = train(job)
    return {"images": len(examples), "last": curve[-1]}


def _open_teacher_labels(context: Context[PipelineConfig]) -> TrainingLabels:
    """Return ``TEACHER_OUTPUTS`` of each answered image, and people's corrections."""
    config = context.config
    collect_folder = context.inputs["collect"]
    cloud = open_collected(collect_folder, "cloud", config)
    clip_detector = tables.open_detections(
        storage.join(context.inputs["separate"], "clip_detector.parquet"),
        len(config.classes),
    )
    lookup = make_teacher_lookup(
        cloud, clip_detector, collect_folder, with_target_labels(config)
    )
    reviewed = open_corrections(context.inputs, config)
    return add_corrections(cloud.ids, lookup, TEACHER_OUTPUTS, reviewed)


def _without_held_out(labels: TrainingLabels, share: float) -> TrainingLabels:
    image_ids = [
        image_id
        for image_id in labels.image_ids.to_pylist()
        if not is_held_out(image_id, share)
    ]
    return labels._replace(image_ids=pa.array(image_ids))


def fit_annotators(separate_folder: str, config: PipelineConfig) -> Annotators | None:
    """Return both teachers' confusions, estimated from all boxes that both saw in the
    training images before distillation; None if the fusion needs none.
    """
    if config.distill.fusion != "dawid_skene":
        return None
    cloud_probs, clip_probs = read_paired_probabilities(
        separate_folder, len(config.classes)
    )
    return dawid_skene(cloud_probs, clip_probs)


def read_paired_probabilities(
    separate_folder: str, num_classes: int, kinds: Sequence[str] = PAIRED_KINDS
) -> list[torch.Tensor]:
    """Return the cloud's and CLIP's probabilities [N, K+1] of boxes of these kinds in
    the ``separation.parquet`` of a folder.
    """
    uri = storage.join(separate_folder, "separation.parquet")
    pairs = [paired_probabilities(SEPARATION.empty_table(), num_classes)]
    for block in storage.stream_table(uri):
        pairs.append(paired_probabilities(block, num_classes, kinds))
    return [
        torch.from_numpy(np.concatenate(probs)) for probs in zip(*pairs, strict=True)
    ]


def build_distillation(
    config: PipelineConfig,
    clip_detector_uri: str,
    annotators: Annotators | None = None,
) -> Distillation:
    """Return the training task. The student starts from the backbone, as published, or
    from the CLIP detector. The EMA teacher is the CLIP detector if both are of one kind.
    """
    backbone = load_backbone(config)
    student = new_student(backbone, config, seed=config.seed + 1)
    clip_detector_weights = load_weights(clip_detector_uri)
    if config.distill.start_from == "clip_detector":
        student = student_from_clip_detector(student, clip_detector_weights)
    teacher = new_student(backbone, config, seed=config.seed)
    if isinstance(teacher, ClipDetector):
        teacher.load_state_dict(clip_detector_weights)
    embeddings = starting_embeddings(backbone, config)
    return Distillation(
        student,
        teacher,
        embeddings,
        config.distill,
        config.separate,
        annotators,
        select_forward(student),
    )


def build_target_distillation(
    config: PipelineConfig, annotators: Annotators | None = None
) -> StudentTraining:
    """Return the training task of a student that was a detector before: it starts from
    its own pretrained weights.
    """
    student = load_pretrained_student(
        config.distill, config.classes, seed=config.seed + 1
    )
    if config.distill.fusion == "ckg":
        assert isinstance(student, YoloxStudent)  # checked by the settings
        torch.manual_seed(config.seed + 1)
        return CkgTargetTraining(
            student, config.distill, config.separate, config.detector
        )
    return TargetTraining(
        student,
        separation_targets(config.distill, config.separate, annotators),
        config.distill.fit,
        average_rate=config.distill.teacher_rate,
        frozen_norms=config.distill.student_batch_norm == "frozen",
        zoom=config.distill.student_zoom,
    )


def export_target_distillation(task: TrainingTask) -> WeightFiles:
    """Return the averaged weights, which are delivered, and the last ones."""
    assert isinstance(task, StudentTraining)
    return {
        WEIGHTS: task.average.state_dict(),
        "teacher.pt": task.student.state_dict(),
    }


def export_distillation(task: TrainingTask) -> WeightFiles:
    """Return the weights of the student, the EMA teacher and the fusion by file name."""
    assert isinstance(task, Distillation)
    fusion = combine_fusion_modules(
        task.fusion.ckg, task.fusion.cloud_prototypes, task.fusion.clip_prototypes
    )
    return {
        WEIGHTS: task.student.state_dict(),
        "teacher.pt": task.teacher.state_dict(),
        CKG_FILE: fusion.state_dict(),
    }
