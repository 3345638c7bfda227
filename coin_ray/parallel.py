"""Sums and means over all workers. With one worker they are the plain ones.

Every worker holds a share of the global batch. A loss is normalised by *global* counts, gradients are summed over
workers, so a step on n workers equals the step on one with the same batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

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
    return values.detach() if worker_count() == 1 else _reduced(values.detach(), dist.ReduceOp.SUM)


@torch.no_grad()
def all_max(values: Tensor) -> Tensor:
    """Element-wise maximum over workers."""
    return values if worker_count() == 1 else _reduced(values, dist.ReduceOp.MAX)


def _reduced(values: Tensor, operation: Any) -> Tensor:
    """NCCL carries only what lies on the GPU; gloo only what does not."""
    wire = values.clone().to("cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(wire, operation)
    return wire.to(values.device)


def all_sums(values: Sequence[Tensor]) -> list[Tensor]:
    """``all_sum`` of several tensors of one kind, in one message: workers then wait for each other once."""
    if worker_count() == 1:
        return [v.detach() for v in values]
    flat = all_sum(torch.cat([v.flatten() for v in values]))
    return [part.view_as(v) for part, v in zip(flat.split([v.numel() for v in values]), values, strict=True)]


def global_values(local: Sequence[Tensor]) -> list[Tensor]:
    """Sums over workers whose gradient flows into this worker's part only; summing such gradients over workers is exact."""
    return [own + (total - own.detach()) for own, total in zip(local, all_sums(local), strict=True)]


def mean(values: Tensor, count: int | None = None) -> Tensor:
    """This worker's part of the global mean: local sum / global ``count`` (default: all elements). Sum over workers = the mean."""
    own = values.numel() if count is None else count
    total = all_sum(torch.tensor(float(own), device=values.device)) if worker_count() > 1 else max(own, 0)
    return values.sum() / max(float(total), 1.0)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all workers in one flat all-reduce; a missing gradient counts as zero."""
    if worker_count() == 1:
        return
    chosen = [p for p in parameters if p.requires_grad]
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in chosen])
    flat = _reduced(flat, dist.ReduceOp.SUM)
    for parameter, part in zip(chosen, flat.split([p.numel() for p in chosen]), strict=True):
        parameter.grad = part.view_as(parameter).clone()
