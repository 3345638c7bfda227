"""One running mean feature per class, started at CLIP's text embeddings (paper eq. 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coin_ray.parallel import all_sum_tensors

PrototypeUpdate = tuple["Prototypes", Tensor, Tensor]
"""Prototypes, and the unit-length features [R, D] with labels [R] to update them with."""


class Prototypes(nn.Module):
    """``values`` [K+1, D], not re-normalised in storage."""

    values: Tensor

    def __init__(self, embeddings: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", embeddings.clone())

    def update(self, features: Tensor, labels: Tensor, rate: float) -> None:
        """Call ``update_prototypes`` with ``features`` [R, D] and ``labels`` [R]."""
        update_prototypes([(self, features, labels)], rate)

    def normalised(self) -> Tensor:
        return F.normalize(self.values, dim=-1)


@torch.no_grad()
def update_prototypes(updates: Sequence[PrototypeUpdate], rate: float) -> None:
    """Move prototypes towards the mean features of their classes over all workers:
    P_c <- (1 - rate) P_c + rate x mean of the features labelled c. Absent classes stay.

    All sums go to the other workers in one message.
    """
    local_sums = []
    for prototypes, features, labels in updates:
        zeros = torch.zeros_like(prototypes.values)
        sums = zeros.index_add_(0, labels, features.detach().float())
        counts = torch.bincount(labels, minlength=len(sums)).to(sums)
        local_sums += [sums, counts]
    global_sums = all_sum_tensors(local_sums)
    for row, (prototypes, _, _) in enumerate(updates):
        sums, counts = global_sums[2 * row], global_sums[2 * row + 1]
        present = counts > 0
        mean = sums[present] / counts[present, None]
        values = prototypes.values
        values[present] = (1 - rate) * values[present] + rate * mean
