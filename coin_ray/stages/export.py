"""Export: the student with its class embeddings cached, so that it needs neither the
text encoder nor open_clip's weights.
"""

from __future__ import annotations

from coin_ray import storage
from coin_ray.config import PipelineConfig
from coin_ray.models.faster_rcnn_clip.backbone import load_backbone
from coin_ray.predictors.student import write_exported_student
from coin_ray.runs.steps import Context, Metrics
from coin_ray.stages.common.students import load_trained_detector
from coin_ray.stages.propagate import WEIGHTS
from coin_ray.training.own_opinion import OwnOpinion


def run(context: Context[PipelineConfig]) -> Metrics:
    """Write ``model.safetensors`` and ``model.json``;
    ``coin_ray.predictors.student.load_exported_student`` reads them.
    """
    config = context.config
    [delivered] = context.inputs.values()
    weights = storage.join(delivered, WEIGHTS)
    backbone = load_backbone(config) if config.has_backbone else None
    student = load_trained_detector("student", weights, backbone, config)
    assert not isinstance(student, OwnOpinion)  # only a second teacher is one
    size = write_exported_student(
        student,
        config.classes,
        context.folder,
        config.detector,
        config.intensity_range,
    )
    parameters = sum(parameter.numel() for parameter in student.parameters())
    return {"bytes": size, "parameters": parameters}
