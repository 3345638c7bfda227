"""Prompt alignment (paper eq. 4)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from coin_ray.parallel import worker_count


def prompt_alignment(class_embeddings: Tensor, prototypes: Tensor) -> Tensor:
    """Return the mean |prompt embedding - prototype| over [K+1, D], both unit length;
    prototypes carry no gradient.

    Every worker holds the same values, so each contributes its share.
    """
    embeddings = F.normalize(class_embeddings, dim=-1)
    fixed_prototypes = F.normalize(prototypes.detach(), dim=-1)
    distance = (embeddings - fixed_prototypes).abs()
    return distance.mean() / worker_count()
