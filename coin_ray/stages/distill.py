"""Distil: the target detector learns from both teachers' separated knowledge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from coin_ray import storage, tables
from coin_ray.config import PipelineConfig
from coin_ray.evaluation.teacher_agreement import PAIRED, paired
from coin_ray.fusion.rules import Annotators, dawid_skene
from coin_ray.models.faster_rcnn_clip.backbone import load_backbone, starting_embeddings
from coin_ray.models.faster_rcnn_clip.model import ClipDetector
from coin_ray.runs.steps import Context
from coin_ray.stages.common.students import (
    look_of,
    new_student,
    student_from_clip_detector,
)
from coin_ray.stages.common.teacher_outputs import (
    OPINIONS,
    collected,
    corrected,
    held_out,
    opinions,
    training_examples,
    with_corrections,
)
from coin_ray.stages.common.training_job import Fit, fit, load_weights
from coin_ray.stages.common.validation import beside, looks
from coin_ray.stages.propagate import WEIGHTS
from coin_ray.stages.reporting.ckg_probabilities import CKG, trained_fusion
from coin_ray.tables import SEPARATION
from coin_ray.training.distill import Distillation
from coin_ray.training.loop import Curve, Task


def run(context: Context, train: Callable[[Fit], Curve] = fit) -> dict[str, Any]:
    """Write ``detector.pt`` (the student), ``teacher.pt``, ``ckg.pt`` and
    ``curve.json``. The option ``held_out``: share of the images left out.
    """
    config = context.config
    cloud = collected(context.inputs["collect"], "cloud", config)
    clip = tables.open_detections(
        storage.join(context.inputs["separate"], "clip_detector.parquet"),
        len(config.classes),
    )
    know = opinions(cloud, clip, context.inputs["collect"], config)
    known, know, reviewed = with_corrections(
        cloud.ids, know, OPINIONS, corrected(context.inputs, config)
    )
    left_out = context.options.get("held_out", 0.0)
    used = (
        pa.array([i for i in known.to_pylist() if not held_out(i, left_out)])
        if left_out
        else known
    )
    examples = training_examples(context.inputs["images"], used, know, reviewed)
    teacher = storage.join(context.inputs["propagate"], WEIGHTS)
    build = partial(
        make, config, teacher, annotators_of(context.inputs["separate"], config)
    )
    watched = looks(
        config,
        context.inputs["images"],
        context.folder,
        "student",
        "student",
        config.distill.fit,
    )
    saved = watched.leave if watched else None
    work = Fit(
        context.name,
        build,
        finish,
        examples,
        config.distill.fit,
        config.detector,
        config.seed,
        context.folder,
        saved,
    )
    with beside(watched):
        curve = train(work)
    return {"images": len(examples), "last": curve[-1]}


def annotators_of(separate: str, config: PipelineConfig) -> Annotators | None:
    """Both teachers' confusions, from all boxes that both saw in the training images
    before distillation; None if the fusion needs none.
    """
    if config.distill.fusion != "dawid_skene":
        return None
    return dawid_skene(*paired_opinions(separate, len(config.classes)))


def paired_opinions(
    separate: str, classes: int, kinds: Sequence[str] = PAIRED
) -> list[torch.Tensor]:
    """The cloud's and CLIP's probabilities [N, K+1] of boxes of these kinds in the
    ``separation.parquet`` of a folder.
    """
    blocks = storage.stream_table(storage.join(separate, "separation.parquet"))
    found = [
        paired(SEPARATION.empty_table(), classes),
        *(paired(block, classes, kinds) for block in blocks),
    ]
    return [
        torch.from_numpy(np.concatenate(teacher))
        for teacher in zip(*found, strict=True)
    ]


def make(
    config: PipelineConfig, teacher_weights: str, annotators: Annotators | None = None
) -> Distillation:
    """The student starts from the backbone, as published, or from the CLIP detector.
    The teacher is the CLIP detector if both are of one kind.
    """
    backbone = load_backbone(config)
    student = new_student(backbone, config, seed=config.seed + 1)
    weights = load_weights(teacher_weights)
    if config.distill.start_from == "clip_detector":
        student = student_from_clip_detector(student, weights)
    teacher = new_student(backbone, config, seed=config.seed)
    if isinstance(teacher, ClipDetector):
        teacher.load_state_dict(weights)
    embeddings = starting_embeddings(backbone, config)
    return Distillation(
        student,
        teacher,
        embeddings,
        config.distill,
        config.separate,
        annotators,
        look_of(student),
    )


def finish(task: Task) -> dict[str, Any]:
    assert isinstance(task, Distillation)
    fusion = trained_fusion(task.ckg, task.cloud_prototypes, task.clip_prototypes)
    return {
        WEIGHTS: task.student.state_dict(),
        "teacher.pt": task.teacher.state_dict(),
        CKG: fusion.state_dict(),
    }
