from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from coin_ray.config import Cloud, Distill, Ensemble, Folder, check_runnable
from coin_ray.config.co_detr import CoDetr
from coin_ray.config.presets import PRESETS, folder, with_student
from coin_ray.errors import ConfigError
from coin_ray.runs.graph import ORDER, build_steps
from coin_ray.runs.steps import Step


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_runs_or_names_the_options_it_needs(name: str) -> None:
    config = PRESETS[name]()
    assert config.preset == name
    assert (PRESETS[name].__doc__ or "").strip()
    if isinstance(config.data, Folder) and not config.data.images:
        with pytest.raises(ConfigError, match="give --images"):
            check_runnable(config)
        config = replace(config, data=replace(config.data, images="x"))
    if not config.classes:
        with pytest.raises(ConfigError, match="give --classes"):
            check_runnable(config)
        config = replace(config, classes=("a",))
    if not config.cloud.url and config.cloud.serve == "none":
        with pytest.raises(ConfigError, match="give --cloud"):
            check_runnable(config)
        config = replace(config, cloud=Cloud(url="https://x"))
    check_runnable(config)


def test_own_images_get_fused_batch_norms_and_the_demo_keeps_its_figures() -> None:
    fused = {n for n in PRESETS if PRESETS[n]().collect.fuse_batch_norms}
    assert fused == {"folder", "laptop"}
    config = PRESETS["laptop"]()
    slow = replace(config, collect=replace(config.collect, fuse_batch_norms=False))
    assert build_steps(slow)["collect"].fingerprint == (
        build_steps(config)["collect"].fingerprint
    ), "a finished collection stays one"


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("baselines", [False, True])
def test_steps_come_after_their_inputs(name: str, baselines: bool) -> None:
    steps = build_steps(PRESETS[name](), baselines=baselines)
    assert set(steps) <= set(ORDER)
    assert ("oracle" in steps) == baselines
    assert len({s.fingerprint for s in steps.values()}) == len(steps)
    assert len({s.folder("r") for s in steps.values()}) == len(steps)
    earlier_names: set[str] = set()
    for step_name, step in steps.items():
        assert step_name == step.name
        assert {i.name for i in step.inputs} <= earlier_names
        assert all(steps[i.name] is i for i in step.inputs)
        earlier_names.add(step_name)


def _same_fingerprints(
    steps: Mapping[str, Step], other_steps: Mapping[str, Step]
) -> set[str]:
    """Return the names of the steps that have the same fingerprint in both."""
    return {
        name
        for name, step in steps.items()
        if step.fingerprint == other_steps[name].fingerprint
    }


def test_baselines_do_not_train_the_student_again() -> None:
    config = PRESETS["demo"]()
    steps, with_baselines = build_steps(config), build_steps(config, baselines=True)
    unchanged = _same_fingerprints(steps, with_baselines)
    assert unchanged == steps.keys() - {"evaluate", "report"}


def test_another_cloud_does_not_train_the_oracle_again() -> None:
    """The oracle reads the truth only."""
    config = PRESETS["demo"]()
    other = replace(config, cloud=replace(config.cloud, views=("plain", "mirrored")))
    steps = build_steps(config, baselines=True)
    other_steps = build_steps(other, baselines=True)
    assert _same_fingerprints(steps, other_steps) == {"images", "oracle"}


def test_another_student_keeps_the_steps_before_it_and_trains_its_own_baselines() -> (
    None
):
    config = PRESETS["demo"]()
    detr = with_student(config, "co-detr")
    assert with_student(config, "faster-rcnn") == config
    steps = build_steps(config, baselines=True)
    detr_steps = build_steps(detr, baselines=True)
    shared = {"images", "collect", "propagate", "separate"}
    assert _same_fingerprints(steps, detr_steps) == shared
    linear = replace(detr, distill=replace(detr.distill, co_detr_classes="linear"))
    linear_steps = build_steps(linear, baselines=True)
    assert "oracle" not in _same_fingerprints(detr_steps, linear_steps)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_may_have_a_co_detr_student(name: str) -> None:
    distill = with_student(PRESETS[name](), "co-detr").distill
    assert (distill.student, distill.fit.optimizer) == ("co-detr", "adamw")
    assert distill.burn_up < distill.fit.steps


@pytest.mark.parametrize(
    "network",
    [CoDetr(), CoDetr(auxiliary=("rcnn",)), CoDetr(auxiliary=(), roi_boxes="agnostic")],
)
def test_a_co_detr_student_needs_its_faster_rcnn_head(network: CoDetr) -> None:
    with pytest.raises(ConfigError, match="Faster R-CNN head"):
        Distill(student="co-detr", co_detr=network)


def test_a_co_detr_student_may_have_the_atss_head_beside_it() -> None:
    network = CoDetr(auxiliary=("rcnn", "atss"), roi_boxes="agnostic")
    assert Distill(student="co-detr", co_detr=network).co_detr.auxiliary == (
        "rcnn",
        "atss",
    )


