"""Every setting, as frozen dataclasses that check themselves. Imports neither torch nor
ray.

Presets (``coin_ray.config.presets``) are functions that return a whole
``PipelineConfig``. Symbols in brackets are the paper's.
"""

from coin_ray.config.cloud import (
    OPERATIONS,
    PLAIN,
    Cloud,
    Ensemble,
    Service,
    in_plain_view,
)
from coin_ray.config.co_detr import CoDetr
from coin_ray.config.data import DemoScenes, Folder
from coin_ray.config.fields import IN_PACKAGE, PACKAGE, added, execution, relocated
from coin_ray.config.labels import Collect, Labels
from coin_ray.config.models import Clip, Detector, MobileNet
from coin_ray.config.pipeline import PipelineConfig, Tracking, check_runnable
from coin_ray.config.training import (
    Change,
    Distill,
    Evaluate,
    Fusion,
    Optimize,
    Propagate,
    Separate,
    Student,
)

__all__ = [
    "IN_PACKAGE",
    "OPERATIONS",
    "PACKAGE",
    "PLAIN",
    "Change",
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
    "Fusion",
    "Labels",
    "MobileNet",
    "Optimize",
    "PipelineConfig",
    "Propagate",
    "Separate",
    "Service",
    "Student",
    "Tracking",
    "added",
    "check_runnable",
    "execution",
    "in_plain_view",
    "relocated",
]
