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
        "foggy_cityscapes",
        8,
        "foggy cityscapes style",
        "RN50",
        0.25,
        0.0,
        0.7,
        0.1,
        0.0004,
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
    found = (
        config.preset,
        len(config.classes),
        config.clip.style,
        config.clip.model,
        *thresholds,
        distill.private,
        distill.teacher_rate,
    )
    assert found == row


# set, cloud, iterations, end of the burn-up, factor of the learning rate from each
# milestone on
DISTILLATION: list[tuple[DataSet, CloudKind, int, int, dict[int, float]]] = [
    (
        "foggy_cityscapes",
        "gdino",
        65_000,
        45_000,
        {0: 1, 40_000: 0.1, 45_000: 0.5, 60_000: 0.1},
    ),
    (
        "foggy_cityscapes",
        "glip",
        65_000,
        45_000,
        {0: 1, 40_000: 0.1, 45_000: 0.5, 60_000: 0.1},
    ),
    (
        "foggy_cityscapes",
        "class-only",
        65_000,
        45_000,
        {0: 1, 40_000: 0.1, 45_000: 0.5, 60_000: 0.1},
    ),
    (
        "cityscapes",
        "gdino",
        65_000,
        45_000,
        {0: 1, 40_000: 0.1, 45_000: 0.1, 60_000: 0.1},
    ),
    (
        "cityscapes",
        "glip",
        65_000,
        45_000,
        {0: 1, 40_000: 0.1, 45_000: 0.1, 60_000: 0.1},
    ),
    ("bdd100k", "gdino", 120_000, 100_000, {0: 1, 60_000: 0.5, 80_000: 0.1}),
    ("bdd100k", "glip", 75_000, 55_000, {0: 1, 50_000: 0.1, 55_000: 0.5, 70_000: 0.1}),
    ("clipart", "gdino", 70_000, 45_000, {0: 1, 45_000: 0.1}),
    ("kitti", "gdino", 30_000, 25_000, {0: 1, 25_000: 0.1}),
    ("sim10k", "glip", 65_000, 45_000, {0: 1, 40_000: 0.1, 45_000: 0.5, 60_000: 0.1}),
]


def factors(fit: TrainingConfig, milestones: list[int]) -> dict[int, float]:
    """At each milestone (at 0: after the warm-up), having stayed until the step before
    the next one."""
    ends = [*(m - 1 for m in milestones[1:]), fit.steps - 1]
    assert [learning_rate_factor(e, fit) for e in ends] == [
        learning_rate_factor(max(m, fit.warmup), fit) for m in milestones
    ]
    return {m: learning_rate_factor(max(m, fit.warmup), fit) for m in milestones}


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
    assert factors(distill.fit, list(expected)) == expected


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
    assert factors(fit, list(expected)) == expected


@pytest.mark.parametrize(("name", "cloud"), EVERY)
def test_what_all_runs_share(name: DataSet, cloud: CloudKind) -> None:
    config = published(name, cloud)
    distill, detector = config.distill, config.detector
    for fit in (config.propagate.fit, distill.fit):
        assert (
            fit.batch,
            fit.optimizer,
            fit.lr,
            fit.visual_lr_factor,
            fit.weight_decay,
            fit.warmup,
        ) == (3, "sgd", 1e-3, 0.1, 1e-4, 400)
        assert (fit.clip_gradient, fit.augmentation) == (None, 1.0)
    assert config.evaluate.plus_one
    assert (config.propagate.alignment, distill.alignment, distill.inconsistent) == (
        10,
        10,
        0.1,
    )
    assert {config.propagate.prototype_rate, distill.prototype_rate} == {0.0004}
    assert {config.propagate.prototypes_from, distill.prototypes_from} == {5000}
    assert (
        distill.start_from,
        distill.inconsistent_mean,
        distill.inconsistent_from,
        distill.fusion,
    ) == ("clip", "elements", None, "ckg")
    assert (
        distill.ckg_heads,
        distill.ckg_lr,
        distill.ckg_background,
        distill.ckg_first,
    ) == (8, 1e-3, False, False)
    assert (
        detector.short_side,
        detector.long_side,
        detector.batch_norm,
        detector.temperature,
    ) == (600, 1333, "live", 0.01)
    assert (detector.anchor_sizes, detector.anchor_ratios) == (
        (32, 64, 128, 256, 512),
        (0.5, 1, 2),
    )
    assert (
        detector.rpn_batch,
        detector.proposals_train,
        detector.proposals_test,
        detector.rpn_nms,
    ) == (256, 2000, 1000, 0.7)
    assert (
        detector.roi_batch,
        detector.roi_positive,
        detector.roi_size,
        detector.roi_samples,
    ) == (512, 0.25, 14, 0)
    assert (
        detector.background_weight,
        detector.box_loss,
        detector.context_tokens,
        detector.background,
    ) == (0.9, "l1", 4, "prompt")
    assert (detector.score_min, detector.nms, detector.detections) == (0.05, 0.5, 100)
    assert (
        detector.anchor_weights,
        detector.unseen_images,
        detector.residual_transformation,
    ) == ((1, 1, 1, 1), "ignored", False)
    assert (
        config.separate.iou_min,
        config.separate.clip_score_min,
        config.separate.fused_boxes,
    ) == (0.5, 0.05, "after_burn_up")
    assert (
        config.separate.lone_clip_score,
        config.separate.lone_cloud_consistent,
        config.separate.clip_labels,
    ) == (0.8, True, False)
    assert (config.collect.labeler, config.collect.fuse_iou) == ("roi", 0.6)
    assert (config.labels.probabilities, config.labels.clip_background) == (
        "published",
        "drop",
    )
    assert (config.propagate.views, config.propagate.soft_labels, config.seed) == (
        "both",
        False,
        2024,
    )


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


GIVEN = ("--images", "pictures", "--cloud", "https://detector.example.com")


@pytest.mark.parametrize("name", get_args(DataSet))
def test_presets_by_name(name: DataSet) -> None:
    assert PRESETS[name]() == published(name)
    config = parse_run_arguments((name, *GIVEN))[0]
    assert isinstance(config.data, Folder)
    assert (config.data.images, config.classes) == ("pictures", SETS[name].classes)
    assert to_identity(config.distill) == to_identity(published(name).distill)


def test_the_kind_of_cloud_is_an_option() -> None:
    config = parse_run_arguments(
        ("bdd100k", "--published-cloud", "glip", *GIVEN, "--distill.private", "0.2")
    )[0]
    assert (
        config.distill.burn_up,
        config.labels.score_min,
        config.distill.private,
    ) == (55_000, 0.5, 0.2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("folder", *GIVEN, "--classes", "a", "--published-cloud", "glip"),
            "folder has none",
        ),
        (
            ("--config", "x.yaml", "--published-cloud", "glip"),
            "remove --published-cloud",
        ),
    ],
)
def test_where_the_kind_of_cloud_says_nothing(
    arguments: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_run_arguments(arguments)
