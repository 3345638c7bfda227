from __future__ import annotations

from dataclasses import replace

import pytest

from coin_ray.config import Cloud, DemoScenes, Folder, check_runnable
from coin_ray.errors import ConfigError
from coin_ray.pipeline import ORDER, graph
from coin_ray.presets import PRESETS


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
    steps = graph(PRESETS[name](), baselines=baselines)
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
    alone, beside = graph(config), graph(config, baselines=True)
    assert all(alone[n].fingerprint == beside[n].fingerprint for n in ("images", "collect", "propagate", "separate", "distill", "export"))


def test_new_thresholds_cost_no_call() -> None:
    config = PRESETS["demo"]()
    other = replace(config, labels=replace(config.labels, score_min=0.99), data=DemoScenes())
    same = replace(config, data=DemoScenes())
    assert graph(other)["collect"].fingerprint == graph(same)["collect"].fingerprint
    assert graph(other)["propagate"].fingerprint != graph(same)["propagate"].fingerprint


def test_clip_labels_depend_on_both_sides_of_the_view() -> None:
    config = PRESETS["demo"]()
    other = replace(config, detector=replace(config.detector, long_side=config.detector.long_side + 32))
    assert graph(other)["collect"].fingerprint != graph(config)["collect"].fingerprint
