"""The losses of transformers' detectors on soft targets: the library's own loss of each
query in expectation over the target's class distribution, times the target's weight.

Where every weight is 1, every distribution certain and nothing ignored, their sums are
the library's. Sums are divided by the number of targets, whatever their weights, so
that a batch of doubtful boxes has lower losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from coin_ray.models.students.query_matching import (
    Matches,
    WeightedQueryTargets,
    find_ignored_queries,
    to_corners,
)
from coin_ray.parallel import all_sum, worker_count

QUALITY_MIN = 0.01
"""Least target score of a matched query in ``quality_loss`` (LW-DETR)."""
KL_TEMPERATURE = 5.0


@dataclass(frozen=True, slots=True, eq=False)
class BoxDistributions:
    """What D-FINE's decoder layers predict beside boxes: ``corners`` [B, Q, 4 (R + 1)]
    logits over R + 1 bins of each side, relative to ``references`` [B, Q, 4] (cxcywh);
    ``last_corners`` and ``last_logits`` [B, Q, K] of the last layer, which teaches the
    others.
    """

    corners: Tensor
    references: Tensor
    last_corners: Tensor
    last_logits: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class QueryPredictions:
    """One decoder layer's outputs: ``logits`` [B, Q, K], ``boxes`` [B, Q, 4] (cxcywh in
    0..1).
    """

    logits: Tensor
    boxes: Tensor
    distributions: BoxDistributions | None = None


@dataclass(frozen=True, slots=True, eq=False)
class QueryAssignment:
    """What each query of a layer learns: ``matches``; ``boxes`` [P, 4] and ``weights``
    [P] of the matched targets; ``probs`` [B, Q, K], zero for background;
    ``query_weights`` [B, Q]: the target's weight, 1 for background, 0 for background in
    an ignored region.
    """

    matches: Matches
    boxes: Tensor
    weights: Tensor
    probs: Tensor
    query_weights: Tensor


def assign_targets(
    outputs: QueryPredictions, matches: Matches, targets: Sequence[WeightedQueryTargets]
) -> QueryAssignment:
    """Spread ``targets`` over the queries that are matched to them."""
    boxes = torch.cat([t.boxes for t in targets])[matches.target]
    weights = torch.cat([t.weights for t in targets])[matches.target]
    probs = torch.zeros_like(outputs.logits, dtype=torch.float32)
    all_probs = torch.cat([t.probs for t in targets])
    probs[matches.image, matches.query] = all_probs[matches.target]
    is_ignored = find_ignored_queries(outputs.boxes.detach(), targets)
    query_weights = (~is_ignored).float()
    query_weights[matches.image, matches.query] = weights
    return QueryAssignment(matches, boxes, weights, probs, query_weights)


def count_over_workers(count: int, device: torch.device) -> Tensor:
    """Sum a count over all workers, at least 1, so that it can be a divisor."""
    return all_sum(torch.tensor(float(count), device=device)).clamp(min=1)


def varifocal_loss(
    outputs: QueryPredictions, assignment: QueryAssignment, alpha: float, gamma: float
) -> Tensor:
    """Return the sum of varifocal losses (arXiv 2008.13367): matched queries learn the
    IoU of their box as score, with that IoU as weight.
    """
    logits = outputs.logits.float()
    ious = _query_ious(outputs, assignment)
    present = ious * F.binary_cross_entropy_with_logits(logits, ious, reduction="none")
    absent = alpha * _background_loss(logits, gamma)
    return _expected_sum(present, absent, assignment)


def matchability_loss(
    outputs: QueryPredictions,
    assignment: QueryAssignment,
    alpha: float | None,
    gamma: float,
) -> Tensor:
    """Return the sum of DEIM's matchability-aware losses (arXiv 2412.04234): matched
    queries learn the IoU to the power ``gamma`` as score, all with the same weight.
    """
    logits = outputs.logits.float()
    qualities = _query_ious(outputs, assignment) ** gamma
    present = F.binary_cross_entropy_with_logits(logits, qualities, reduction="none")
    absent = (1.0 if alpha is None else alpha) * _background_loss(logits, gamma)
    return _expected_sum(present, absent, assignment)


def quality_loss(
    outputs: QueryPredictions,
    assignment: QueryAssignment,
    alpha: float,
    gamma: float = 2.0,
) -> Tensor:
    """Return the sum of LW-DETR's IoU-aware cross entropies (arXiv 2406.03459): matched
    queries learn score ** alpha * IoU ** (1 - alpha).
    """
    logits = outputs.logits.float()
    scores = logits.sigmoid()
    ious = _query_ious(outputs, assignment)
    qualities = scores.detach() ** alpha * ious ** (1 - alpha)
    qualities = qualities.clamp(min=QUALITY_MIN)
    present = F.binary_cross_entropy_with_logits(logits, qualities, reduction="none")
    absent = -(scores**gamma) * F.logsigmoid(-logits)
    return _expected_sum(present, absent, assignment)


def _background_loss(logits: Tensor, gamma: float) -> Tensor:
    """Return the cross entropy against background, weighted by the score's power."""
    zeros = torch.zeros_like(logits)
    entropy = F.binary_cross_entropy_with_logits(logits, zeros, reduction="none")
    return logits.detach().sigmoid() ** gamma * entropy


def _query_ious(outputs: QueryPredictions, assignment: QueryAssignment) -> Tensor:
    """Return the IoU of each query's box with its target, 0 for background, the same
    for each class [B, Q, K].
    """
    matches = assignment.matches
    matched = outputs.boxes[matches.image, matches.query].detach().float()
    ious = torch.zeros(outputs.boxes.shape[:2], device=outputs.boxes.device)
    ious[matches.image, matches.query] = overlaps(matched, assignment.boxes)[0]
    return ious[..., None].expand_as(outputs.logits)


