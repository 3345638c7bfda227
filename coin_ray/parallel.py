"""Sums over all workers. With one worker they are the plain ones.

Every worker holds a share of the global batch. A loss is normalised by *global* counts,
gradients are summed over workers, so a step on n workers equals the step on one with
the same batch. At each sum the faster worker waits for the slower, so what is known at
one place of a step goes in one message, and what is needed later is waited for later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
    return (
        values.detach()
        if worker_count() == 1
        else _reduced(values.detach().clone(), dist.ReduceOp.SUM)
    )


def start_all_sum(values: Tensor) -> Callable[[], Tensor]:
    """``all_sum`` without waiting: the sum is there when what is returned is called,
    once.
    """
    if worker_count() == 1:
        return lambda: values
    wire = values.to(_wire())
    sent = dist.all_reduce(wire, async_op=True)

    def arrived() -> Tensor:
        sent.wait()
        return wire.to(values.device)

    return arrived


@torch.no_grad()
def all_max(values: Tensor) -> Tensor:
    """Element-wise maximum over workers."""
    return (
        values if worker_count() == 1 else _reduced(values.clone(), dist.ReduceOp.MAX)
    )


@torch.no_grad()
def all_gather_rows(values: Tensor) -> Tensor:
    """Rows of all workers, which may hold different numbers of them, without gradient."""
    parts = [values.detach()] * worker_count()
    if worker_count() > 1:
        dist.all_gather_object(parts, parts[0].cpu())
    return torch.cat([part.to(values.device) for part in parts])


def _reduced(values: Tensor, operation: Any) -> Tensor:
    """``values``, which may be overwritten."""
    wire = values.to(_wire())
    dist.all_reduce(wire, operation)
    return wire.to(values.device)


def _wire() -> str:
    """NCCL carries only what lies on the GPU; gloo only what does not."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def all_sum_tensors(values: Sequence[Tensor]) -> list[Tensor]:
    """``all_sum`` of several tensors of one kind, in one message: workers then wait for
    each other once.
    """
    if worker_count() == 1:
        return [v.detach() for v in values]
    flat = _reduced(
        torch.cat([v.detach().flatten() for v in values]), dist.ReduceOp.SUM
    )
    return [
        part.view_as(v)
        for part, v in zip(flat.split([v.numel() for v in values]), values, strict=True)
    ]


def sum_with_local_gradient(local: Sequence[Tensor]) -> list[Tensor]:
    """Sums over workers whose gradient flows into this worker's part only; summing such
    gradients over workers is exact.
    """
    return [
        own + (total - own.detach())
        for own, total in zip(local, all_sum_tensors(local), strict=True)
    ]


def all_reduce_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all workers in one flat all-reduce; a missing gradient
    counts as zero.
    """
    if worker_count() == 1:
        return
    chosen = [p for p in parameters if p.requires_grad]
    flat = torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in chosen]
    )
    flat = _reduced(flat, dist.ReduceOp.SUM)
    for parameter, part in zip(
        chosen, flat.split([p.numel() for p in chosen]), strict=True
    ):
        parameter.grad = part.view_as(parameter)
