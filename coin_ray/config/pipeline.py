"""Every setting of one run.

Secrets are never settings: a config holds the name of an environment variable.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from coin_ray.config.class_prompts import ClassPrompt, check_class_prompts
from coin_ray.config.cloud import Cloud, Ensemble, split_renderings
from coin_ray.config.data import DemoScenes, Folder
from coin_ray.config.fields import PACKAGE, new_field, relocate_paths, require
from coin_ray.config.labels import Collect, Labels
from coin_ray.config.models import Clip, Detector, Labeler, MobileNet
from coin_ray.config.students import YOLOX_STUDENTS, is_region_student
from coin_ray.config.training import Distill, Evaluate, Propagate, Separate

IDENTIFYING_SETTINGS = (
    "service",
    "url",
    "serve",
    "onnx_models",
    "model",
    "region",
    "coordinates",
    "detail",
    "reasoning_effort",
    "views",
)
"""Settings of a cloud that tell it apart from other clouds of a run."""
MAX_CLASS_NAME = 200
"""Characters of a class name."""


@dataclass(frozen=True)
class Tracking:
    """MLflow. The driver makes the database and the experiment before any worker starts."""

    uri: str | None = None
    """Tracking server; default MLFLOW_TRACKING_URI, else SQLite in the run's root."""
    experiment: str = "coin_ray"
    enabled: bool = True
    model: str | None = None
    """Name of a registered model: the exported student becomes its next version."""
    alias: str = "champion"
    """Alias of the registered model; it moves to the new version."""


@dataclass(frozen=True)
class Storage:
    """Storage of the run: the root and, if they are on one, the images' object store."""

    patience: float = 600.0
    """Seconds for which the run waits for storage that can't be reached, then it ends
    with exit code 3."""

    def __post_init__(self) -> None:
        require(self.patience >= 0, f"storage.patience is {self.patience}, below 0")


