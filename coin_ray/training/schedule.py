"""Optimizers and learning-rate schedules whose factors may rise again."""

from __future__ import annotations

import math

import torch
from torch import nn

from coin_ray.config import TrainingConfig


def learning_rate_factor(step: int, config: TrainingConfig) -> float:
    """Linear warm-up from 1/1000, then absolute factors from each milestone on, or a
    cosine to zero.
    """
    warmup = min(1.0, 0.001 + 0.999 * step / config.warmup) if config.warmup else 1.0
    if config.schedule == "cosine":
        return warmup * (0.5 + 0.5 * math.cos(math.pi * step / config.steps))
    reached = [
        factor
        for milestone, factor in zip(config.milestones, config.factors, strict=True)
        if step >= milestone
    ]
    return warmup * (reached[-1] if reached else 1.0)


VISUAL = ("tower.", "base.backbone.")
OFFSETS, OFFSETS_FACTOR = ".offsets.", 0.1


def make_optimizer(detector: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """SGD with momentum .9 or AdamW; the visual tower learns slower, so do a DETR's
    sampling offsets; norms and biases do not decay.
    """
    factors = {
        "visual": config.visual_lr_factor,
        "other": 1.0,
        "offsets": OFFSETS_FACTOR,
    }
    groups: list[dict[str, object]] = []
    for part, factor in factors.items():
        for decays in (True, False):
            chosen = [
                p
                for name, p in detector.named_parameters()
                if p.requires_grad and _part(name) == part and (p.ndim > 1) == decays
            ]
            rate = config.lr * factor
            groups.append(
                {
                    "params": chosen,
                    "lr": rate,
                    "base_lr": rate,
                    "weight_decay": config.weight_decay if decays else 0.0,
                }
            )
    return new_optimizer([g for g in groups if g["params"]], config)


def _part(name: str) -> str:
    """Which part of a detector a parameter belongs to, by its name."""
    if name.startswith(VISUAL):
        return "visual"
    return "offsets" if OFFSETS in name else "other"


def new_optimizer(
    groups: list[dict[str, object]], config: TrainingConfig
) -> torch.optim.Optimizer:
    return (
        torch.optim.SGD(groups, momentum=0.9)
        if config.optimizer == "sgd"
        else torch.optim.AdamW(groups)
    )


def set_learning_rate(
    optimizer: torch.optim.Optimizer, step: int, config: TrainingConfig
) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * learning_rate_factor(step, config)
