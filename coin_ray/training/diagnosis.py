"""What training shows beside its losses: how many boxes of each kind there are, whom
CKG follows, when it starts to see.

No gradient, and nothing is decided by it. As with losses, each worker returns its part
and the sum over workers is the figure.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coin_ray.losses.mean import mean
from coin_ray.parallel import all_sums, worker_count
from coin_ray.structures import Pairs, Separation

COUNTS = frozenset({"count_consistent", "count_inconsistent", "count_private"})
NAMES = COUNTS | {
    "ckg_passing",
    "ckg_cloud",
    "ckg_clip",
    "ckg_neither",
    "ckg_spread",
    "gradient_angle",
}
"""All figures of this file; whatever else a step of training returns is a loss."""


def kinds(separations: Sequence[Separation]) -> dict[str, Tensor]:
    """Boxes of each kind in the batch."""
    return {
        f"count_{kind}": torch.tensor(
            float(sum(len(getattr(s, kind)) for s in separations))
        )
        for kind in ("consistent", "inconsistent", "private")
    }


@torch.no_grad()
def whom_ckg_follows(
    fused: Tensor, pairs: Pairs, trusted_from: float, regions: float
) -> dict[str, Tensor]:
    """Shares of inconsistent RoIs: passing pi, and named as the cloud, as CLIP, or as
    neither did. ``fused`` [R, K+1] of ``pairs`` [R].

    ``regions``: such RoIs of all workers.
    """
    score, name = fused.max(-1)
    cloud, clip = name == pairs.cloud.labels, name == pairs.clip.labels
    shares = {
        "passing": score >= trusted_from,
        "cloud": cloud,
        "clip": clip,
        "neither": ~(cloud | clip),
    }
    return {f"ckg_{side}": mean(rows.float(), regions) for side, rows in shares.items()}


@torch.no_grad()
def spread(weights: Tensor) -> Tensor:
    """Mean over teachers and classes of the standard deviation over RoIs of CKG's
    ``weights`` [2, R, K+1]: 0 when it answers all alike.
    """
    weights = weights.double()  # a small spread is a difference of large squares
    first, second, rows = all_sums(
        [weights.sum(1), (weights**2).sum(1), weights.new_tensor([weights.shape[1]])]
    )
    rows = rows.clamp(min=1)
    return (second / rows - (first / rows) ** 2).clamp(
        min=0
    ).sqrt().mean().float() / worker_count()


@torch.no_grad()
def gradient_angle(misalignment: Tensor) -> Tensor:
    """Degrees whose cosine is the mean one: 1 - ``misalignment``, of which every worker
    holds 1/n.
    """
    return (1 - worker_count() * misalignment).clamp(
        -1, 1
    ).acos().rad2deg() / worker_count()
