"""How losses are reduced."""

from __future__ import annotations

from torch import Tensor


def mean(values: Tensor, count: float | None = None) -> Tensor:
    """Return the sum of ``values`` divided by ``count``, at least 1. The default count,
    the number of ``values``, is right for one worker.

    Each of several workers holds a part of the batch and divides by the count over all
    workers, so that their parts add up to one worker's loss.
    """
    if count is None:
        count = values.numel()
    return values.sum() / max(float(count), 1.0)
