"""The mean teacher: weights, prompts, batch statistics and prototypes follow the
student.
"""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, rate: float) -> None:
    """teacher <- (1 - rate) teacher + rate student over the whole state; integer
    counters are copied.
    """
    ours, done = teacher.state_dict(), set()
    for name, value in student.state_dict().items():
        place = ours[name].data_ptr()
        if place in done:  # weights that several names share
            continue
        done.add(place)
        if value.is_floating_point():
            ours[name].lerp_(value, rate)
        else:
            ours[name].copy_(value)