def test_new_thresholds_cost_no_call() -> None:
    config = PRESETS["demo"]()
    other = replace(config, labels=replace(config.labels, score_min=0.99))
    unchanged = _same_fingerprints(build_steps(config), build_steps(other))
    assert "collect" in unchanged
    assert "propagate" not in unchanged


def test_clip_labels_depend_on_both_sides_of_the_input_size() -> None:
    config = PRESETS["demo"]()
    longer = replace(config.detector, long_side=config.detector.long_side + 32)
    other_steps = build_steps(replace(config, detector=longer))
    assert "collect" not in _same_fingerprints(build_steps(config), other_steps)


def test_the_identity_of_a_single_cloud_does_not_change() -> None:
    """Steps of versions with one cloud stay finished, whatever ``ensemble`` says."""
    config = PRESETS["demo"]()
    input_size = (config.detector.short_side, config.detector.long_side)
    other = replace(config, ensemble=Ensemble("failover", (2.0,)))
    for single_cloud in (config, other):
        collect = build_steps(single_cloud)["collect"]
        assert collect.identity == (
            config.cloud,
            config.classes,
            config.collect,
            config.clip,
            input_size,
        )


def test_the_content_of_a_label_map_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    file = tmp_path / "map.yaml"
    config = PRESETS["demo"]()
    mapped = replace(config, cloud=replace(config.cloud, label_map=str(file)))
    second = replace(
        config, more_clouds=(Cloud(service="google-vision", label_map=str(file)),)
    )
    configs = (config, mapped, second)
    http, google = "service: http\n", "service: google-vision\n"
    rounds = []
    for text in (None, http, google, http):
        if text is not None:
            file.write_text(text)
        rounds.append([build_steps(c)["collect"].fingerprint for c in configs])
    assert rounds[1] == rounds[3]
    by_config = list(zip(*rounds, strict=True))
    assert [len(set(fingerprints)) for fingerprints in by_config] == [1, 3, 3]
    assert "images" in _same_fingerprints(build_steps(config), build_steps(mapped))


SERVICES = [
    ("http", "", False),
    ("http", "https://x", True),
    ("dino-x", "", True),
    ("azure-vision", "", True),
]


@pytest.mark.parametrize(("service", "url", "runnable"), SERVICES)
@pytest.mark.parametrize("second", [False, True])
def test_a_service_may_have_a_fixed_address(
    service: str, url: str, runnable: bool, second: bool
) -> None:
    """See ``coin_ray.cloud.services`` for the services without a fixed address."""
    cloud = Cloud(service=service, url=url)  # type: ignore[arg-type]
    config = replace(
        PRESETS["folder"](), data=Folder("images"), classes=("a",), cloud=cloud
    )
    if second:
        config = replace(config, cloud=Cloud(url="https://first"), more_clouds=(cloud,))
    if runnable:
        check_runnable(config)
    else:
        with pytest.raises(ConfigError, match="which cloud"):
            check_runnable(config)


def test_a_budget_needs_the_price_of_a_call() -> None:
    """Without one, it would never stop anything."""
    config = replace(folder(), data=Folder(images="photos"), classes=("cat",))
    cloud = Cloud(url="https://x", max_usd=20.0)
    with pytest.raises(ConfigError, match="usd-per-call"):
        check_runnable(replace(config, cloud=cloud))
    check_runnable(replace(config, cloud=replace(cloud, usd_per_call=0.01)))


HTTP = Cloud(url="https://x")
UNUSABLE = [
    ({"more_clouds": (HTTP,)}, "twice"),
    ({"more_clouds": (replace(HTTP, usd_per_call=0.01, max_usd=5.0),)}, "twice"),
    (
        {
            "more_clouds": (Cloud(service="dino-x"),),
            "ensemble": Ensemble(reliability=(1.0,)),
        },
        "each of the 2 clouds, or views; got 1",
    ),
]


@pytest.mark.parametrize(("changes", "message"), UNUSABLE)
def test_clouds_that_can_not_be_combined(
    changes: dict[str, object], message: str
) -> None:
    config = replace(
        PRESETS["folder"](), data=Folder("images"), classes=("a",), cloud=HTTP
    )
    check_runnable(
        replace(
            config,
            more_clouds=(replace(HTTP, model="other"),),
            ensemble=Ensemble("cascade", (1.0, 2.0)),
        )
    )
    with pytest.raises(ConfigError, match=message):
        check_runnable(replace(config, **changes))  # type: ignore[arg-type]


def test_a_cascade_needs_clip() -> None:
    config = replace(
        PRESETS["folder"](),
        data=Folder("images"),
        classes=("a",),
        cloud=HTTP,
        more_clouds=(Cloud(service="dino-x"),),
    )
    config = replace(
        config,
        ensemble=Ensemble("cascade"),
        collect=replace(config.collect, labeler="none"),
    )
    with pytest.raises(ConfigError, match="a second opinion on the first"):
        check_runnable(config)


@pytest.mark.parametrize("iou", [0.0, -0.1, 1.1])
def test_unusable_overlaps(iou: float) -> None:
    with pytest.raises(ConfigError, match=r"ensemble\.iou"):
        Ensemble(iou=iou)
