"""One running mean feature per class, started at CLIP's text embeddings (paper eq. 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coin_ray.parallel import all_sums

Seen = tuple["Prototypes", Tensor, Tensor]
"""Prototypes, and the unit-length features [R, D] with labels [R] that they are to
follow."""


class Prototypes(nn.Module):
    """``values`` [K+1, D], not re-normalised in storage."""

    values: Tensor

    def __init__(self, embeddings: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", embeddings.clone())

    def update(self, features: Tensor, labels: Tensor, rate: float) -> None:
        """``follow_features`` with ``features`` [R, D] and their ``labels`` [R]."""
        follow_features([(self, features, labels)], rate)

    def normalised(self) -> Tensor:
        return F.normalize(self.values, dim=-1)


@torch.no_grad()
def follow_features(seen: Sequence[Seen], rate: float) -> None:
    """P_c <- (1 - rate) P_c + rate x mean of the features labelled c, over all workers,
    which exchange them once; absent classes stay.
    """
    own = []
    for prototypes, features, labels in seen:
        sums = torch.zeros_like(prototypes.values).index_add_(
            0, labels, features.detach().float()
        )
        own += [sums, torch.bincount(labels, minlength=len(sums)).to(sums)]
    total = all_sums(own)
    for (prototypes, _, _), sums, counts in zip(
        seen, total[::2], total[1::2], strict=True
    ):
        values, present = prototypes.values, counts > 0
        mean = sums[present] / counts[present, None]
        values[present] = (1 - rate) * values[present] + rate * mean
