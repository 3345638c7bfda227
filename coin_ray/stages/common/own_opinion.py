"""The starting student as the second teacher: which rendering and sizes it is shown, and
its weights, in the place of a trained CLIP detector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace

from torch import Tensor

from coin_ray import storage
from coin_ray.config import PipelineConfig
from coin_ray.models.students.building import load_pretrained_student
from coin_ray.models.students.yolox import YoloxStudent
from coin_ray.runs.steps import Context, Metrics
from coin_ray.stages.common.image_tables import read_images
from coin_ray.stages.common.prediction import read_image
from coin_ray.stages.common.training_job import save_weights
from coin_ray.training.own_opinion import (
    ViewConfidence,
    choose_rendering,
    choose_views,
)

VIEWS_FILE = "views.json"
SAMPLE_SIZE = 40
"""Training images on which the student's confidence is measured."""


def write_own_opinion(context: Context[PipelineConfig], weights_file: str) -> Metrics:
    """Write the second teacher's weights and ``views.json``; the metrics say how
    confident the student is in each view.
    """
    config = context.config
    plain = replace(config.distill, student_rendering="plain")
    student = load_pretrained_student(plain, config.classes, seed=config.seed + 1)
    assert isinstance(student, YoloxStudent)  # checked by the settings
    student.eval()
    images = _read_sample(context)
    measured: list[ViewConfidence] = []
    rendering = config.distill.student_rendering
    if rendering == "auto":
        rendering, measured = choose_rendering(student, images)
    student.set_rendering(rendering)
    opinion, by_size = choose_views(student, images)
    measured += by_size
    uri = storage.join(context.folder, weights_file)
    save_weights(uri, opinion.state_dict())
    sides = sorted({view.side for view in opinion.views})
    figures = {
        "rendering": rendering,
        "sides": sides,
        "confidence": [
            asdict(replace(view, confidence=round(view.confidence, 4)))
            for view in measured
        ],
    }
    storage.write_json(storage.join(context.folder, VIEWS_FILE), figures)
    return {"images": len(images), **figures}


def _read_sample(context: Context[PipelineConfig]) -> list[Tensor]:
    """Return at most ``SAMPLE_SIZE`` training images, evenly spaced."""
    uris = read_images(context.inputs["images"], "train")["uri"].to_pylist()
    count = min(SAMPLE_SIZE, len(uris))
    intensity_range = context.config.intensity_range
    return [
        read_image(uris[number * len(uris) // count], intensity_range)
        for number in range(count)
    ]


def with_chosen_rendering(
    config: PipelineConfig, inputs: Mapping[str, str]
) -> PipelineConfig:
    """Return the config with the rendering that ``write_own_opinion`` chose in the
    place of auto. ``inputs``: folders of a step's inputs by name.
    """
    if config.distill.student_rendering != "auto":
        return config
    views = storage.read_json(storage.join(inputs["propagate"], VIEWS_FILE))
    distill = replace(config.distill, student_rendering=views["rendering"])
    return replace(config, distill=distill)
