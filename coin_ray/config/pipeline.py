"""Every setting of one run. Secrets are never settings: a config holds the name of an
environment variable.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from coin_ray.config.cloud import Cloud, Ensemble, split_renderings
from coin_ray.config.data import DemoScenes, Folder
from coin_ray.config.fields import PACKAGE, check, new_field, relocate_paths
from coin_ray.config.labels import Collect, Labels
from coin_ray.config.models import Clip, Detector, MobileNet
from coin_ray.config.training import Distill, Evaluate, Propagate, Separate


@dataclass(frozen=True)
class Tracking:
    """MLflow. The database and the experiment are made by the driver before any worker
    starts.
    """

    uri: str | None = None
    """Tracking server; default MLFLOW_TRACKING_URI, else sqlite beside the run."""
    experiment: str = "coin_ray"
    enabled: bool = True
    model: str | None = None
    """Name of a registered model: the exported student becomes its next version."""
    alias: str = "champion"
    """Of the registered model, moved to the new version."""


@dataclass(frozen=True)
class PipelineConfig:
    """Everything one run depends on."""

    preset: str
    classes: tuple[str, ...]
    data: DemoScenes | Folder
    cloud: Cloud
    more_clouds: tuple[Cloud, ...] = ()
    """Further clouds beside ``cloud``, each with its own limits; ``ensemble`` says how
    they answer together."""
    ensemble: Ensemble = field(default_factory=Ensemble)
    clip: Clip = field(default_factory=Clip)
    mobilenet: MobileNet = field(default_factory=MobileNet)
    collect: Collect = field(default_factory=Collect)
    labels: Labels = field(default_factory=Labels)
    detector: Detector = field(default_factory=Detector)
    propagate: Propagate = field(default_factory=Propagate)
    separate: Separate = field(default_factory=Separate)
    distill: Distill = field(default_factory=Distill)
    evaluate: Evaluate = field(default_factory=Evaluate)
    corrections: tuple[str, ...] = new_field(())
    """Labels of training images that a person vouches for: exports of Label Studio,
    CVAT or FiftyOne, or labelled folders (docs/own-data.md). They outrank every
    teacher. Changing them costs no call.
    """
    tracking: Tracking = field(default_factory=Tracking, metadata={"identity": False})
    seed: int = 0

    def __post_init__(self) -> None:
        folded = [" ".join(c.lower().split()) for c in self.classes]
        check(all(folded), f"empty class name in {self.classes}")
        doubles = sorted({c for c in folded if folded.count(c) > 1})
        check(
            not doubles,
            "class names must differ in more than case and spaces; repeated:"
            f" {', '.join(doubles)}",
        )
        check(
            not any("\n" in c or len(c) > 200 for c in self.classes),
            "class names must be one line of at most 200 characters",
        )
        check(
            "background" not in folded,
            "'background' is implied and must not be a class",
        )
        check(
            self.detector.backbone == "clip" or self.detector.background == "learned",
            f"detector.backbone {self.detector.backbone} has no text encoder for a"
            " background prompt: give --detector.background learned",
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process, maybe on another machine, files of the package lie where
        it is installed there.
        """
        return _arrived, (
            PACKAGE,
            {f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
        )

    @property
    def services(self) -> tuple[Cloud, ...]:
        """All that are asked, the first one first."""
        return (self.cloud, *self.more_clouds)

    @property
    def clouds(self) -> tuple[Cloud, ...]:
        """All that are fused: the services, one that is asked in several views once for
        each.
        """
        return tuple(one for cloud in self.services for one in split_renderings(cloud))


def _arrived(package: str, values: dict[str, Any]) -> PipelineConfig:
    return PipelineConfig(**relocate_paths(values, package, PACKAGE))


def check_runnable(config: PipelineConfig) -> None:
    """What a preset may leave open and a run needs. Raises ConfigError naming the
    option to give.
    """
    data = config.data
    check(
        not isinstance(data, Folder) or bool(data.images),
        "which images? give --images DIR, the folder of unlabelled images",
    )
    check(bool(config.classes), "which classes? give --classes person,dog")
    check(
        all(c.url or c.serve != "none" or c.service != "http" for c in config.clouds),
        "which cloud? give --cloud https://... or --cloud SERVICE, or --cloud.serve"
        " demo|onnx|transformers|checkpoint for a local one",
    )
    if len(config.clouds) > 1:
        _check_ensemble(config)


def _check_ensemble(config: PipelineConfig) -> None:
    clouds, ensemble = config.clouds, config.ensemble
    different = {
        (
            c.service,
            c.url,
            c.serve,
            c.onnx_models,
            c.model,
            c.region,
            c.coordinates,
            c.views,
        )
        for c in clouds
    }
    check(
        len(different) == len(clouds),
        "cloud and more_clouds hold the same service, address and model twice",
    )
    several = any(len(cloud.views) > 1 for cloud in config.services)
    check(
        ensemble.mode == "fuse" or not several,
        f"several views of a cloud are fused; ensemble.mode {ensemble.mode} takes one"
        " of each cloud",
    )
    given = len(ensemble.reliability)
    check(
        given in (0, len(clouds)),
        f"ensemble.reliability needs one number for each of the {len(clouds)} clouds,"
        f" or views; got {given}",
    )
    check(
        ensemble.mode != "cascade" or config.collect.labeler != "none",
        "ensemble.mode cascade needs CLIP's opinion of the first cloud's boxes: give"
        " --collect.labeler roi or crop",
    )