@dataclass(frozen=True)
class PipelineConfig:
    """Every setting of one run."""

    preset: str
    classes: tuple[str, ...]
    data: DemoScenes | Folder
    cloud: Cloud
    more_clouds: tuple[Cloud, ...] = ()
    """Further clouds in addition to ``cloud``, each with its own limits; ``ensemble``
    says how they are combined."""
    ensemble: Ensemble = field(default_factory=Ensemble)
    clip: Clip = field(default_factory=Clip)
    mobilenet: MobileNet = field(default_factory=MobileNet)
    collect: Collect = field(default_factory=Collect)
    labeler: Labeler = new_field(Labeler())
    labels: Labels = field(default_factory=Labels)
    detector: Detector = field(default_factory=Detector)
    propagate: Propagate = field(default_factory=Propagate)
    separate: Separate = field(default_factory=Separate)
    distill: Distill = field(default_factory=Distill)
    evaluate: Evaluate = field(default_factory=Evaluate)
    strategy: Literal["coin", "auto"] = new_field("coin")
    """What is delivered. coin: the student of ``distill``. auto: also the same network
    is trained on plain cloud labels, and the better of both is delivered, judged without
    labels (docs/students.md)."""
    class_prompts: tuple[ClassPrompt, ...] = new_field(())
    """Phrases, descriptions and negatives of classes that are asked for by more than
    their name. On the command line: ``--classes FILE.yaml`` (docs/classes.md)."""
    corrections: tuple[str, ...] = new_field(())
    """Labels of training images that a person has checked: exports of Label Studio,
    CVAT or FiftyOne, or labelled folders (docs/own-data.md). They replace the labels of
    the teachers. Changing them costs no call.
    """
    tracking: Tracking = field(default_factory=Tracking, metadata={"identity": False})
    storage: Storage = field(default_factory=Storage, metadata={"identity": False})
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_classes()
        self._check_second_teacher()
        check_class_prompts(self.class_prompts, self.classes)
        require(
            len(self.labels.class_score_min) in (0, len(self.classes)),
            f"labels.class_score_min needs a score for each of the {len(self.classes)}"
            f" classes, got {len(self.labels.class_score_min)}",
        )
        by_agreement = [c.service for c in self.clouds if c.label_scores == "agreement"]
        require(
            not by_agreement or len(self.clouds) > 1,
            "cloud.label_scores agreement needs several renderings (cloud.views) or"
            f" clouds, got one of {' '.join(by_agreement)}",
        )
        require(
            self.detector.backbone == "clip" or self.detector.background == "learned",
            f"detector.backbone {self.detector.backbone} has no text encoder for a"
            " background prompt: give --detector.background learned",
        )

    def _check_second_teacher(self) -> None:
        """Check that a student that takes the CLIP detector's place can do so."""
        is_own_opinion = self.separate.second_teacher == "student"
        student = self.distill.student
        require(
            not is_own_opinion or student in YOLOX_STUDENTS,
            "separate.second_teacher student needs a student that was a detector before"
            f" and takes images of any size: {', '.join(YOLOX_STUDENTS)}; got {student}",
        )
        rendering = self.distill.student_rendering
        require(
            rendering == "plain" or student in YOLOX_STUDENTS,
            f"distill.student_rendering {rendering} is for YOLOX students; got"
            f" {student}",
        )
        require(
            rendering != "auto" or is_own_opinion,
            "distill.student_rendering auto needs --separate.second-teacher student",
        )

    def _check_classes(self) -> None:
        normalised = [" ".join(name.lower().split()) for name in self.classes]
        require(all(normalised), f"empty class name in {self.classes}")
        duplicates = sorted({name for name in normalised if normalised.count(name) > 1})
        require(
            not duplicates,
            "class names must differ in more than case and spaces; repeated:"
            f" {', '.join(duplicates)}",
        )
        require(
            all("\n" not in n and len(n) <= MAX_CLASS_NAME for n in self.classes),
            f"class names must be one line of at most {MAX_CLASS_NAME} characters",
        )
        require(
            "background" not in normalised,
            "'background' is implied and must not be a class",
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the config with the path of this installation of the package.

        Another process, maybe on another machine, then finds the package's files where
        its own installation has them.
        """
        return _unpickle_config, (
            PACKAGE,
            {f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
        )

    @property
    def intensity_range(self) -> tuple[float, float] | None:
        """Return the range of deep grey images that is set, or that the images step has
        found (``with_intensity_range``); None: each image's own.
        """
        if isinstance(self.data, DemoScenes) or self.data.intensity_range == "auto":
            return None
        return self.data.intensity_range

    def with_intensity_range(self, found: tuple[float, float]) -> PipelineConfig:
        """Return the config for stages that read images, with the range found."""
        if isinstance(self.data, DemoScenes):
            return self
        data = dataclasses.replace(self.data, intensity_range=found)
        return dataclasses.replace(self, data=data)

    @property
    def has_backbone(self) -> bool:
        """Tell whether a detector of the run has CLIP's or ImageNet's backbone."""
        is_own_opinion = self.separate.second_teacher == "student"
        return not is_own_opinion or is_region_student(self.distill.student)

    @property
    def labeler_clip(self) -> Clip:
        """Return the CLIP of the labels: the labeler's own, else the detector's. Both
        share the wording of the prompts.
        """
        if self.labeler.model is None or self.collect.labeler == "classifier":
            return self.clip
        return dataclasses.replace(
            self.clip,
            model=self.labeler.model,
            pretrained=self.labeler.pretrained or "",
            activation=self.labeler.activation,
        )

    @property
    def class_phrases(self) -> tuple[tuple[str, ...], ...]:
        """Return for each class the phrases that it is asked by: its name, unless
        ``class_prompts`` has others.
        """
        prompts = {prompt.name: prompt for prompt in self.class_prompts}
        return tuple(
            prompts[name].phrases if name in prompts else (name,)
            for name in self.classes
        )

    @property
    def services(self) -> tuple[Cloud, ...]:
        """Return all services that are called, ``cloud`` first."""
        return (self.cloud, *self.more_clouds)

    @property
    def clouds(self) -> tuple[Cloud, ...]:
        """Return the services, each once for every rendering it gets."""
        return tuple(
            rendering
            for service in self.services
            for rendering in split_renderings(service)
        )


def _unpickle_config(package: str, fields: Mapping[str, Any]) -> PipelineConfig:
    return PipelineConfig(**relocate_paths(fields, package, PACKAGE))


def check_runnable(config: PipelineConfig) -> None:
    """Check the settings that a preset leaves open and a run needs.

    Raises ConfigError naming the option to give.
    """
    require(
        not isinstance(config.data, Folder) or bool(config.data.images),
        "which images? give --images DIR, the folder of unlabelled images",
    )
    require(bool(config.classes), "which classes? give --classes person,dog")
    for cloud in config.services:
        require(
            bool(cloud.url) or cloud.serve != "none" or cloud.service != "http",
            "which cloud? give --cloud https://... or --cloud SERVICE, or --cloud.serve"
            " demo|onnx|transformers|checkpoint for a local one",
        )
        require(
            cloud.max_usd is None or cloud.usd_per_call > 0,
            f"cloud.max_usd {cloud.max_usd} would never stop the run, because its calls"
            " cost nothing: give --cloud.usd-per-call, the price of a call, or"
            " --cloud.max-calls",
        )
    _check_labeler(config)
    if len(config.clouds) > 1:
        _check_ensemble(config)


def _check_labeler(config: PipelineConfig) -> None:
    labeler, model = config.collect.labeler, config.labeler.model
    require(
        labeler != "classifier" or model is not None,
        "which classifier? give --labeler.model, the name or folder of an image"
        " classifier of transformers or timm, or an ONNX file",
    )
    require(
        labeler != "none" or model is None,
        f"labeler.model {model} is of no use with --labeler none; give --labeler crop,"
        " roi or classifier",
    )
    require(
        labeler == "classifier" or config.labeler.label_map is None,
        "labeler.label_map maps the names of a classifier; CLIP is asked about the"
        " classes themselves: give --labeler classifier, or leave it out",
    )


def _check_ensemble(config: PipelineConfig) -> None:
    ensemble = config.ensemble
    cloud_count = len(config.clouds)
    different_clouds = {
        tuple(getattr(cloud, name) for name in IDENTIFYING_SETTINGS)
        for cloud in config.clouds
    }
    require(
        len(different_clouds) == cloud_count,
        "cloud and more_clouds hold the same service, address and model twice",
    )
    has_several_renderings = any(len(cloud.views) > 1 for cloud in config.services)
    require(
        ensemble.mode == "fuse" or not has_several_renderings,
        f"several views of a cloud are fused; ensemble.mode {ensemble.mode} takes one"
        " of each cloud",
    )
    weight_count = len(ensemble.reliability)
    require(
        weight_count in (0, cloud_count),
        f"ensemble.reliability needs one number for each of the {cloud_count} clouds,"
        f" or views; got {weight_count}",
    )
    require(
        ensemble.mode != "cascade" or config.collect.labeler != "none",
        "ensemble.mode cascade needs a second opinion on the first cloud's boxes: give"
        " --collect.labeler roi, crop or classifier",
    )
