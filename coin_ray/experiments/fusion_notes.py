"""How confident each fusion rule is about the boxes on which the teachers disagree,
before anything is trained.
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
from coin_ray.stages.distill import read_paired_probabilities


def fused_confidence(
    rule: str, all_pairs: Sequence[Tensor], disagreements: Sequence[Tensor]
) -> Tensor | None:
    """Return the best fused probability [R] of the two opinions [R, K+1] on each box of
    ``disagreements``; ``all_pairs``: the opinions on all boxes. None for CKG, which is
    learned during training.
    """
    if rule == "dawid_skene":
        confusion = dawid_skene(*all_pairs)
        return confusion.posterior(*disagreements).max(-1).values
    if rule not in RULES:
        return None
    return RULES[rule](disagreements[0], disagreements[1]).max(-1).values


def fusion_notes(
    trials: Sequence[Trial], groups: Sequence[str], share: float, root: str
) -> dict[tuple[str, str], str]:
    """Return by rule and group: the share of boxes that reaches the published pi, and
    the threshold that the most confident ``share`` reaches, over all seeds.
    """
    notes: dict[tuple[str, str], str] = {}
    opinions = [_read_opinions(trial, root) for trial in trials]
    for rule in get_args(FusionRule):
        by_trial = [
            fused_confidence(rule, all_pairs, disagreements)
            for all_pairs, disagreements in opinions
        ]
        confidences = [part for part in by_trial if part is not None]
        confidence = torch.cat(confidences or [torch.zeros(0)])
        if not len(confidence):
            continue
        reached = float((confidence >= PUBLISHED_PI).float().mean())
        threshold = float(confidence.quantile(1 - share, interpolation="lower"))
        notes[rule, groups[0]] = f"{reached:.0%} of the boxes reach it"
        notes[rule, groups[1]] = f"from {threshold:.2f} on"
    return notes


def _read_opinions(trial: Trial, root: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return both teachers' opinions [R, K+1] on all paired boxes, and on those on
    which they disagree.
    """
    folder = trial.steps["separate"].folder(root)
    class_count = len(trial.config.classes)
    all_pairs = read_paired_probabilities(folder, class_count)
    disagreements = read_paired_probabilities(folder, class_count, ("inconsistent",))
    return all_pairs, disagreements
