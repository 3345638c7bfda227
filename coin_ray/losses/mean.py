"""How losses are reduced."""

from __future__ import annotations

from torch import Tensor


def mean(values: Tensor, count: float | None = None) -> Tensor:
    """``values`` summed and divided by ``count``, at least 1. Default: by the number of
    ``values``, right for one worker.

    Of several workers each holds a part of the batch and divides by what all of them
    hold, so that their parts add up to one worker's loss.
    """
    return values.sum() / max(float(values.numel() if count is None else count), 1.0)
