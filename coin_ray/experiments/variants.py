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


def distilled(**changes: Any) -> Variant:
    """The variant with these fields of ``Distill`` replaced."""
    return lambda config: replace(config, distill=replace(config.distill, **changes))


def no_propagation(config: PipelineConfig) -> PipelineConfig:
    """The CLIP detector stays as it was built (one step at the start of the warm-up). A
    student that starts from it trains so much longer.
    """
    skipped = config.propagate.fit.steps - 1
    once = replace(
        config,
        propagate=replace(config.propagate, fit=replace(config.propagate.fit, steps=1)),
    )
    if config.distill.start_from != "clip_detector":
        return once
    distill, fit = config.distill, config.distill.fit
    longer = replace(
        fit,
        steps=fit.steps + skipped,
        milestones=tuple(m + skipped for m in fit.milestones),
    )
    later = tuple(
        replace(change, start=change.start + skipped) for change in distill.schedule
    )
    return replace(
        once,
        distill=replace(
            distill, fit=longer, burn_up=distill.burn_up + skipped, schedule=later
        ),
    )


def clip_off(config: PipelineConfig) -> PipelineConfig:
    """The second teacher is a detector trained on the cloud's own labels. Answers come
    from the journal: no call is paid again.
    """
    return replace(config, collect=replace(config.collect, labeler="none"))


def cloud_only(config: PipelineConfig) -> PipelineConfig:
    """As CLIP off, and no result of the second teacher passes: all the cloud says
    counts as consistent.
    """
    alone = clip_off(config)
    return replace(
        alone,
        separate=replace(
            alone.separate, clip_score_min=1.0, lone_cloud_consistent=True
        ),
    )


ABLATION: dict[str, dict[str, Variant]] = {
    "losses": {
        "no alignment": distilled(alignment=0.0),
        "no consistent": distilled(consistent=0.0),
        "no inconsistent": distilled(inconsistent=0.0),
        "no private": distilled(private=0.0),
    },
    "stages": {
        "no propagation": no_propagation,
        "CLIP off": clip_off,
        "cloud only": cloud_only,
    },
}


def fusions(share: float) -> dict[str, dict[str, Variant]]:
    """Every fusion with the published threshold, and with the one of its own that lets
    ``share`` of the inconsistent boxes teach.
    """
    rules = get_args(FusionRule)
    return {
        f"pi = {PUBLISHED_PI:g}": {
            rule: distilled(
                fusion=rule, fusion_score_min=PUBLISHED_PI, fusion_share=None
            )
            for rule in rules
        },
        f"surest {share:.0%}": {
            rule: distilled(fusion=rule, fusion_share=share) for rule in rules
        },
    }


def trials(
    config: PipelineConfig,
    groups: Mapping[str, Mapping[str, Variant]],
    seeds: Sequence[int],
    *,
    baselines: bool = False,
) -> list[Trial]:
    """The config as it is, then every variant that differs from it (CLIP can't be
    switched off twice), each with all seeds.
    """
    seeded = [replace(config, seed=seed) for seed in seeds]
    reference = [Trial(REFERENCE, "", c, baselines) for c in seeded]
    return reference + [
        Trial(name, group, variant(c))
        for group, variants in groups.items()
        for name, variant in variants.items()
        for c in seeded
        if variant(c) != c
    ]


def shortened(config: PipelineConfig, share: float) -> PipelineConfig:
    """All trainings with ``share`` of their steps, to see whether everything runs; the
    figures mean nothing.
    """

    def few(steps: int) -> int:
        return max(1, round(steps * share))

    def fit(full: TrainingConfig) -> TrainingConfig:
        return replace(
            full,
            steps=few(full.steps),
            milestones=tuple(few(m) for m in full.milestones),
            warmup=round(full.warmup * share),
        )

    propagate, distill = config.propagate, config.distill
    return replace(
        config,
        propagate=replace(
            propagate,
            fit=fit(propagate.fit),
            prototypes_from=round(propagate.prototypes_from * share),
        ),
        distill=replace(
            distill,
            fit=fit(distill.fit),
            burn_up=round(distill.burn_up * share),
            prototypes_from=round(distill.prototypes_from * share),
            schedule=tuple(
                replace(change, start=few(change.start)) for change in distill.schedule
            ),
        ),
    )
