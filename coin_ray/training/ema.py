"""The mean teacher: weights, prompts, batch statistics and prototypes follow the student."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, rate: float) -> None:
    """teacher <- (1 - rate) teacher + rate student over the whole state; integer counters are copied."""
    ours = teacher.state_dict()
    for name, value in student.state_dict().items():
        if value.is_floating_point():
            ours[name].lerp_(value, rate)
        else:
            ours[name].copy_(value)
