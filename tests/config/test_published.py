"""The constants of the official configs, typed from the notes on the paper, not from
the presets."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import get_args

import pytest

from coin_ray.commands.arguments import parse_run_arguments
from coin_ray.config import Cloud, Folder, TrainingConfig, check_runnable
from coin_ray.config.fingerprints import to_identity
from coin_ray.config.presets import PRESETS
from coin_ray.config.published import SETS, CloudKind, DataSet, published
from coin_ray.config.yaml_files import parse_config
from coin_ray.errors import ConfigError
from coin_ray.training.schedule import learning_rate_factor

EVERY: list[tuple[DataSet, CloudKind]] = [
    (name, cloud) for name in get_args(DataSet) for cloud in get_args(CloudKind)
]

# set, classes, style, CLIP, the cloud's threshold, CLIP's threshold, pi, gamma 2, share
# of the student in the teacher
CONSTANTS: list[tuple[DataSet, int, str, str, float, float, float, float, float]] = [
    (
        *("foggy_cityscapes", 8, "foggy cityscapes style", "RN50"),
        *(0.25, 0.0, 0.7, 0.1, 0.0004),
    ),
    ("cityscapes", 8, "cityscapes style", "RN50", 0.25, 0.0, 0.6, 0.5, 0.0004),
    ("bdd100k", 7, "BDD100K style", "RN50", 0.3, 0.0, 0.7, 0.1, 0.0004),
    ("kitti", 1, "KITTI style", "RN50", 0.25, 0.0, 0.7, 0.1, 0.0001),
    ("sim10k", 1, "SIM style", "RN50", 0.25, 0.0, 0.7, 0.1, 0.0004),
    ("clipart", 20, "clipart style", "RN101", 0.25, 0.5, 0.7, 0.1, 0.0004),
]


@pytest.mark.parametrize("row", CONSTANTS, ids=[row[0] for row in CONSTANTS])
def test_constants_of_grounding_dino(
    row: tuple[DataSet, int, str, str, float, float, float, float, float],
) -> None:
    config = published(row[0])
    labels, distill = config.labels, config.distill
    thresholds = (labels.score_min, labels.clip_score_min, distill.fusion_score_min)
    constants = (
        *(config.preset, len(config.classes), config.clip.style, config.clip.model),
        *(*thresholds, distill.private, distill.teacher_rate),
    )
    assert constants == row


REBOUND = {0: 1, 40_000: 0.1, 45_000: 0.5, 60_000: 0.1}
FALLING = {0: 1, 40_000: 0.1, 45_000: 0.1, 60_000: 0.1}
# set, cloud, iterations, end of the burn-up, factor of the learning rate from each
# milestone on
DISTILLATION: list[tuple[DataSet, CloudKind, int, int, dict[int, float]]] = [
    ("foggy_cityscapes", "gdino", 65_000, 45_000, REBOUND),
    ("foggy_cityscapes", "glip", 65_000, 45_000, REBOUND),
    ("foggy_cityscapes", "class-only", 65_000, 45_000, REBOUND),
    ("cityscapes", "gdino", 65_000, 45_000, FALLING),
    ("cityscapes", "glip", 65_000, 45_000, FALLING),
    ("bdd100k", "gdino", 120_000, 100_000, {0: 1, 60_000: 0.5, 80_000: 0.1}),
    ("bdd100k", "glip", 75_000, 55_000, {0: 1, 50_000: 0.1, 55_000: 0.5, 70_000: 0.1}),
    ("clipart", "gdino", 70_000, 45_000, {0: 1, 45_000: 0.1}),
    ("kitti", "gdino", 30_000, 25_000, {0: 1, 25_000: 0.1}),
    ("sim10k", "glip", 65_000, 45_000, REBOUND),
]


def _factors(training: TrainingConfig, milestones: list[int]) -> dict[int, float]:
    """Return the learning-rate factor at each milestone (at 0: after the warm-up).

    It stays the same until the step before the next milestone.
    """
    starts = [max(milestone, training.warmup) for milestone in milestones]
    ends = [*(milestone - 1 for milestone in milestones[1:]), training.steps - 1]
    at_starts = [learning_rate_factor(step, training) for step in starts]
    at_ends = [learning_rate_factor(step, training) for step in ends]
    assert at_starts == at_ends
    return dict(zip(milestones, at_starts, strict=True))


@pytest.mark.parametrize(
    ("name", "cloud", "steps", "burn_up", "expected"), DISTILLATION
)
def test_schedules_of_distillation(
    name: DataSet,
    cloud: CloudKind,
    steps: int,
    burn_up: int,
    expected: dict[int, float],
) -> None:
    distill = published(name, cloud).distill
    assert (distill.fit.steps, distill.burn_up) == (steps, burn_up)
    assert _factors(distill.fit, list(expected)) == expected


@pytest.mark.parametrize("cloud", get_args(CloudKind))
@pytest.mark.parametrize(
    ("name", "steps", "expected"),
    [
        *(
            (name, 50_000, {0: 1, 40_000: 0.1})
            for name in ("foggy_cityscapes", "cityscapes", "kitti", "sim10k")
        ),
        ("clipart", 50_000, {0: 1}),
        ("bdd100k", 90_000, {0: 1, 50_000: 0.5, 70_000: 0.1}),
    ],
)
def test_schedules_of_propagation(
    name: DataSet, cloud: CloudKind, steps: int, expected: dict[int, float]
) -> None:
    fit = published(name, cloud).propagate.fit
    assert fit.steps == steps
    assert _factors(fit, list(expected)) == expected


@pytest.mark.parametrize(("name", "cloud"), EVERY)
def test_what_all_runs_share(name: DataSet, cloud: CloudKind) -> None:
    config = published(name, cloud)
    for training in (config.propagate.fit, config.distill.fit):
        _assert_settings(
            training,
            batch=3,
            optimizer="sgd",
            lr=1e-3,
            visual_lr_factor=0.1,
            weight_decay=1e-4,
            warmup=400,
            clip_gradient=None,
            augmentation=1.0,
        )
    _assert_settings(
        config.propagate,
        alignment=10,
        prototype_rate=0.0004,
        prototypes_from=5000,
        views="both",
        soft_labels=False,
    )
    _assert_settings(
        config.distill,
        alignment=10,
        inconsistent=0.1,
        prototype_rate=0.0004,
        prototypes_from=5000,
        start_from="clip",
        inconsistent_mean="elements",
        inconsistent_from=None,
        fusion="ckg",
        ckg_heads=8,
        ckg_lr=1e-3,
        ckg_background=False,
        ckg_first=False,
    )
    _assert_settings(
        config.detector,
        short_side=600,
        long_side=1333,
        batch_norm="live",
        temperature=0.01,
        anchor_sizes=(32, 64, 128, 256, 512),
        anchor_ratios=(0.5, 1, 2),
        anchor_weights=(1, 1, 1, 1),
        unseen_images="ignored",
        rpn_batch=256,
        proposals_train=2000,
        proposals_test=1000,
        rpn_nms=0.7,
        roi_batch=512,
        roi_positive=0.25,
        roi_size=14,
        roi_samples=0,
        background_weight=0.9,
        box_loss="l1",
        context_tokens=4,
        background="prompt",
        score_min=0.05,
        nms=0.5,
        detections=100,
        residual_transformation=False,
    )
    _assert_settings(
        config.separate,
        iou_min=0.5,
        clip_score_min=0.05,
        fused_boxes="after_burn_up",
        lone_clip_score=0.8,
        lone_cloud_consistent=True,
        clip_labels=False,
    )
    _assert_settings(config.collect, labeler="roi", fuse_iou=0.6)
    _assert_settings(config.labels, probabilities="published", clip_background="drop")
    assert config.evaluate.plus_one
    assert config.seed == 2024


def _assert_settings(section: object, **expected: object) -> None:
    assert {name: getattr(section, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("cloud", "form", "thresholds"),
    [
        ("gdino", "normalised", {0.25, 0.3}),
        ("glip", "smoothed", {0.5}),
        ("class-only", "one_hot", {0.25, 0.3}),
    ],
)
def test_clouds(cloud: CloudKind, form: str, thresholds: set[float]) -> None:
    configs = [published(name, cloud) for name in SETS]
    assert {c.labels.cloud_vectors for c in configs} == {form}
    assert {c.labels.score_min for c in configs} == thresholds


def test_cityscapes_with_glip_has_the_usual_weights() -> None:
    distill = published("cityscapes", "glip").distill
    assert (distill.fusion_score_min, distill.private) == (0.7, 0.1)


def test_class_orders() -> None:
    city = ("truck", "car", "rider", "person", "train", "motorcycle", "bicycle", "bus")
    assert SETS["foggy_cityscapes"].classes == SETS["cityscapes"].classes == city
    assert SETS["bdd100k"].classes == (
        "person",
        "rider",
        "car",
        "truck",
        "bus",
        "motorcycle",
        "bicycle",
    )
    assert SETS["kitti"].classes == SETS["sim10k"].classes == ("car",)
    voc = SETS["clipart"].classes
    assert (list(voc), len(voc), voc[0], voc[10], voc[15], voc[-1]) == (
        sorted(voc),
        20,
        "aeroplane",
        "diningtable",
        "pottedplant",
        "tvmonitor",
    )


@pytest.mark.parametrize(("name", "cloud"), EVERY)
def test_every_preset_is_valid_and_survives_a_config_file(
    name: DataSet, cloud: CloudKind
) -> None:
    config = replace(
        published(name, cloud), data=Folder(images="x"), cloud=Cloud(url="https://x")
    )
    check_runnable(config)
    assert parse_config(asdict(config), "here") == config


OPTIONS = ("--images", "pictures", "--cloud", "https://detector.example.com")


@pytest.mark.parametrize("name", get_args(DataSet))
def test_presets_by_name(name: DataSet) -> None:
    assert PRESETS[name]() == published(name)
    config = parse_run_arguments((name, *OPTIONS))[0]
    assert isinstance(config.data, Folder)
    assert (config.data.images, config.classes) == ("pictures", SETS[name].classes)
    assert to_identity(config.distill) == to_identity(published(name).distill)


def test_the_kind_of_cloud_is_an_option() -> None:
    config = parse_run_arguments(
        ("bdd100k", "--published-cloud", "glip", *OPTIONS, "--distill.private", "0.2")
    )[0]
    assert (
        config.distill.burn_up,
        config.labels.score_min,
        config.distill.private,
    ) == (55_000, 0.5, 0.2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("folder", *OPTIONS, "--classes", "a", "--published-cloud", "glip"),
            "folder has none",
        ),
        (
            ("--config", "x.yaml", "--published-cloud", "glip"),
            "remove --published-cloud",
        ),
    ],
)
def test_the_kind_of_cloud_is_an_option_of_the_published_presets_only(
    arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_run_arguments(arguments)
