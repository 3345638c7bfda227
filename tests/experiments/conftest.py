from __future__ import annotations

from dataclasses import replace

import pytest

from coin_ray.config import DemoScenes, PipelineConfig, Tracking
from coin_ray.config.presets import demo
from coin_ray.experiments.variants import shorten_training


@pytest.fixture
def small_demo() -> PipelineConfig:
    """The demo with few images and trainings of three and five steps."""
    config = shorten_training(demo(), 0.015)
    cloud = replace(config.cloud, serve_latency=0.0, serve_faults=0.0)
    return replace(
        config,
        data=DemoScenes(train=16, val=0, test=8),
        cloud=cloud,
        tracking=Tracking(enabled=False),
    )
