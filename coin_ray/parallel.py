"""Sums and means over all workers. With one worker they are the plain ones.

Every worker holds a share of the global batch. A loss is normalised by *global* counts, gradients are summed over
workers, so a step on n workers equals the step on one with the same batch.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


def worker_count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def worker_rank() -> int:
    return dist.get_rank() if worker_count() > 1 else 0


@torch.no_grad()
def all_sum(values: Tensor) -> Tensor:
    """Sum over workers, without gradient."""
    if worker_count() == 1:
        return values.detach()
    total = values.detach().clone()
    dist.all_reduce(total)
    return total


@torch.no_grad()
def all_max(values: Tensor) -> Tensor:
    """Element-wise maximum over workers."""
    if worker_count() == 1:
        return values
    highest = values.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    return highest


def global_value(local: Tensor) -> Tensor:
    """Sum over workers whose gradient flows into this worker's part only; summing such gradients over workers is exact."""
    return local + (all_sum(local) - local.detach())


def mean(values: Tensor, count: int | None = None) -> Tensor:
    """This worker's part of the global mean: local sum / global ``count`` (default: all elements). Sum over workers = the mean."""
    own = values.numel() if count is None else count
    total = all_sum(torch.tensor(float(own), device=values.device)) if worker_count() > 1 else max(own, 0)
    return values.sum() / max(float(total), 1.0)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """This worker's part of sum(weights x values) / sum(weights) over all workers. Shapes are equal."""
    return (values * weights).sum() / all_sum(weights.sum()).clamp(min=1e-12)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all workers in one flat all-reduce; a missing gradient counts as zero."""
    if worker_count() == 1:
        return
    chosen = [p for p in parameters if p.requires_grad]
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in chosen])
    dist.all_reduce(flat)
    for parameter, part in zip(chosen, flat.split([p.numel() for p in chosen]), strict=True):
        parameter.grad = part.view_as(parameter).clone()
