"""Train a detector on labelled images."""

from __future__ import annotations

from functools import partial

import torch

from coin_ray.config import Detector, TrainingConfig
from coin_ray.config.detector_training import DetectorConfig
from coin_ray.models.co_detr.collaborative import CollaborativeDetr
from coin_ray.models.co_detr.towers import build_backbone, pixel_statistics
from coin_ray.models.co_detr.transformers_detr import (
    CollaborativeTransformersDetr,
    load_transformers_detr,
    pack_transformers_detr,
)
from coin_ray.predictors.co_detr import CO_DETR_FILE, pack_co_detr
from coin_ray.predictors.transformers_folder import TRANSFORMERS_FOLDER
from coin_ray.runs.steps import Context, Metrics
from coin_ray.stages.common.labelled_images import (
    build_labelled_examples,
    read_labelled_images,
)
from coin_ray.stages.common.training_job import (
    TrainingJob,
    WeightFiles,
    run_training_job,
)
from coin_ray.training.loop import TrainingTask
from coin_ray.training.supervised import SupervisedTraining


def run(context: Context[DetectorConfig]) -> Metrics:
    """Write ``co_detr.pt``, or transformers' own files below ``network``; and
    ``curve.json``.
    """
    config = context.config
    images = read_labelled_images(context.inputs["images"], "train")
    examples = build_labelled_examples(
        images, config.classes, config.found_intensity_range
    )
    training = config.training_over(len(examples))
    steps_per_epoch = max(1, len(examples) // training.batch)
    job = TrainingJob(
        title=context.name,
        build_task=partial(build_supervised_task, config, training, steps_per_epoch),
        export_weights=partial(export_detector, config),
        examples=examples,
        training=training,
        detector=Detector(short_side=config.short_side, long_side=config.long_side),
        seed=config.seed,
        folder=context.folder,
    )
    curve = run_training_job(job)
    boxes = sum(len(example.detections["labels"]) for example in examples)
    return {
        "images": len(examples),
        "boxes": boxes,
        "steps": training.steps,
        "last": curve[-1],
    }


def build_supervised_task(
    config: DetectorConfig, training: TrainingConfig, epoch: int
) -> SupervisedTraining:
    """Return the training task of a new detector; ``epoch``: its steps."""
    if config.model == "co-detr":
        return SupervisedTraining(new_co_detr(config), config, training, epoch)
    return SupervisedTraining(new_transformers_detr(config), config, training, epoch)


def new_co_detr(config: DetectorConfig) -> CollaborativeDetr:
    """Return a Co-DETR with the backbone's first weights. The rest is drawn from the
    seed; the base is the same whatever the auxiliary heads are.
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


def new_transformers_detr(config: DetectorConfig) -> CollaborativeTransformersDetr:
    """Return an RT-DETRv2 or D-FINE with its weights. Layers whose shape depends on the
    classes, and the auxiliary head, are drawn from the seed.
    """
    torch.manual_seed(config.seed)
    detector = load_transformers_detr(
        config.network, config.model, config.classes, config.co_detr.detections
    )
    return CollaborativeTransformersDetr(detector, config.co_detr)


def export_detector(config: DetectorConfig, task: TrainingTask) -> WeightFiles:
    """Return the files of the trained detector by name."""
    assert isinstance(task, SupervisedTraining)
    if isinstance(task.final_model, CollaborativeTransformersDetr):
        files = pack_transformers_detr(task.final_model.base)
        return {
            f"{TRANSFORMERS_FOLDER}/{name}": content for name, content in files.items()
        }
    return {CO_DETR_FILE: pack_co_detr(task.final_model, config)}
