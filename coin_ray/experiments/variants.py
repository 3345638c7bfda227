"""What is compared: each variant is a function from a config to the same config with a
few fields replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from coin_ray.config import FusionRule, PipelineConfig, TrainingConfig
from coin_ray.experiments.grid import Trial

Variant = Callable[[PipelineConfig], PipelineConfig]

REFERENCE = "COIN"
PUBLISHED_PI = 0.7


def change_distillation(**changes: Any) -> Variant:
    """Return the variant with these fields of ``Distill`` replaced."""
    return lambda config: replace(config, distill=replace(config.distill, **changes))


def no_propagation(config: PipelineConfig) -> PipelineConfig:
    """Leave the CLIP detector as it was built (one step at the start of the warm-up). A
    student that starts from it trains longer by the steps left out.
    """
    skipped = config.propagate.fit.steps - 1
    one_step = replace(config.propagate.fit, steps=1)
    untrained = replace(config, propagate=replace(config.propagate, fit=one_step))
    if config.distill.start_from != "clip_detector":
        return untrained
    distill, training = config.distill, config.distill.fit
    longer = replace(
        training,
        steps=training.steps + skipped,
        milestones=tuple(milestone + skipped for milestone in training.milestones),
    )
    return replace(
        untrained,
        distill=replace(distill, fit=longer, burn_up=distill.burn_up + skipped),
    )


def clip_off(config: PipelineConfig) -> PipelineConfig:
    """Train the second teacher on the cloud's own labels. Answers come from the
    journal: no call is paid again.
    """
    return replace(config, collect=replace(config.collect, labeler="none"))


def cloud_only(config: PipelineConfig) -> PipelineConfig:
    """Switch CLIP off and drop all results of the second teacher: every detection of
    the cloud counts as consistent.
    """
    without_clip = clip_off(config)
    return replace(
        without_clip,
        separate=replace(
            without_clip.separate, clip_score_min=1.0, lone_cloud_consistent=True
        ),
    )


ABLATION: dict[str, dict[str, Variant]] = {
    "losses": {
        "no alignment": change_distillation(alignment=0.0),
        "no consistent": change_distillation(consistent=0.0),
        "no inconsistent": change_distillation(inconsistent=0.0),
        "no private": change_distillation(private=0.0),
    },
    "stages": {
        "no propagation": no_propagation,
        "CLIP off": clip_off,
        "cloud only": cloud_only,
    },
}


def fusion_variants(share: float) -> dict[str, dict[str, Variant]]:
    """Return every fusion rule with the published threshold, and with the threshold
    that ``share`` of the inconsistent boxes reach.
    """
    published: dict[str, Variant] = {}
    by_share: dict[str, Variant] = {}
    for rule in get_args(FusionRule):
        published[rule] = change_distillation(
            fusion=rule, fusion_score_min=PUBLISHED_PI, fusion_share=None
        )
        by_share[rule] = change_distillation(fusion=rule, fusion_share=share)
    return {f"pi = {PUBLISHED_PI:g}": published, f"surest {share:.0%}": by_share}


def build_trials(
    config: PipelineConfig,
    groups: Mapping[str, Mapping[str, Variant]],
    seeds: Sequence[int],
    *,
    baselines: bool = False,
) -> list[Trial]:
    """Return the config as it is, then every variant that differs from it (CLIP can't
    be switched off twice), each with all seeds.
    """
    seeded_configs = [replace(config, seed=seed) for seed in seeds]
    trials = [Trial(REFERENCE, "", seeded, baselines) for seeded in seeded_configs]
    for group, variants in groups.items():
        for name, variant in variants.items():
            for seeded in seeded_configs:
                changed = variant(seeded)
                if changed != seeded:
                    trials.append(Trial(name, group, changed))
    return trials


def shorten_training(config: PipelineConfig, share: float) -> PipelineConfig:
    """Return the config with ``share`` of the steps of all trainings, to see whether
    everything runs; its figures mean nothing.
    """

    def shorten_steps(steps: int) -> int:
        return max(1, round(steps * share))

    def shorten(training: TrainingConfig) -> TrainingConfig:
        return replace(
            training,
            steps=shorten_steps(training.steps),
            milestones=tuple(shorten_steps(step) for step in training.milestones),
            warmup=round(training.warmup * share),
        )

    propagate, distill = config.propagate, config.distill
    return replace(
        config,
        propagate=replace(
            propagate,
            fit=shorten(propagate.fit),
            prototypes_from=round(propagate.prototypes_from * share),
        ),
        distill=replace(
            distill,
            fit=shorten(distill.fit),
            burn_up=round(distill.burn_up * share),
            prototypes_from=round(distill.prototypes_from * share),
        ),
    )
