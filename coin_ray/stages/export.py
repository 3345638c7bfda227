"""Export: the student with its class embeddings cached, so that no text encoder and no
open_clip weights ship.
"""

from __future__ import annotations

from typing import Any

from coin_ray import storage
from coin_ray.models.faster_rcnn_clip.backbone import load_backbone
from coin_ray.predictors.student import write_exported
from coin_ray.runs.steps import Context
from coin_ray.stages.common.students import load_detector
from coin_ray.stages.propagate import WEIGHTS


def run(context: Context) -> dict[str, Any]:
    """Write ``model.safetensors`` and ``model.json``;
    ``coin_ray.predictors.student.load`` reads them.
    """
    config = context.config
    student = load_detector(
        "student",
        storage.join(context.inputs["distill"], WEIGHTS),
        load_backbone(config),
        config,
    )
    size = write_exported(student, config.classes, context.folder, config.detector)
    return {"bytes": size, "parameters": sum(p.numel() for p in student.parameters())}
