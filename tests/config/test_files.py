from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from coin_ray import config as settings
from coin_ray.config import (
    IN_PACKAGE,
    Cloud,
    DemoScenes,
    Distill,
    Ensemble,
    Folder,
    PipelineConfig,
    Propagate,
    TrainingConfig,
    fields,
    fingerprints,
    pipeline,
    relocate_paths,
)
from coin_ray.config.fingerprints import fingerprint
from coin_ray.config.presets import PRESETS, demo
from coin_ray.config.yaml_files import parse_config, read_config, to_yaml
from coin_ray.errors import ConfigError
from coin_ray.runs.graph import build_steps

Trail = tuple[str | int, ...]


def leaves(
    value: Any, path: Trail = (), counts: bool = True
) -> Iterator[tuple[Trail, bool]]:
    """(path of a leaf setting, whether it is part of the identity)."""
    for field in dataclasses.fields(value):
        item, inside = (
            getattr(value, field.name),
            counts and bool(field.metadata.get("identity", True)),
        )
        if dataclasses.is_dataclass(item):
            yield from leaves(item, (*path, field.name), inside)
        elif isinstance(item, tuple) and any(
            dataclasses.is_dataclass(part) for part in item
        ):
            for number, part in enumerate(item):
                yield from leaves(part, (*path, field.name, number), inside)
        else:
            yield (*path, field.name), inside


def changed(config: PipelineConfig, path: Trail) -> PipelineConfig:
    """The same config with one leaf different, whether or not that is a possible value."""
    other = copy.deepcopy(config)
    holder: Any = other
    for name in path[:-1]:
        holder = holder[name] if isinstance(name, int) else getattr(holder, name)
    last = str(path[-1])
    object.__setattr__(holder, last, another(getattr(holder, last)))
    return other


def another(value: Any) -> Any:
    if isinstance(value, tuple):
        return (*value[:-1], another(value[-1] if value else None))
    return "other" if value is None or isinstance(value, (str, bool)) else value + 1


FIT = TrainingConfig(batch=8, milestones=(5,), factors=(0.5,), gpu=True, max_workers=2)
FULL = [
    dataclasses.replace(
        demo(),
        data=data,
        more_clouds=(Cloud(url="https://x"),),
        propagate=Propagate(fit=FIT),
        distill=Distill(fit=FIT),
    )
    for data in (DemoScenes(), Folder(images="x"))
]
CASES = [
    pytest.param(c, p, i, id=f"{type(c.data).__name__}-{'.'.join(map(str, p))}")
    for c in FULL
    for p, i in leaves(c)
]


def step_fingerprints(config: PipelineConfig) -> list[str]:
    return [step.fingerprint for step in build_steps(config, baselines=True).values()]


@pytest.mark.parametrize(("config", "path", "counts"), CASES)
def test_identity_fields_change_fingerprints_and_others_do_not(
    config: PipelineConfig, path: Trail, counts: bool
) -> None:
    other = changed(config, path)
    assert (fingerprint(config) != fingerprint(other)) == counts
    assert (step_fingerprints(config) != step_fingerprints(other)) == counts


@pytest.mark.parametrize(
    "name",
    [
        "workers",
        "gpu",
        "checkpoint_every",
        "rate",
        "in_flight",
        "deadline",
        "attempts",
        "usd_per_call",
        "max_usd",
        "max_calls",
        "batch",
        "token_env",
    ],
)
def test_fields_that_say_how_something_runs(name: str) -> None:
    holders = [
        k
        for k in vars(settings).values()
        if dataclasses.is_dataclass(k)
        and name in {f.name for f in dataclasses.fields(k)}
    ]
    marked = {
        k.__name__
        for k in holders
        for f in dataclasses.fields(k)
        if f.name == name and not f.metadata.get("identity", True)
    }
    assert marked == (
        {k.__name__ for k in holders} - {"TrainingConfig"}
        if name == "batch"
        else {k.__name__ for k in holders}
    )


def test_equal_numbers_are_one_setting() -> None:
    assert fingerprint({"a": 1}) == fingerprint({"a": 1.0}) != fingerprint({"a": 1.5})


def test_kinds_of_data_differ() -> None:
    assert fingerprint(DemoScenes()) != fingerprint(Folder())


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize(
    "data", [None, DemoScenes(train=3), Folder(images="s3://b/x", test="y")]
)
def test_yaml_round_trip(
    preset: str, data: DemoScenes | Folder | None, tmp_path: Path
) -> None:
    config = PRESETS[preset]()
    if data is not None:
        config = dataclasses.replace(
            config, data=data, classes=("traffic light", "a: b", "no", "1")
        )
        config = dataclasses.replace(
            config,
            more_clouds=(Cloud(service="dino-x", max_usd=5),),
            ensemble=Ensemble("cascade", (1.0, 0.5)),
        )
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    back = read_config(str(file))
    assert back == config
    assert fingerprint(back) == fingerprint(config)


