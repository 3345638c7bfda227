"""Presets of supervised training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from coin_ray.config import TrainingConfig
from coin_ray.config.co_detr import Backbone, CoDetr, tiny
from coin_ray.config.data import DEMO_ASSETS
from coin_ray.config.detector_training import DetectorConfig, DetectorModel

SWIN_LARGE = "microsoft/swin-large-patch4-window12-384-in22k"


def small() -> DetectorConfig:
    """Return a tiny network at 128 pixels on the visual tower of the demo's CLIP.

    It trains in minutes on a CPU.
    """
    return DetectorConfig(
        preset="tiny",
        co_detr=tiny(auxiliary=("atss",)),
        backbone=Backbone(
            f"open_clip:{DEMO_ASSETS / 'coin_tiny.json'}",
            str(DEMO_ASSETS / "coin_tiny.pt"),
        ),
        fit=TrainingConfig(
            steps=300,
            batch=8,
            optimizer="adamw",
            lr=1e-3,
            visual_lr_factor=0.5,
            weight_decay=1e-4,
            warmup=40,
            schedule="cosine",
            milestones=(),
            factors=(),
            clip_gradient=0.1,
            augmentation=0.0,
            checkpoint_every=100,
        ),
        short_side=128,
        long_side=160,
    )


def r50() -> DetectorConfig:
    """Return Co-Deformable-DETR with ResNet-50, trained for 12 epochs.

    As published, but at one image size: 800 pixels, without crops.
    """
    return DetectorConfig(
        preset="r50",
        backbone=Backbone("resnet50", "IMAGENET1K_V1"),
        fit=_published_training(weight_decay=1e-4),
        epochs=12,
        drops=(11,),
    )


def swin_l() -> DetectorConfig:
    """Return the same with Swin-L from the Hugging Face hub, without drop path.

    It needs a GPU with much memory.
    """
    return DetectorConfig(
        preset="swin_l",
        co_detr=CoDetr(checkpoint_layers=True),
        backbone=Backbone(f"transformers:{SWIN_LARGE}", SWIN_LARGE),
        fit=_published_training(weight_decay=0.05),
        epochs=12,
        drops=(11,),
        accumulate=4,
    )


def _published_training(weight_decay: float) -> TrainingConfig:
    return TrainingConfig(
        batch=16,
        optimizer="adamw",
        lr=2e-4,
        visual_lr_factor=0.1,
        weight_decay=weight_decay,
        warmup=0,
        milestones=(),
        factors=(),
        clip_gradient=0.1,
        augmentation=0.0,
    )


def real_time_detector(model: DetectorModel, network: str) -> DetectorConfig:
    """Return the fine-tuning of a detector of transformers with an ATSS head.

    ``network``: its name on the Hugging Face hub, or its folder.
    """
    return DetectorConfig(
        preset=model,
        model=model,
        network=network,
        co_detr=CoDetr(auxiliary=("atss",)),
        fit=replace(_published_training(weight_decay=1e-4), lr=1e-4, warmup=200),
        epochs=12,
        drops=(11,),
        short_side=640,
    )


DETECTOR_PRESETS: dict[str, Callable[[], DetectorConfig]] = {
    "tiny": small,
    "r50": r50,
    "swin_l": swin_l,
}
REAL_TIME_PRESETS: dict[str, Callable[[], DetectorConfig]] = {
    "rt-detr-v2": partial(real_time_detector, "rt-detr-v2", "PekingU/rtdetr_v2_r18vd"),
    "d-fine": partial(real_time_detector, "d-fine", "ustc-community/dfine-small-coco"),
}
