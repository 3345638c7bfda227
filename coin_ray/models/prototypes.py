"""One running mean feature per class, started at CLIP's text embeddings (paper eq. 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coin_ray.parallel import all_sums


class Prototypes(nn.Module):
    """``values`` [K+1, D], not re-normalised in storage."""

    values: Tensor

    def __init__(self, embeddings: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", embeddings.clone())

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor, rate: float) -> None:
        """P_c <- (1 - rate) P_c + rate x mean of the unit-length ``features`` [R, D] labelled c, over all workers; absent classes stay."""
        sums = torch.zeros_like(self.values).index_add_(0, labels, features.detach().float())
        counts = torch.bincount(labels, minlength=len(self.values)).to(sums)
        sums, counts = all_sums([sums, counts])
        present = counts > 0
        mean = sums[present] / counts[present, None]
        self.values[present] = (1 - rate) * self.values[present] + rate * mean

    def normalised(self) -> Tensor:
        return F.normalize(self.values, dim=-1)
