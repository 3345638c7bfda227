from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from coin_ray import config as config_package
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


def _leaves(
    config: Any, path: Trail = (), is_identifying: bool = True
) -> Iterator[tuple[Trail, bool]]:
    """Yield the path of each setting, and whether it is part of the identity."""
    for field in dataclasses.fields(config):
        setting = getattr(config, field.name)
        counts = is_identifying and bool(field.metadata.get("identity", True))
        setting_path = (*path, field.name)
        if dataclasses.is_dataclass(setting):
            yield from _leaves(setting, setting_path, counts)
        elif isinstance(setting, tuple) and any(map(dataclasses.is_dataclass, setting)):
            for number, section in enumerate(setting):
                yield from _leaves(section, (*setting_path, number), counts)
        else:
            yield setting_path, counts


def _with_another_value(config: PipelineConfig, path: Trail) -> PipelineConfig:
    """Return the config with one other setting, whether or not it is a valid one."""
    other = copy.deepcopy(config)
    holder: Any = other
    for name in path[:-1]:
        holder = holder[name] if isinstance(name, int) else getattr(holder, name)
    last = str(path[-1])
    object.__setattr__(holder, last, _another(getattr(holder, last)))
    return other


def _another(setting: Any) -> Any:
    if isinstance(setting, tuple):
        return (*setting[:-1], _another(setting[-1] if setting else None))
    if setting is None or isinstance(setting, (str, bool)):
        return "other"
    return setting + 1


TRAINING = TrainingConfig(
    batch=8, milestones=(5,), factors=(0.5,), gpu=True, max_workers=2
)
FULL = [
    dataclasses.replace(
        demo(),
        data=data,
        more_clouds=(Cloud(url="https://x"),),
        propagate=Propagate(fit=TRAINING),
        distill=Distill(fit=TRAINING),
    )
    for data in (DemoScenes(), Folder(images="x"))
]
CASES = [
    pytest.param(c, p, i, id=f"{type(c.data).__name__}-{'.'.join(map(str, p))}")
    for c in FULL
    for p, i in _leaves(c)
]


@cache
def _step_fingerprints(config: PipelineConfig) -> list[str]:
    return [step.fingerprint for step in build_steps(config, baselines=True).values()]


@pytest.mark.parametrize(("config", "path", "counts"), CASES)
def test_identity_fields_change_fingerprints_and_others_do_not(
    config: PipelineConfig, path: Trail, counts: bool
) -> None:
    other = _with_another_value(config, path)
    assert (fingerprint(config) != fingerprint(other)) == counts
    assert (_step_fingerprints(config) != _step_fingerprints(other)) == counts


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
def test_runtime_only_fields(name: str) -> None:
    runtime_only, identifying = set(), set()
    for config_class in vars(config_package).values():
        if not dataclasses.is_dataclass(config_class):
            continue
        for field in dataclasses.fields(config_class):
            if field.name == name:
                is_identifying = field.metadata.get("identity", True)
                names = identifying if is_identifying else runtime_only
                names.add(config_class.__name__)
    assert runtime_only
    assert identifying == ({"TrainingConfig"} if name == "batch" else set())


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


@pytest.mark.parametrize(
    ("path", "setting", "message"),
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
    path: tuple[str, ...], setting: Any, message: str
) -> None:
    settings = dataclasses.asdict(demo())
    holder = settings
    for name in path[:-1]:
        holder = holder[name]
    holder[path[-1]] = setting
    with pytest.raises(ConfigError, match=r"my\.yaml") as caught:
        parse_config(settings, "my.yaml")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("- 1", "expected a mapping"),
        ("", "expected a mapping"),
        (None, "no config file"),
    ],
)
def test_unreadable_files(text: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=message):
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


def test_a_path_may_have_a_prefix() -> None:
    here = f"open_clip:{fields.PACKAGE}/demo/assets/coin_tiny.json"
    assert (
        relocate_paths(here, fields.PACKAGE, IN_PACKAGE)
        == f"open_clip:{IN_PACKAGE}/demo/assets/coin_tiny.json"
    )
    assert (
        fingerprints.to_identity(here)
        == "open_clip:coin_ray/demo/assets/coin_tiny.json"
    )
    assert (
        relocate_paths(f"{fields.PACKAGE}_other/x", fields.PACKAGE, IN_PACKAGE)
        == f"{fields.PACKAGE}_other/x"
    )


def test_files_of_the_package_are_found_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job's code lies in another folder on each node, and in none when its file is
    read again."""
    here, there = demo(), "/tmp/ray/session/working_dir_files/_ray_pkg_1/coin_ray"
    inside = relocate_paths(here, fields.PACKAGE, there)
    assert inside != here
    assert to_yaml(here).count(IN_PACKAGE) == str(here).count(fields.PACKAGE) > 0
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(pipeline, "PACKAGE", there)
        sent = pickle.dumps(inside)
    arrived = pickle.loads(sent)
    assert arrived == here
    assert fingerprint(arrived) == fingerprint(here)
    (tmp_path / "best.yaml").write_text(to_yaml(here))
    assert read_config(str(tmp_path / "best.yaml")) == here


def test_a_renamed_setting_is_read_by_its_old_name_with_the_same_fingerprints() -> None:
    """Separation's form of the cloud's vectors was a setting of separation; propagation
    has never read it."""
    settings = dataclasses.asdict(demo())
    settings["separate"]["cloud_vectors"] = settings["labels"].pop("cloud_vectors")
    assert parse_config(settings, "old.yaml") == demo()
    settings["separate"]["cloud_vectors"] = "one_hot"
    moved = parse_config(settings, "old.yaml")
    assert moved == dataclasses.replace(
        demo(), labels=dataclasses.replace(demo().labels, cloud_vectors="one_hot")
    )
    steps = build_steps(demo(), baselines=True)
    moved_steps = build_steps(moved, baselines=True)
    unchanged = {
        name
        for name, step in steps.items()
        if step.fingerprint == moved_steps[name].fingerprint
    }
    assert unchanged == {"images", "collect", "propagate", "pseudo_label", "oracle"}


def test_new_settings_do_not_change_the_fingerprints_of_earlier_versions() -> None:
    identity = fingerprints.to_identity(demo())
    assert "corrections" not in identity
    assert "cloud_vectors" not in identity["labels"]
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
