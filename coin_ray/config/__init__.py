"""Every setting, as frozen dataclasses that check themselves. Imports neither torch nor
ray.

Presets (``coin_ray.config.presets``) are functions that return a whole
``PipelineConfig``. Symbols in brackets are the paper's.
"""

from coin_ray.config.class_prompts import ClassPrompt
from coin_ray.config.cloud import (
    PLAIN_RENDERING,
    RENDERING_OPERATIONS,
    Cloud,
    Ensemble,
    ServiceName,
    with_plain_rendering,
)
from coin_ray.config.co_detr import CoDetr
from coin_ray.config.data import DemoScenes, Folder
from coin_ray.config.fields import (
    IN_PACKAGE,
    PACKAGE,
    new_field,
    relocate_paths,
    runtime_only,
)
from coin_ray.config.labels import Collect, Labels
from coin_ray.config.models import Clip, Detector, Labeler, MobileNet
from coin_ray.config.pipeline import PipelineConfig, Tracking, check_runnable
from coin_ray.config.students import TargetSettings
from coin_ray.config.training import (
    Distill,
    Evaluate,
    FusionRule,
    Propagate,
    Separate,
    TrainingConfig,
)

__all__ = [
    "IN_PACKAGE",
    "PACKAGE",
    "PLAIN_RENDERING",
    "RENDERING_OPERATIONS",
    "ClassPrompt",
    "Clip",
    "Cloud",
    "CoDetr",
    "Collect",
    "DemoScenes",
    "Detector",
    "Distill",
    "Ensemble",
    "Evaluate",
    "Folder",
    "FusionRule",
    "Labeler",
    "Labels",
    "MobileNet",
    "PipelineConfig",
    "Propagate",
    "Separate",
    "ServiceName",
    "TargetSettings",
    "Tracking",
    "TrainingConfig",
    "check_runnable",
    "new_field",
    "relocate_paths",
    "runtime_only",
    "with_plain_rendering",
]
