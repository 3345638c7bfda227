from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from coin_ray.config import Cloud, DemoScenes, Distill, Ensemble, Folder, check_runnable
from coin_ray.config.co_detr import CoDetr
from coin_ray.config.presets import PRESETS, with_student
from coin_ray.errors import ConfigError
from coin_ray.runs.graph import ORDER, build_steps


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_runs_or_says_what_it_still_needs(name: str) -> None:
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


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("baselines", [False, True])
def test_graphs(name: str, baselines: bool) -> None:
    steps = build_steps(PRESETS[name](), baselines=baselines)
    assert set(steps) <= set(ORDER)
    assert ("oracle" in steps) == baselines
    assert len({s.fingerprint for s in steps.values()}) == len(steps)
    assert len({s.folder("r") for s in steps.values()}) == len(steps)
    before: set[str] = set()
    for step_name, step in steps.items():
        assert step_name == step.name
        assert {i.name for i in step.inputs} <= before
        assert all(steps[i.name] is i for i in step.inputs)
        before.add(step_name)


def test_baselines_do_not_train_the_student_again() -> None:
    config = PRESETS["demo"]()
    alone, beside = build_steps(config), build_steps(config, baselines=True)
    assert all(
        alone[n].fingerprint == beside[n].fingerprint
        for n in ("images", "collect", "propagate", "separate", "distill", "export")
    )


def test_another_cloud_does_not_train_the_oracle_again() -> None:
    """It reads the truth alone."""
    config = PRESETS["demo"]()
    other = replace(config, cloud=replace(config.cloud, views=("plain", "mirrored")))
    ours, theirs = (
        build_steps(config, baselines=True),
        build_steps(other, baselines=True),
    )
    assert {n for n in ours if ours[n].fingerprint == theirs[n].fingerprint} == {
        "images",
        "oracle",
    }


def test_another_student_keeps_all_before_it_and_trains_baselines_of_its_own() -> None:
    config = PRESETS["demo"]()
    detr = with_student(config, "co-detr")
    assert with_student(config, "faster-rcnn") == config
    ours, theirs = (
        build_steps(config, baselines=True),
        build_steps(detr, baselines=True),
    )
    assert {n for n in ours if ours[n].fingerprint == theirs[n].fingerprint} == {
        "images",
        "collect",
        "propagate",
        "separate",
    }
    linear = replace(detr, distill=replace(detr.distill, co_detr_classes="linear"))
    assert (
        build_steps(linear, baselines=True)["oracle"].fingerprint
        != theirs["oracle"].fingerprint
    )


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
    other = replace(
        config, labels=replace(config.labels, score_min=0.99), data=DemoScenes()
    )
    same = replace(config, data=DemoScenes())
    assert (
        build_steps(other)["collect"].fingerprint
        == build_steps(same)["collect"].fingerprint
    )
    assert (
        build_steps(other)["propagate"].fingerprint
        != build_steps(same)["propagate"].fingerprint
    )


def test_clip_labels_depend_on_both_sides_of_the_view() -> None:
    config = PRESETS["demo"]()
    other = replace(
        config,
        detector=replace(config.detector, long_side=config.detector.long_side + 32),
    )
    assert (
        build_steps(other)["collect"].fingerprint
        != build_steps(config)["collect"].fingerprint
    )


def test_one_cloud_is_what_it_was() -> None:
    """Steps that were finished before there could be several clouds stay finished,
    whatever ``ensemble`` says."""
    config = PRESETS["demo"]()
    views = (config.detector.short_side, config.detector.long_side)
    for same in (config, replace(config, ensemble=Ensemble("failover", (2.0,)))):
        collect = build_steps(same)["collect"]
        assert collect.identity == (
            config.cloud,
            config.classes,
            config.collect,
            config.clip,
            views,
        )


def test_the_content_of_a_label_map_counts(tmp_path: Path) -> None:
    file = tmp_path / "map.yaml"
    config = PRESETS["demo"]()
    mapped = replace(config, cloud=replace(config.cloud, label_map=str(file)))
    second = replace(
        config, more_clouds=(Cloud(service="google-vision", label_map=str(file)),)
    )
    found = []
    for text in (
        None,
        "service: http\n",
        "service: google-vision\n",
        "service: http\n",
    ):
        if text is not None:
            file.write_text(text)
        found.append(
            [build_steps(c)["collect"].fingerprint for c in (config, mapped, second)]
        )
    assert found[1] == found[3]
    assert [len({column[k] for column in found}) for k in range(3)] == [1, 3, 3]
    assert (
        build_steps(mapped)["images"].fingerprint
        == build_steps(config)["images"].fingerprint
    )


SERVICES = [
    ("http", "", False),
    ("http", "https://x", True),
    ("dino-x", "", True),
    ("azure-vision", "", True),
]


@pytest.mark.parametrize(("service", "url", "runnable"), SERVICES)
@pytest.mark.parametrize("second", [False, True])
def test_a_service_may_know_its_own_address(
    service: str, url: str, runnable: bool, second: bool
) -> None:
    """Which of them have none is known to the services (``coin_ray.cloud.services``)."""
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


HTTP = Cloud(url="https://x")
UNUSABLE = [
    ({"more_clouds": (HTTP,)}, "twice"),
    ({"more_clouds": (replace(HTTP, max_usd=5.0),)}, "twice"),
    (
        {
            "more_clouds": (Cloud(service="dino-x"),),
            "ensemble": Ensemble(reliability=(1.0,)),
        },
        "each of the 2 clouds, or views; got 1",
    ),
]


@pytest.mark.parametrize(("changes", "said"), UNUSABLE)
def test_clouds_that_can_not_be_one(changes: dict[str, object], said: str) -> None:
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
    with pytest.raises(ConfigError, match=said):
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
    with pytest.raises(ConfigError, match="CLIP's labels of the first"):
        check_runnable(config)


@pytest.mark.parametrize("iou", [0.0, -0.1, 1.1])
def test_unusable_overlaps(iou: float) -> None:
    with pytest.raises(ConfigError, match=r"ensemble\.iou"):
        Ensemble(iou=iou)