def _expected_sum(
    present: Tensor, absent: Tensor, assignment: QueryAssignment
) -> Tensor:
    """Return the sum over queries and classes of the losses [B, Q, K] of a class that
    is present and one that is absent, in expectation.
    """
    probs = assignment.probs
    losses = probs * present + (1 - probs) * absent
    return (losses.sum(-1) * assignment.query_weights).sum()


def box_losses(
    outputs: QueryPredictions, assignment: QueryAssignment
) -> tuple[Tensor, Tensor]:
    """Return the sums of the L1 and the GIoU losses of the matched queries."""
    matches = assignment.matches
    predicted = outputs.boxes[matches.image, matches.query].float()
    l1 = (predicted - assignment.boxes).abs().sum(-1) * assignment.weights
    giou = overlaps(predicted, assignment.boxes)[1]
    return l1.sum(), ((1 - giou) * assignment.weights).sum()


def overlaps(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return the IoU and the GIoU [P] of boxes with others, pair by pair (cxcywh
    [P, 4]).
    """
    corners, other_corners = to_corners(boxes), to_corners(others)
    left_top = torch.maximum(corners[:, :2], other_corners[:, :2])
    right_bottom = torch.minimum(corners[:, 2:], other_corners[:, 2:])
    intersection = (right_bottom - left_top).clamp(min=0).prod(1)
    area = (corners[:, 2:] - corners[:, :2]).prod(1)
    other_area = (other_corners[:, 2:] - other_corners[:, :2]).prod(1)
    smallest = torch.finfo(area.dtype).tiny
    union = (area + other_area - intersection).clamp(min=smallest)
    hull_left_top = torch.minimum(corners[:, :2], other_corners[:, :2])
    hull_right_bottom = torch.maximum(corners[:, 2:], other_corners[:, 2:])
    hull = (hull_right_bottom - hull_left_top).prod(1).clamp(min=smallest)
    iou = intersection / union
    return iou, iou - (hull - union) / hull


def fine_grained_loss(
    outputs: QueryPredictions,
    assignment: QueryAssignment,
    bin_count: int,
    reg_scale: float,
    upper_bound: float,
) -> Tensor:
    """Return the sum of D-FINE's fine-grained localisation losses (arXiv 2410.13842) of
    the matched queries.
    """
    from transformers.loss.loss_d_fine import bbox2distance

    assert outputs.distributions is not None
    matches = assignment.matches
    corners = outputs.distributions.corners[matches.image, matches.query].float()
    references = outputs.distributions.references[matches.image, matches.query]
    bounds = torch.tensor([upper_bound], device=corners.device)
    distances, right_weights, left_weights = bbox2distance(
        references.detach().float(),
        to_corners(assignment.boxes),
        bin_count,
        reg_scale,
        bounds,
    )
    logits = corners.reshape(-1, bin_count + 1)
    bins = distances.long()
    lower = F.cross_entropy(logits, bins, reduction="none") * left_weights
    upper = F.cross_entropy(logits, bins + 1, reduction="none") * right_weights
    weights = _matched_ious(outputs, assignment) * assignment.weights
    losses: Tensor = (lower + upper) * weights.repeat_interleave(4)
    return losses.sum()


def self_distillation_loss(
    outputs: QueryPredictions, assignment: QueryAssignment, bin_count: int
) -> Tensor:
    """Return D-FINE's decoupled distillation loss: every layer learns the distributions
    of the last one, matched and other queries weighted by the root of their number. It
    is a mean, not a sum; each of several workers has its share of it.
    """
    assert outputs.distributions is not None
    distributions, matches = outputs.distributions, assignment.matches
    targets = distributions.last_corners.detach().float()
    divergences = _divergences(distributions.corners.float(), targets, bin_count)
    qualities = distributions.last_logits.detach().float().sigmoid().amax(-1)
    ious = _matched_ious(outputs, assignment)
    qualities[matches.image, matches.query] = ious
    losses = divergences * qualities[..., None] * KL_TEMPERATURE**2
    is_matched = torch.zeros_like(qualities, dtype=torch.bool)
    is_matched[matches.image, matches.query] = True
    query_weights = assignment.query_weights
    total, root_sum = losses.new_zeros(()), losses.new_zeros(())
    for weights in (query_weights * is_matched, query_weights * ~is_matched):
        count = 4 * weights.sum()
        root = (count / len(losses)) ** 0.5
        mean = (losses * weights[..., None]).sum() / count.clamp(min=1e-12)
        total, root_sum = total + mean * root, root_sum + root
    return total / root_sum.clamp(min=1e-12) / worker_count()


def _divergences(corners: Tensor, targets: Tensor, bin_count: int) -> Tensor:
    """Return the Kullback-Leibler divergences [B, Q, 4] of softened distributions
    [B, Q, 4 (R + 1)].
    """
    shape = (*corners.shape[:2], 4, bin_count + 1)
    predicted = F.log_softmax(corners.reshape(shape) / KL_TEMPERATURE, -1)
    softened = F.softmax(targets.reshape(shape) / KL_TEMPERATURE, -1)
    return F.kl_div(predicted, softened, reduction="none").sum(-1)


def _matched_ious(outputs: QueryPredictions, assignment: QueryAssignment) -> Tensor:
    matches = assignment.matches
    matched = outputs.boxes[matches.image, matches.query].detach().float()
    return overlaps(matched, assignment.boxes)[0]
