"""Decision-level fusion of opinions on the same boxes, without training. All opinions
are probabilities [R, K+1], background last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1e-3
"""Least probability in the product of experts: no opinion is a veto."""
PRIOR_COUNT = 1.0
"""Prior number of boxes per class that each annotator labelled correctly."""
SPREAD_COUNT = 0.01
"""Prior number of boxes for each wrong label, so that none is impossible."""


def average(cloud: Tensor, clip: Tensor) -> Tensor:
    return (cloud + clip) / 2


def score_weighted(cloud: Tensor, clip: Tensor) -> Tensor:
    """Return the mean of the opinions, each weighted by its own best probability."""
    cloud_weight = cloud.max(-1, keepdim=True).values
    clip_weight = clip.max(-1, keepdim=True).values
    weighted_sum = cloud_weight * cloud + clip_weight * clip
    return weighted_sum / (cloud_weight + clip_weight)


def product(cloud: Tensor, clip: Tensor) -> Tensor:
    """Return the product of experts: the normalised product, no factor below ``FLOOR``
    (Hinton 2002, with a flat prior).
    """
    joint = cloud.clamp(min=FLOOR) * clip.clamp(min=FLOOR)
    return joint / joint.sum(-1, keepdim=True)


RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cloud": lambda cloud, _: cloud,
    "clip": lambda _, clip: clip,
    "average": average,
    "score_weighted": score_weighted,
    "product": product,
}
"""Rules that use only the two opinions; names as in ``Distill.fusion``."""


@dataclass(frozen=True, slots=True, eq=False)
class Annotators:
    """How often each of T annotators says k [columns] where c [rows] is true:
    ``confusion`` [T, C, C]; ``prior`` [C] of the truth.
    """

    prior: Tensor
    confusion: Tensor

    def posterior(self, *opinions: Tensor) -> Tensor:
        """Return p(truth | opinions) [R, C] of T opinions [R, C]. A soft opinion counts
        as its expected logarithm, a certain one as in Dawid-Skene.
        """
        log_confusion = self.confusion.log().to(opinions[0])
        log_likelihoods = [
            opinion @ log_rates.T
            for opinion, log_rates in zip(opinions, log_confusion, strict=True)
        ]
        evidence = torch.stack(log_likelihoods).sum(0)
        log_prior = self.prior.log().to(opinions[0])
        return (evidence + log_prior).softmax(-1)


def dawid_skene(
    *opinions: Tensor, rounds: int = 100, tolerance: float = 1e-6
) -> Annotators:
    """Estimate T annotators from their opinions [N, C] on the same N boxes by EM (Dawid
    & Skene 1979, soft opinions).

    Starts from the mean opinion. A weak prior towards the diagonal keeps classes from
    being permuted and allows labels that were never given; without boxes only the prior
    remains. Two annotators alone can't be told apart where they differ: which one is
    believed then follows from how often each class occurs, so a third opinion helps
    more than a better start.
    """
    stacked = torch.stack(opinions).double()
    truth = stacked.mean(0)
    annotators = _estimate_annotators(stacked, truth)
    for _ in range(rounds):
        previous_truth = truth
        truth = annotators.posterior(*stacked)
        annotators = _estimate_annotators(stacked, truth)
        if not len(truth) or float((truth - previous_truth).abs().max()) < tolerance:
            break
    return annotators


def _estimate_annotators(opinions: Tensor, truth: Tensor) -> Annotators:
    """Run the M step: count ``opinions`` [T, N, C] under the estimated ``truth`` [N,
    C].
    """
    identity = torch.eye(opinions.shape[-1]).double()
    observed = torch.einsum("nc,tnk->tck", truth, opinions)
    counts = observed + PRIOR_COUNT * identity + SPREAD_COUNT
    prior = truth.sum(0) + PRIOR_COUNT
    return Annotators(prior / prior.sum(), counts / counts.sum(-1, keepdim=True))
