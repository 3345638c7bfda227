"""Train a detector on labelled images."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from coin_ray.config import Detector, TrainingConfig
from coin_ray.config.detector_training import DetectorConfig
from coin_ray.models.co_detr.collaborative import CollaborativeDetr
from coin_ray.models.co_detr.towers import build_backbone, pixel_statistics
from coin_ray.models.co_detr.transformers_detr import CoTrained, load_fast, saved
from coin_ray.predictors.co_detr import FILE, packed
from coin_ray.predictors.transformers_folder import FOLDER
from coin_ray.runs.steps import Context
from coin_ray.stages.common.labelled_images import labelled, training_examples
from coin_ray.stages.common.training_job import Fit, fit
from coin_ray.training.loop import Task
from coin_ray.training.supervised import Supervised


def run(context: Context) -> dict[str, Any]:
    """Write ``co_detr.pt``, or transformers' own files below ``network``; and
    ``curve.json``.
    """
    config: DetectorConfig = context.options["detector"]
    examples = training_examples(
        labelled(context.inputs["images"], "train"), config.classes
    )
    optimize = config.fit_over(len(examples))
    epoch = max(1, len(examples) // optimize.batch)
    views = Detector(short_side=config.short_side, long_side=config.long_side)
    work = Fit(
        context.name,
        partial(make, config, optimize, epoch),
        partial(finish, config),
        examples,
        optimize,
        views,
        config.seed,
        context.folder,
    )
    curve = fit(work)
    boxes = sum(len(e.knowledge["labels"]) for e in examples)
    return {
        "images": len(examples),
        "boxes": boxes,
        "steps": optimize.steps,
        "last": curve[-1],
    }


def make(config: DetectorConfig, optimize: TrainingConfig, epoch: int) -> Supervised:
    return Supervised(
        new_model(config) if config.model == "co-detr" else new_fast(config),
        config,
        optimize,
        epoch,
    )


def new_model(config: DetectorConfig) -> CollaborativeDetr:
    """With the backbone's first weights; the rest is drawn by the seed, and the shipped
    part is the same whatever the auxiliary heads are.
    """
    torch.manual_seed(config.seed)
    mean, std = pixel_statistics(config.backbone)
    return CollaborativeDetr(
        build_backbone(config.backbone),
        len(config.classes),
        config.co_detr,
        mean=mean,
        std=std,
    )


def new_fast(config: DetectorConfig) -> CoTrained:
    """RT-DETRv2 or D-FINE with their weights; what fits no longer, and the head beside
    them, is drawn by the seed.
    """
    torch.manual_seed(config.seed)
    return CoTrained(
        load_fast(
            config.network, config.model, config.classes, config.co_detr.detections
        ),
        config.co_detr,
    )


def finish(
    config: DetectorConfig, task: Task
) -> Mapping[str, Mapping[str, Any] | bytes]:
    assert isinstance(task, Supervised)
    if isinstance(task.shipped, CoTrained):
        return {
            f"{FOLDER}/{name}": data for name, data in saved(task.shipped.base).items()
        }
    return {FILE: packed(task.shipped, config)}
