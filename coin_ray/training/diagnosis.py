"""Figures that training logs beside its losses: numbers of boxes of each kind, how
often CKG agrees with each teacher, and how much its weights depend on the input.

They carry no gradient and change nothing. As with losses, each worker returns its part
and the sum over workers is the figure.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coin_ray.losses.mean import mean
from coin_ray.parallel import all_sum_tensors, worker_count
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
"""All figures of this file; whatever else a training step returns is a loss."""


def count_boxes_by_kind(separations: Sequence[Separation]) -> dict[str, Tensor]:
    """Count the boxes of each kind in the batch."""
    counts = {
        "count_consistent": sum(len(s.consistent) for s in separations),
        "count_inconsistent": sum(len(s.inconsistent) for s in separations),
        "count_private": sum(len(s.private) for s in separations),
    }
    return {name: torch.tensor(float(count)) for name, count in counts.items()}


@torch.no_grad()
def inconsistent_agreement_rates(
    fused: Tensor, pairs: Pairs, confidence_threshold: float, regions: float
) -> dict[str, Tensor]:
    """Return the shares of inconsistent RoIs whose ``fused`` vector [R, K+1] reaches the
    threshold (pi), and whose label is the cloud's, CLIP's, or neither's.

    ``pairs`` [R] of these RoIs; ``regions``: their number over all workers.
    """
    scores, labels = fused.max(-1)
    as_cloud = labels == pairs.cloud.labels
    as_clip = labels == pairs.clip.labels
    masks = {
        "ckg_passing": scores >= confidence_threshold,
        "ckg_cloud": as_cloud,
        "ckg_clip": as_clip,
        "ckg_neither": ~(as_cloud | as_clip),
    }
    return {name: mean(mask.float(), regions) for name, mask in masks.items()}


@torch.no_grad()
def ckg_weight_spread(weights: Tensor) -> Tensor:
    """Return the mean over teachers and classes of the standard deviation over RoIs of
    CKG's ``weights`` [2, R, K+1]: 0 when all RoIs get the same weights.
    """
    weights = weights.double()  # a small spread is a difference of large squares
    sums, squares, rows = all_sum_tensors(
        [weights.sum(1), (weights**2).sum(1), weights.new_tensor([weights.shape[1]])]
    )
    rows = rows.clamp(min=1)
    variance = squares / rows - (sums / rows) ** 2
    deviation = variance.clamp(min=0).sqrt()
    return deviation.mean().float() / worker_count()


@torch.no_grad()
def gradient_angle(misalignment: Tensor) -> Tensor:
    """Return the angle in degrees whose cosine is the mean cosine 1 - ``misalignment``,
    of which every worker holds 1/n.
    """
    cosine = (1 - worker_count() * misalignment).clamp(-1, 1)
    return cosine.acos().rad2deg() / worker_count()
