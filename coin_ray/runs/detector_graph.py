"""The steps of a supervised training: images, train, evaluate."""

from __future__ import annotations

from typing import Any

from coin_ray.config.detector_training import DEMO_SOURCE, DetectorConfig, SourceScenes
from coin_ray.runs.steps import Step


def graph(
    config: DetectorConfig, scenes: SourceScenes | None = None
) -> dict[str, Step]:
    """All steps by name, in order. Images of a folder or of the demo's target are the
    step that an adaptation below the same root has.

    ``scenes``: how many with ``demo-source``.
    """
    options: dict[str, Any] = {"detector": config} | (
        {} if config.ship == "base" else {"ship": config.ship}
    )
    if config.model != "co-detr":
        options |= {"model": config.model, "network": config.network}
    if config.data == DEMO_SOURCE:
        scenes = scenes or SourceScenes()
        images = Step(
            "images", "source_scenes", identity=scenes, options={"scenes": scenes}
        )
    else:
        images = Step("images", "images", identity=config.pipeline.data)
    train = Step(
        "train", "train_detector", identity=(), inputs=(images,), options=options
    )
    evaluate = Step(
        "evaluate",
        "evaluate_detector",
        identity=(),
        inputs=(images, train),
        options=options,
    )
    return {step.name: step for step in (images, train, evaluate)}