def plain() -> dict[str, Any]:
    return dataclasses.asdict(demo())


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("detektor",), {}, "detektor"),
        (("distill", "fit", "stepz"), 5, "distill.fit.stepz"),
        (("cloud", "token"), "secret", "cloud.token"),
        (("distill", "fit", "steps"), "many", "distill.fit.steps"),
        (("detector", "batch_norm"), "thawed", "detector.batch_norm"),
        (("data", "trian"), 3, "trian"),
        (("more_clouds",), [{"service": "dino-y"}], "more_clouds.0.service"),
        (("more_clouds",), [{"url": "https://x", "tokn": 1}], "more_clouds.0.tokn"),
        (
            ("ensemble", "reliability"),
            [1.0, 0.0],
            "ensemble.reliability must be positive",
        ),
        (("ensemble", "mode"), "vote", "ensemble.mode"),
        (("labels", "score_min"), 2.0, "labels.score_min must lie in 0..1"),
        (("classes",), ["cat", "Cat"], "cat"),
    ],
)
def test_wrong_settings_are_named(
    path: tuple[str, ...], value: Any, named: str
) -> None:
    values = plain()
    holder = values
    for name in path[:-1]:
        holder = holder[name]
    holder[path[-1]] = value
    with pytest.raises(ConfigError, match=r"my\.yaml") as caught:
        parse_config(values, "my.yaml")
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "is not YAML"),
        ("- 1", "expected a mapping"),
        ("", "expected a mapping"),
        (None, "no config file"),
    ],
)
def test_unreadable_files(text: str | None, said: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_config(str(file))


def test_where_the_package_is_installed_changes_no_fingerprint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here, elsewhere = demo(), "/elsewhere/coin_ray"
    assert here.clip.model.startswith(fields.PACKAGE)
    moved = parse_config(
        yaml.safe_load(to_yaml(here).replace(IN_PACKAGE, elsewhere)), "moved.yaml"
    )
    before = fingerprint(here)
    assert fingerprint(moved) != before
    monkeypatch.setattr(fingerprints, "PACKAGE", elsewhere)
    assert fingerprint(moved) == before


def test_a_path_behind_the_kind_of_a_network_is_a_path_too() -> None:
    here = f"open_clip:{settings.PACKAGE}/demo/assets/coin_tiny.json"
    assert (
        relocate_paths(here, settings.PACKAGE, IN_PACKAGE)
        == f"open_clip:{IN_PACKAGE}/demo/assets/coin_tiny.json"
    )
    assert (
        fingerprints.to_identity(here)
        == "open_clip:coin_ray/demo/assets/coin_tiny.json"
    )
    assert (
        relocate_paths(f"{settings.PACKAGE}_other/x", settings.PACKAGE, IN_PACKAGE)
        == f"{settings.PACKAGE}_other/x"
    )


def test_files_of_the_package_are_found_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job's code lies in another folder on each node, and in none when its file is
    read again."""
    here, there = demo(), "/tmp/ray/session/working_dir_files/_ray_pkg_1/coin_ray"
    inside = relocate_paths(here, settings.PACKAGE, there)
    assert inside != here
    assert to_yaml(here).count(IN_PACKAGE) == str(here).count(settings.PACKAGE) > 0
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(pipeline, "PACKAGE", there)
        sent = pickle.dumps(inside)
    arrived = pickle.loads(sent)
    assert arrived == here
    assert fingerprint(arrived) == fingerprint(here)
    (tmp_path / "best.yaml").write_text(to_yaml(here))
    assert read_config(str(tmp_path / "best.yaml")) == here


def test_a_setting_that_has_moved_is_read_by_its_old_name_and_makes_the_same_run() -> (
    None
):
    """Separation's form of the cloud's vectors was a setting of separation; propagation
    has never read it."""
    values = dataclasses.asdict(demo())
    values["separate"]["cloud_vectors"] = values["labels"].pop("cloud_vectors")
    assert parse_config(values, "old.yaml") == demo()
    values["separate"]["cloud_vectors"] = "one_hot"
    moved = parse_config(values, "old.yaml")
    assert moved == dataclasses.replace(
        demo(), labels=dataclasses.replace(demo().labels, cloud_vectors="one_hot")
    )
    ours, theirs = (
        build_steps(demo(), baselines=True),
        build_steps(moved, baselines=True),
    )
    same = {name for name in ours if ours[name].fingerprint == theirs[name].fingerprint}
    assert same == {"images", "collect", "propagate", "pseudo_label", "oracle"}


def test_settings_that_came_later_leave_what_was_made_before() -> None:
    known = fingerprints.to_identity(demo())
    assert "corrections" not in known
    assert "cloud_vectors" not in known["labels"]
    assert fingerprints.to_identity(dataclasses.replace(demo(), corrections=("x",)))[
        "corrections"
    ] == ["x"]


def test_an_empty_schedule_of_the_removed_population_search_is_read() -> None:
    settings = dataclasses.asdict(demo())
    settings["distill"]["schedule"] = []
    assert parse_config(settings, "old.yaml") == demo()


def test_a_schedule_of_the_removed_population_search_is_an_error() -> None:
    settings = dataclasses.asdict(demo())
    change = {"start": 100, "alignment": 1.0, "inconsistent": 1.0, "private": 1.0}
    settings["distill"]["schedule"] = [change]
    with pytest.raises(ConfigError, match=r"old\.yaml: distill\.schedule .*removed in"):
        parse_config(settings, "old.yaml")


def test_a_renamed_config_class_keeps_its_name_in_fingerprints() -> None:
    assert fingerprints.to_identity(TrainingConfig())[""] == "Optimize"
    assert fingerprints.to_identity(DemoScenes())[""] == "DemoScenes"
