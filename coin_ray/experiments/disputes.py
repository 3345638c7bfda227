"""How sure each fusion rule is of the boxes that the teachers dispute, before anything
is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from coin_ray.config import FusionRule
from coin_ray.experiments.grid import Trial
from coin_ray.experiments.variants import PUBLISHED_PI
from coin_ray.fusion.rules import RULES, dawid_skene
from coin_ray.stages.distill import paired_opinions


def certainty(
    rule: str, pairs: Sequence[Tensor], disputed: Sequence[Tensor]
) -> Tensor | None:
    """Best fused probability [R] of disputed boxes' two opinions [R, K+1]; ``pairs``:
    of all boxes. None for CKG, which has yet to learn.
    """
    if rule == "dawid_skene":
        return dawid_skene(*pairs).posterior(*disputed).max(-1).values
    return (
        RULES[rule](disputed[0], disputed[1]).max(-1).values if rule in RULES else None
    )


def notes(
    reference: Sequence[Trial], groups: Sequence[str], share: float, root: str
) -> dict[tuple[str, str], str]:
    """By rule and group: the share that reaches the published pi, and the threshold
    that the surest ``share`` reaches, over all seeds.
    """
    found: dict[tuple[str, str], str] = {}
    opinions = [_opinions(trial, root) for trial in reference]
    for rule in get_args(FusionRule):
        parts = [certainty(rule, pairs, disputed) for pairs, disputed in opinions]
        sure = torch.cat(
            [part for part in parts if part is not None] or [torch.zeros(0)]
        )
        if len(sure):
            threshold = float(sure.quantile(1 - share, interpolation="lower"))
            found[rule, groups[0]] = (
                f"{float((sure >= PUBLISHED_PI).float().mean()):.0%} of the boxes"
                " reach it"
            )
            found[rule, groups[1]] = f"from {threshold:.2f} on"
    return found


def _opinions(trial: Trial, root: str) -> tuple[list[Tensor], list[Tensor]]:
    separate, classes = trial.steps["separate"].folder(root), len(trial.config.classes)
    return paired_opinions(separate, classes), paired_opinions(
        separate, classes, ("inconsistent",)
    )
