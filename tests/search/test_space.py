from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coin_ray.commands.arguments import parse_run_arguments
from coin_ray.config import PipelineConfig
from coin_ray.config.fingerprints import fingerprint
from coin_ray.config.presets import PRESETS, demo, thermal
from coin_ray.config.yaml_files import to_yaml
from coin_ray.errors import ConfigError
from coin_ray.runs.graph import build_steps
from coin_ray.search.space import (
    SPACES,
    Choice,
    Real,
    apply_settings,
    build_space,
    get_setting,
    preset_settings,
)

RUNNABLE = {
    name: preset
    for name, preset in PRESETS.items()
    if name not in ("folder", "thermal")
}
BEFORE = ("images", "collect", "propagate")


def _drawn(config: PipelineConfig, name: str) -> st.SearchStrategy[dict[str, object]]:
    space = build_space(name, config)
    return st.fixed_dictionaries(
        {
            key: (
                st.sampled_from(domain.values)
                if isinstance(domain, Choice)
                else st.floats(domain.low, domain.high)
            )
            for key, domain in space.items()
        }
    )


@pytest.mark.parametrize("name", list(SPACES))
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(drawing=st.data())
def test_whatever_is_drawn_is_a_config_that_the_pipeline_takes_back(
    name: str, tmp_path: Path, drawing: st.DataObject
) -> None:
    config = demo()
    settings_drawn = drawing.draw(_drawn(config, name))
    changed = apply_settings(config, settings_drawn)
    assert {key: get_setting(changed, key) for key in settings_drawn} == settings_drawn
    file = tmp_path / "best.yaml"
    file.write_text(to_yaml(changed))
    read, _ = parse_run_arguments(["--config", str(file), "--root", str(tmp_path)])
    assert read == changed
    assert fingerprint(read) == fingerprint(changed)


@pytest.mark.parametrize("name", list(SPACES))
@settings(max_examples=10, deadline=None)
@given(drawing=st.data())
def test_trials_share_all_that_comes_before_the_separation(
    name: str, drawing: st.DataObject
) -> None:
    config = demo()
    preset_steps, varied = (
        build_steps(config),
        build_steps(apply_settings(config, drawing.draw(_drawn(config, name)))),
    )
    shared = BEFORE if name == "full" else (*BEFORE, "separate")
    assert {step: varied[step].fingerprint for step in shared} == {
        step: preset_steps[step].fingerprint for step in shared
    }


@pytest.mark.parametrize("name", list(SPACES))
@pytest.mark.parametrize("preset", [*RUNNABLE, "thermal"])
def test_the_presets_own_values_lie_in_every_space(name: str, preset: str) -> None:
    config = thermal("assets") if preset == "thermal" else RUNNABLE[preset]()
    space = build_space(name, config)
    preset = preset_settings(config, space)
    assert apply_settings(config, preset) == config
    for key, domain in space.items():
        assert (
            preset[key] in domain.values
            if isinstance(domain, Choice)
            else domain.low <= preset[key] <= domain.high
        ), key


def test_what_is_switched_off_stays_off() -> None:
    config = demo()
    assert "distill.private" not in build_space(
        "full", replace(config, distill=replace(config.distill, private=0.0))
    )


def test_a_range_reaches_the_users_own_value() -> None:
    config = demo()
    stronger = replace(
        config,
        distill=replace(
            config.distill, fit=replace(config.distill.fit, augmentation=3.0)
        ),
    )
    assert build_space("augment", stronger)["distill.fit.augmentation"] == Real(
        0.0, 3.0
    )


@pytest.mark.parametrize(
    "changes",
    [{"fusion_share": 0.5}, {"alignment": 0.0, "inconsistent": 0.0, "private": 0.0}],
)
def test_a_search_without_effect_is_an_error(changes: dict[str, float]) -> None:
    config = demo()
    name = "fusion" if "fusion_share" in changes else "loss-weights"
    distill = replace(config.distill, **changes)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"--space {name}"):
        build_space(name, replace(config, distill=distill))


def test_an_unknown_space_is_named_with_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match="loss-weights, augment, fusion, full; got 'losses'"
    ):
        build_space("losses", demo())
