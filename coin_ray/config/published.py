"""Presets of the paper's six data sets, with the settings of the official configs.

``published(name, cloud)`` also returns them for a cloud that returns a label and a score
(GLIP), or labels only. The paper has no GLIP run on Clipart, and a labels-only run on
Foggy Cityscapes alone; the others follow the same rules. Images, annotations and the
cloud are the user's: ``--images DIR --test DIR --cloud https://...``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from coin_ray.config import (
    Clip,
    Cloud,
    Detector,
    Distill,
    Evaluate,
    Folder,
    Labels,
    PipelineConfig,
    Propagate,
    TrainingConfig,
)

DataSet = Literal[
    "foggy_cityscapes", "cityscapes", "bdd100k", "kitti", "sim10k", "clipart"
]
CloudKind = Literal["gdino", "glip", "class-only"]

CITYSCAPES = (
    "truck",
    "car",
    "rider",
    "person",
    "train",
    "motorcycle",
    "bicycle",
    "bus",
)
BDD100K = ("person", "rider", "car", "truck", "bus", "motorcycle", "bicycle")
VOC = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair"),
    *("cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant"),
    *("sheep", "sofa", "train", "tvmonitor"),
)


@dataclass(frozen=True)
class PublishedSchedule:
    """The steps of a training, and the learning-rate factor from each milestone on."""

    steps: int
    factors: dict[int, float]

    def to_training_config(self) -> TrainingConfig:
        """Return the settings of the training."""
        return TrainingConfig(
            steps=self.steps,
            milestones=tuple(self.factors),
            factors=tuple(self.factors.values()),
        )


@dataclass(frozen=True)
class PublishedSet:
    """The settings that differ between the data sets.

    ``score_min``: the cloud's threshold. ``clip_score_min``: the threshold of CLIP's
    labels in propagation.
    """

    classes: tuple[str, ...]
    style: str
    distill: PublishedSchedule
    burn_up: int
    propagate: PublishedSchedule = PublishedSchedule(50_000, {40_000: 0.1})
    clip: str = "RN50"
    score_min: float = 0.25
    clip_score_min: float = 0.0
    fusion_score_min: float = 0.7
    private: float = 0.1
    teacher_rate: float = 0.0004


REBOUND = PublishedSchedule(65_000, {40_000: 0.1, 45_000: 0.5, 60_000: 0.1})
"""The learning rate rises again when the teacher starts to be updated."""

SETS: dict[DataSet, PublishedSet] = {
    "foggy_cityscapes": PublishedSet(
        CITYSCAPES, "foggy cityscapes style", REBOUND, 45_000
    ),
    "cityscapes": PublishedSet(
        CITYSCAPES,
        "cityscapes style",
        PublishedSchedule(65_000, {40_000: 0.1, 45_000: 0.1, 60_000: 0.1}),
        45_000,
        fusion_score_min=0.6,
        private=0.5,
    ),
    "bdd100k": PublishedSet(
        BDD100K,
        "BDD100K style",
        PublishedSchedule(120_000, {60_000: 0.5, 80_000: 0.1}),
        100_000,
        propagate=PublishedSchedule(90_000, {50_000: 0.5, 70_000: 0.1}),
        score_min=0.3,
    ),
    "kitti": PublishedSet(
        ("car",),
        "KITTI style",
        PublishedSchedule(30_000, {25_000: 0.1}),
        25_000,
        teacher_rate=0.0001,
    ),
    "sim10k": PublishedSet(("car",), "SIM style", REBOUND, 45_000),
    "clipart": PublishedSet(
        VOC,
        "clipart style",
        PublishedSchedule(70_000, {45_000: 0.1}),
        45_000,
        propagate=PublishedSchedule(50_000, {40_000: 1.0}),
        clip="RN101",
        clip_score_min=0.5,
    ),
}

GLIP_SCORE_MIN = 0.5
GLIP_SETS: dict[DataSet, PublishedSet] = SETS | {
    "cityscapes": replace(SETS["cityscapes"], fusion_score_min=0.7, private=0.1),
    "bdd100k": replace(
        SETS["bdd100k"],
        distill=PublishedSchedule(75_000, {50_000: 0.1, 55_000: 0.5, 70_000: 0.1}),
        burn_up=55_000,
    ),
}
"""Settings of the runs with GLIP, which has another threshold too."""

TESTED_ON_TRAINING_IMAGES: tuple[DataSet, ...] = ("clipart", "kitti", "sim10k")
CLOUD_VECTORS: dict[CloudKind, Literal["normalised", "smoothed", "one_hot"]] = {
    "gdino": "normalised",
    "glip": "smoothed",
    "class-only": "one_hot",
}


def published(name: DataSet, cloud: CloudKind = "gdino") -> PipelineConfig:
    """Return the published settings of a data set.

    They also replace the defaults of ``coin_ray.config`` that are not the published ones.
    """
    settings = SETS[name]
    if cloud == "glip":
        settings = replace(GLIP_SETS[name], score_min=GLIP_SCORE_MIN)
    return PipelineConfig(
        preset=name,
        classes=settings.classes,
        data=Folder(same_images=name in TESTED_ON_TRAINING_IMAGES),
        cloud=Cloud(),
        clip=Clip(model=settings.clip, style=settings.style),
        labels=Labels(
            score_min=settings.score_min,
            clip_score_min=settings.clip_score_min,
            cloud_vectors=CLOUD_VECTORS[cloud],
        ),
        detector=Detector(
            batch_norm="live",
            anchor_weights=(1.0, 1.0, 1.0, 1.0),
            unseen_images="ignored",
        ),
        propagate=Propagate(fit=settings.propagate.to_training_config()),
        distill=Distill(
            fit=settings.distill.to_training_config(),
            fusion_score_min=settings.fusion_score_min,
            private=settings.private,
            burn_up=settings.burn_up,
            teacher_rate=settings.teacher_rate,
            ckg_first=False,
        ),
        evaluate=Evaluate(plus_one=True),
        seed=2024,
    )


def foggy_cityscapes() -> PipelineConfig:
    """Return Foggy Cityscapes, 8 classes, with the paper's settings."""
    return published("foggy_cityscapes")


def cityscapes() -> PipelineConfig:
    """Return Cityscapes, 8 classes, with the paper's settings."""
    return published("cityscapes")


def bdd100k() -> PipelineConfig:
    """Return BDD100K, 7 classes, with the paper's settings."""
    return published("bdd100k")


def kitti() -> PipelineConfig:
    """Return KITTI, cars, with the paper's settings."""
    return published("kitti")


def sim10k() -> PipelineConfig:
    """Return Sim10K, cars, with the paper's settings."""
    return published("sim10k")


def clipart() -> PipelineConfig:
    """Return Clipart1k, 20 classes, with the paper's settings and CLIP RN101."""
    return published("clipart")
