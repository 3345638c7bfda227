"""The steps of a supervised detector training: images, train, evaluate."""

from __future__ import annotations

from collections.abc import Mapping

from coin_ray.config.detector_training import DEMO_SOURCE, DetectorConfig, SourceScenes
from coin_ray.runs.changed_images import reopen_if_changed
from coin_ray.runs.runner import run_missing_steps
from coin_ray.runs.steps import Manifest, Step
from coin_ray.runs.tracking import Tracker


def build_detector_steps(
    config: DetectorConfig, scenes: SourceScenes | None = None
) -> dict[str, Step]:
    """Return all steps by name, in the order in which they run.

    Images of a folder, or of the demo's target domain, are the same step that an
    adaptation below the same root has. ``scenes``: how many with ``demo-source``.
    """
    if config.data == DEMO_SOURCE:
        scenes = scenes or SourceScenes()
        images = Step("images", "source_scenes", scenes, options={"scenes": scenes})
    else:
        images = Step("images", "images", config.pipeline.data)
    options = _training_options(config)
    train = Step("train", "train_detector", (), (images,), options=options)
    evaluate = Step(
        "evaluate", "evaluate_detector", (), (images, train), options=options
    )
    return {step.name: step for step in (images, train, evaluate)}


def run_missing_detector_steps(
    steps: Mapping[str, Step],
    config: DetectorConfig,
    root: str,
    *,
    tracker: Tracker | None = None,
    progress: bool = True,
) -> dict[str, Manifest]:
    """Run the steps without a manifest; return the manifests of all by name.

    See ``run_missing_steps``. The stage that reads images takes a pipeline's config.
    """
    reopen_if_changed(steps.values(), root)
    return run_missing_steps(
        steps.values(),
        config,
        root,
        tracker=tracker,
        progress=progress,
        step_configs={"images": config.pipeline},
    )


def _training_options(config: DetectorConfig) -> dict[str, object]:
    """Return what results depend on.

    The fields that are no part of the config's identity came later: they count only if
    they are not as they were before.
    """
    options: dict[str, object] = {"detector": config}
    if config.ship != "base":
        options["ship"] = config.ship
    if config.model != "co-detr":
        options["model"] = config.model
        options["network"] = config.network
    return options
