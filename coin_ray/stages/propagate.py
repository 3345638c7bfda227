"""Propagate: train a detector on labels as they are. CLIP's labels make the CLIP
detector; the cloud's or the truth, the baselines.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from coin_ray.config import PipelineConfig, Propagate
from coin_ray.models.faster_rcnn_clip.backbone import load_backbone, starting_embeddings
from coin_ray.runs.graph import baseline_training
from coin_ray.runs.steps import Context
from coin_ray.stages.common.students import (
    CLIP_DETECTOR,
    look_of,
    new_clip_detector,
    new_student,
)
from coin_ray.stages.common.teacher_outputs import (
    LabelSource,
    count_labels,
    labels_for,
    training_examples,
)
from coin_ray.stages.common.training_job import Fit, fit
from coin_ray.stages.common.validation import beside, looks
from coin_ray.training.loop import Task
from coin_ray.training.propagate import Propagation

WEIGHTS = "detector.pt"


def run(context: Context) -> dict[str, Any]:
    """Write ``detector.pt`` and ``curve.json``."""
    config = context.config
    source = context.options["labels"]
    propagate = config.propagate if source == "clip" else baseline_training(config)
    examples = training_examples(
        context.inputs["images"], *labels_for(source, context.inputs, config)
    )
    name = CLIP_DETECTOR if source == "clip" else context.name
    watched = looks(
        config,
        context.inputs["images"],
        context.folder,
        name,
        "detector",
        propagate.fit,
    )
    build, saved = (
        partial(make, config, propagate, source),
        (watched.leave if watched else None),
    )
    with beside(watched):
        curve = fit(
            Fit(
                context.name,
                build,
                finish,
                examples,
                propagate.fit,
                config.detector,
                config.seed,
                context.folder,
                saved,
            )
        )
    return {
        "images": len(examples),
        "labels": count_labels(source, context.inputs, config),
        "last": curve[-1],
    }


def make(
    config: PipelineConfig, propagate: Propagate, source: LabelSource
) -> Propagation:
    """The CLIP detector is a Faster R-CNN; baselines have the student's network."""
    backbone = load_backbone(config)
    new = new_clip_detector if source == "clip" else new_student
    detector = new(backbone, config, seed=config.seed)
    return Propagation(
        detector, starting_embeddings(backbone, config), propagate, look_of(detector)
    )


def finish(task: Task) -> dict[str, Any]:
    assert isinstance(task, Propagation)
    return {WEIGHTS: task.detector.state_dict()}
