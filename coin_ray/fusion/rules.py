"""Decision-level fusion of opinions on the same boxes, without anything to train. All
opinions are probabilities [R, K+1], background last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1e-3
"""Least probability in the product of experts: no opinion is a veto."""
PRIOR_COUNT = 1.0
"""Boxes each annotator is taken to have named rightly, per class, before the first is
seen."""
SPREAD_COUNT = 0.01
"""The same for each wrong name, so that none is impossible."""


def average(cloud: Tensor, clip: Tensor) -> Tensor:
    return (cloud + clip) / 2


def score_weighted(cloud: Tensor, clip: Tensor) -> Tensor:
    """Mean of the opinions, each weighted by its own best probability."""
    weights = [opinion.max(-1, keepdim=True).values for opinion in (cloud, clip)]
    return (weights[0] * cloud + weights[1] * clip) / (weights[0] + weights[1])


def product(cloud: Tensor, clip: Tensor) -> Tensor:
    """Product of experts: normalised product, no factor below ``FLOOR`` (Hinton 2002,
    with a flat prior).
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
"""Rules that need nothing but the two opinions; names as in ``Distill.fusion``."""


@dataclass(frozen=True, slots=True, eq=False)
class Annotators:
    """How often each of T annotators says k [columns] where c [rows] is true:
    ``confusion`` [T, C, C]; ``prior`` [C] of the truth.
    """

    prior: Tensor
    confusion: Tensor

    def posterior(self, *opinions: Tensor) -> Tensor:
        """p(truth | opinions) [R, C] of T opinions [R, C]. A soft opinion counts as its
        expected logarithm, a sure one as in Dawid-Skene.
        """
        log_confusion = self.confusion.log().to(opinions[0])
        evidence = torch.stack(
            [
                opinion @ names.T
                for opinion, names in zip(opinions, log_confusion, strict=True)
            ]
        ).sum(0)
        return (evidence + self.prior.log().to(opinions[0])).softmax(-1)


def dawid_skene(
    *opinions: Tensor, rounds: int = 100, tolerance: float = 1e-6
) -> Annotators:
    """Estimate T annotators from their opinions [N, C] on the same N boxes by EM (Dawid
    & Skene 1979, soft opinions).

    Starts from the mean opinion. A weak prior towards the diagonal keeps classes in
    their places and names possible that were never given; without boxes it is all there
    is. Two annotators alone can't be told apart where they differ: whom to believe then
    follows from how often each class is seen, so a third opinion is worth more than a
    better start.
    """
    said = torch.stack(opinions).double()
    truth = said.mean(0)
    annotators = _estimate(said, truth)
    for _ in range(rounds):
        before, truth = truth, annotators.posterior(*said)
        annotators = _estimate(said, truth)
        if not len(truth) or float((truth - before).abs().max()) < tolerance:
            break
    return annotators


def _estimate(said: Tensor, truth: Tensor) -> Annotators:
    classes = said.shape[-1]
    counts = (
        torch.einsum("nc,tnk->tck", truth, said)
        + PRIOR_COUNT * torch.eye(classes).double()
        + SPREAD_COUNT
    )
    prior = truth.sum(0) + PRIOR_COUNT
    return Annotators(prior / prior.sum(), counts / counts.sum(-1, keepdim=True))
