"""Prompt alignment (paper eq. 4)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from coin_ray.parallel import worker_count


def prompt_alignment(class_embeddings: Tensor, prototypes: Tensor) -> Tensor:
    """Mean |prompt embedding - prototype| over [K+1, D], both unit length, prototypes
    fixed.

    Every worker holds the same values, so each contributes its share.
    """
    distance = (
        F.normalize(class_embeddings, dim=-1) - F.normalize(prototypes.detach(), dim=-1)
    ).abs()
    return distance.mean() / worker_count()
