"""The mean teacher: an exponential moving average of the student's weights, prompts,
batch statistics and prototypes.
"""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, rate: float) -> None:
    """Update the whole state: teacher <- (1 - rate) teacher + rate student; integer
    counters are copied.
    """
    teacher_state = teacher.state_dict()
    updated_storages: set[int] = set()
    for name, student_tensor in student.state_dict().items():
        teacher_tensor = teacher_state[name]
        storage = teacher_tensor.data_ptr()
        if storage in updated_storages:  # a weight that several names share
            continue
        updated_storages.add(storage)
        if student_tensor.is_floating_point():
            teacher_tensor.lerp_(student_tensor, rate)
        else:
            teacher_tensor.copy_(student_tensor)
