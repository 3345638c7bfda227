"""Optimizers, their steps, and learning-rate schedules whose factors may rise again."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from coin_ray.config import TrainingConfig
from coin_ray.parallel import all_reduce_gradients

VISUAL_PREFIXES = ("tower.", "base.backbone.")
OFFSETS, OFFSETS_FACTOR = ".offsets.", 0.1


def learning_rate_factor(step: int, config: TrainingConfig) -> float:
    """Return the factor of a step: linear warm-up from 1/1000, then absolute factors
    from each milestone on, or a cosine to zero.
    """
    warmup = min(1.0, 0.001 + 0.999 * step / config.warmup) if config.warmup else 1.0
    if config.schedule == "cosine":
        return warmup * (0.5 + 0.5 * math.cos(math.pi * step / config.steps))
    factor = 1.0
    for milestone, milestone_factor in zip(
        config.milestones, config.factors, strict=True
    ):
        if step >= milestone:
            factor = milestone_factor
    return warmup * factor


def make_optimizer(
    detector: nn.Module, config: TrainingConfig
) -> torch.optim.Optimizer:
    """Make SGD with momentum .9 or AdamW. The visual tower and a DETR's sampling offsets
    have smaller learning rates; norms and biases do not decay.
    """
    factors = {
        "visual": config.visual_lr_factor,
        "other": 1.0,
        "offsets": OFFSETS_FACTOR,
    }
    groups: list[dict[str, object]] = []
    for part, factor in factors.items():
        for decays in (True, False):
            parameters = [
                p
                for name, p in detector.named_parameters()
                if p.requires_grad and _part_of(name) == part and (p.ndim > 1) == decays
            ]
            rate = config.lr * factor
            decay = config.weight_decay if decays else 0.0
            if parameters:
                groups.append(parameter_group(parameters, rate, decay))
    return new_optimizer(groups, config)


def parameter_group(
    parameters: list[nn.Parameter], rate: float, weight_decay: float
) -> dict[str, object]:
    """Return an optimizer's group whose schedule starts from ``rate``."""
    return {
        "params": parameters,
        "lr": rate,
        "base_lr": rate,
        "weight_decay": weight_decay,
    }


def _part_of(name: str) -> str:
    """Return the part of a detector that the parameter ``name`` belongs to."""
    if name.startswith(VISUAL_PREFIXES):
        return "visual"
    return "offsets" if OFFSETS in name else "other"


def new_optimizer(
    groups: list[dict[str, object]], config: TrainingConfig
) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9)
    return torch.optim.AdamW(groups)


def set_learning_rate(
    optimizer: torch.optim.Optimizer, step: int, config: TrainingConfig
) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * learning_rate_factor(step, config)


def mixed_precision(model: nn.Module, fit: TrainingConfig) -> torch.autocast:
    """Return a context that runs forward passes in bfloat16, if ``fit.amp``; boxes,
    losses and weights stay in float32.
    """
    device = next(model.parameters()).device
    return torch.autocast(device.type, torch.bfloat16, enabled=fit.amp)


def optimizer_step(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    losses: Mapping[str, Tensor],
    step: int,
    fit: TrainingConfig,
) -> None:
    """Backpropagate the sum of ``losses`` and take one step, gradients summed over
    workers.
    """
    optimizer.zero_grad()
    torch.stack(list(losses.values())).sum().backward()
    apply_gradients(optimizer, model, step, fit)


def apply_gradients(
    optimizer: torch.optim.Optimizer, model: nn.Module, step: int, fit: TrainingConfig
) -> None:
    """Sum the gradients over workers, clip them if ``fit.clip_gradient``, and take one
    step.
    """
    all_reduce_gradients(model.parameters())
    if fit.clip_gradient is not None:
        with_gradient = [p for p in model.parameters() if p.grad is not None]
        nn.utils.clip_grad_norm_(with_gradient, fit.clip_gradient)
    set_learning_rate(optimizer, step, fit)
    optimizer.step()
