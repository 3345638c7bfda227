"""Sum tensors and gradients over all workers. With one worker the sums are the plain
ones.

Every worker holds a share of the global batch. A loss is normalised by *global* counts,
gradients are summed over workers, so a step on n workers equals the step on one with
the same batch. At each sum the faster worker waits for the slower: values that are
known at the same point of a step go in one message, and a sum that is needed later is
waited for later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def worker_count() -> int:
    """Return the number of workers; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def worker_rank() -> int:
    """Return the number of this worker, from 0."""
    return dist.get_rank() if worker_count() > 1 else 0


@torch.no_grad()
def all_sum(tensor: Tensor) -> Tensor:
    """Sum over workers, without gradient."""
    if worker_count() == 1:
        return tensor.detach()
    return _all_reduce(tensor.detach().clone(), dist.ReduceOp.SUM)


def start_all_sum(tensor: Tensor) -> Callable[[], Tensor]:
    """Start ``all_sum`` and return a function that waits for the sum; call it once."""
    if worker_count() == 1:
        return lambda: tensor
    message = tensor.to(_backend_device())
    reduction = dist.all_reduce(message, async_op=True)

    def wait_for_sum() -> Tensor:
        reduction.wait()
        return message.to(tensor.device)

    return wait_for_sum


@torch.no_grad()
def all_max(tensor: Tensor) -> Tensor:
    """Return the element-wise maximum over workers."""
    if worker_count() == 1:
        return tensor
    return _all_reduce(tensor.clone(), dist.ReduceOp.MAX)


@torch.no_grad()
def all_gather_rows(tensor: Tensor) -> Tensor:
    """Concatenate the rows of all workers, which may hold different numbers of them,
    without gradient.
    """
    parts = [tensor.detach()] * worker_count()
    if worker_count() > 1:
        dist.all_gather_object(parts, parts[0].cpu())
    return torch.cat([part.to(tensor.device) for part in parts])


def _all_reduce(tensor: Tensor, operation: Any) -> Tensor:
    """Reduce ``tensor``, which may be overwritten, over workers."""
    message = tensor.to(_backend_device())
    dist.all_reduce(message, operation)
    return message.to(tensor.device)


def _backend_device() -> str:
    """Return the device of messages: NCCL needs the GPU, gloo the CPU."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def all_sum_tensors(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Call ``all_sum`` on several tensors of one dtype, in one message: workers then
    wait for each other once.
    """
    if worker_count() == 1:
        return [tensor.detach() for tensor in tensors]
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    parts = _all_reduce(flat, dist.ReduceOp.SUM).split([t.numel() for t in tensors])
    return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]


def sum_with_local_gradient(local: Sequence[Tensor]) -> list[Tensor]:
    """Sum over workers; the gradient flows into this worker's part only. Summing such
    gradients over workers is exact.
    """
    totals = zip(local, all_sum_tensors(local), strict=True)
    return [part + (total - part.detach()) for part, total in totals]


def all_reduce_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all workers in one flat all-reduce; a missing gradient
    counts as zero.
    """
    if worker_count() == 1:
        return
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainable]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    flat = _all_reduce(flat, dist.ReduceOp.SUM)
    parts = flat.split([parameter.numel() for parameter in trainable])
    for parameter, part in zip(trainable, parts, strict=True):
        parameter.grad = part.view_as(parameter)
