from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from coin_ray.config import PipelineConfig
from coin_ray.config.fingerprints import to_identity
from coin_ray.config.presets import demo, folder, thermal
from coin_ray.experiments.variants import (
    ABLATION,
    REFERENCE,
    build_trials,
    clip_off,
    fusion_variants,
    no_propagation,
    shorten_training,
)
from coin_ray.runs.graph import build_steps

SHARED_BY_DISTILL_VARIANTS = ("images", "collect", "propagate", "separate")


def _differences(settings: object, others: object, at: str = "") -> set[str]:
    if isinstance(settings, dict) and isinstance(others, dict):
        return {
            d
            for key in settings
            for d in _differences(settings[key], others[key], f"{at}.{key}".strip("."))
        }
    return set() if settings == others else {at}


@pytest.mark.parametrize(
    ("group", "name", "changed"),
    [
        ("losses", "no alignment", {"distill.alignment"}),
        ("losses", "no consistent", {"distill.consistent"}),
        ("losses", "no inconsistent", {"distill.inconsistent"}),
        ("losses", "no private", {"distill.private"}),
        (
            "stages",
            "no propagation",
            {"propagate.fit.steps", "distill.fit.steps", "distill.burn_up"},
        ),
        ("stages", "CLIP off", {"collect.labeler"}),
        ("stages", "cloud only", {"collect.labeler", "separate.clip_score_min"}),
    ],
)
def test_a_variant_changes_only_what_it_is_named_after(
    group: str, name: str, changed: set[str]
) -> None:
    config = demo()
    assert (
        _differences(to_identity(ABLATION[group][name](config)), to_identity(config))
        == changed
    )


@pytest.mark.parametrize("preset", [demo, folder])
def test_a_student_without_propagation_makes_as_many_steps_as_its_weights_made(
    preset: object,
) -> None:
    config: PipelineConfig = preset()  # type: ignore[operator]
    without = no_propagation(config)
    steps = [
        c.distill.fit.steps
        + (c.propagate.fit.steps if c.distill.start_from == "clip_detector" else 0)
        for c in (config, without)
    ]
    assert steps[0] == steps[1]
    assert without.propagate.fit.steps == 1


@pytest.mark.parametrize(
    "variant",
    [
        *ABLATION["losses"].values(),
        *fusion_variants(0.5)["pi = 0.7"].values(),
        *fusion_variants(0.5)["surest 50%"].values(),
    ],
)
def test_variants_of_distillation_share_everything_before_it(variant: object) -> None:
    config = demo()
    changed_steps = build_steps(variant(config))  # type: ignore[operator]
    preset_steps = build_steps(config)
    assert all(
        changed_steps[step].fingerprint == preset_steps[step].fingerprint
        for step in SHARED_BY_DISTILL_VARIANTS
    )


def test_every_variant_has_every_seed_and_a_run_of_its_own() -> None:
    trials = build_trials(demo(), ABLATION, (0, 1, 2))
    assert Counter(trial.variant for trial in trials) == Counter(
        dict.fromkeys([REFERENCE, *ABLATION["losses"], *ABLATION["stages"]], 3)
    )
    assert len({trial.steps["distill"].fingerprint for trial in trials}) == len(trials)
    assert len({trial.title for trial in trials}) == len(trials)


def test_seeds_and_variants_share_one_collection_per_labeler() -> None:
    trials = build_trials(demo(), ABLATION | fusion_variants(0.5), (0, 1, 2))
    assert len({trial.steps["images"].fingerprint for trial in trials}) == 1
    assert len({trial.steps["collect"].fingerprint for trial in trials}) == 2


def test_a_preset_without_clip_is_not_ablated_of_it() -> None:
    config = thermal("/assets")
    assert clip_off(config) == config
    assert "CLIP off" not in {
        trial.variant for trial in build_trials(config, ABLATION, (0,))
    }


def test_shortened_trainings_still_burn_up_before_they_end() -> None:
    config = shorten_training(demo(), 0.1)
    assert config.propagate.fit.steps == round(demo().propagate.fit.steps * 0.1)
    assert (
        config.distill.prototypes_from
        <= config.distill.burn_up
        < config.distill.fit.steps
    )
    assert replace(config, propagate=demo().propagate, distill=demo().distill) == demo()
