"""One-to-one matching of a detector's queries to soft targets, and the regions in which
queries have no loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

from coin_ray.structures import Targets

COVERED_SHARE = 0.5
"""Share of a query's box inside an ignored region from which it is not background."""
LOG_EPSILON = 1e-8
"""transformers adds it to scores before their logarithm."""


@dataclass(frozen=True, slots=True, eq=False)
class WeightedQueryTargets:
    """Targets of one image for a detector with queries: ``boxes`` [N, 4] (cxcywh in
    0..1), ``probs`` [N, K] without background, ``weights`` [N] above 0, ``ignored``
    [M, 4] (xyxy in 0..1).
    """

    boxes: Tensor
    probs: Tensor
    weights: Tensor
    ignored: Tensor

    def __len__(self) -> int:
        return len(self.boxes)

    @classmethod
    def from_targets(
        cls, targets: Targets, size: Sequence[int], device: torch.device
    ) -> WeightedQueryTargets:
        """Convert ``targets`` in pixels of an image of ``size`` (height, width). Boxes
        of weight 0 are left out.
        """
        height, width = size
        scale = torch.tensor([width, height, width, height], dtype=torch.float32)
        counts = targets.weights > 0
        boxes = box_convert(
            targets.boxes[counts].float().cpu() / scale, "xyxy", "cxcywh"
        )
        ignored = (targets.ignored.float().cpu() / scale).clamp(0, 1)
        return cls(
            boxes.to(device),
            targets.probs[counts, :-1].float().to(device),
            targets.weights[counts].float().to(device),
            ignored.to(device),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Matches:
    """Matched pairs of a batch: ``image`` [P], ``query`` [P] in that image, ``target``
    [P] among the concatenated targets of all images.
    """

    image: Tensor
    query: Tensor
    target: Tensor

    def __len__(self) -> int:
        return len(self.image)


@dataclass(frozen=True, slots=True)
class MatchingCosts:
    """Weights of the cost's terms, and the two parameters of its focal term."""

    class_cost: float
    l1: float
    giou: float
    alpha: float
    gamma: float


@torch.no_grad()
def assign_queries(
    logits: Tensor,
    boxes: Tensor,
    targets: Sequence[WeightedQueryTargets],
    costs: MatchingCosts,
    group_count: int = 1,
) -> Matches:
    """Match queries (``logits`` [B, Q, K], ``boxes`` [B, Q, 4] cxcywh in 0..1) to
    targets with least cost, one to one in each of ``group_count`` groups of queries.

    A target's cost is its expectation under the class distribution, times the target's
    weight: of two targets that want one query the one with the larger weight prevails.
    """
    group_size = logits.shape[1] // group_count
    images, queries, numbers = [], [], []
    first_target = 0
    for image, image_targets in enumerate(targets):
        cost = weighted_matching_cost(
            logits[image], boxes[image], image_targets, costs
        ).cpu()
        for group, group_cost in enumerate(cost.split(group_size)):
            rows, columns = map(torch.as_tensor, linear_sum_assignment(group_cost))
            images.append(torch.full_like(rows, image))
            queries.append(rows + group * group_size)
            numbers.append(columns + first_target)
        first_target += len(image_targets)
    device = logits.device
    return Matches(
        torch.cat(images).to(device),
        torch.cat(queries).to(device),
        torch.cat(numbers).to(device),
    )


@torch.no_grad()
def weighted_matching_cost(
    logits: Tensor, boxes: Tensor, targets: WeightedQueryTargets, costs: MatchingCosts
) -> Tensor:
    """Return the cost [Q, N] of each query (``logits`` [Q, K], ``boxes`` [Q, 4]) for
    each target.
    """
    scores = logits.float().sigmoid()
    alpha, gamma = costs.alpha, costs.gamma
    absent = -(1 - alpha) * scores**gamma * (1 - scores + LOG_EPSILON).log()
    present = -alpha * (1 - scores) ** gamma * (scores + LOG_EPSILON).log()
    class_cost = (present - absent) @ targets.probs.T
    l1 = torch.cdist(boxes.float(), targets.boxes, p=1)
    giou = generalized_box_iou(to_corners(boxes.float()), to_corners(targets.boxes))
    cost = costs.class_cost * class_cost + costs.l1 * l1 - costs.giou * giou
    largest = torch.finfo(cost.dtype).max
    weighted = cost * targets.weights
    return torch.nan_to_num(weighted, nan=largest, posinf=largest, neginf=largest)


def unite_matches(parts: Sequence[Matches], image_count: int) -> Matches:
    """Unite the matches of several decoder layers: each query that any of them matched
    keeps the target that most of them matched it to (DEIM's dense one-to-one
    matching); of equally frequent ones that which the library keeps.
    """
    image = torch.cat([part.image for part in parts])
    pairs = torch.stack(
        [
            torch.cat([part.query for part in parts]),
            torch.cat([part.target for part in parts]),
        ],
        1,
    )
    images, queries, targets = [], [], []
    for index in range(image_count):
        unique_pairs, counts = pairs[image == index].unique(dim=0, return_counts=True)
        # not stable: the library's order of equal counts depends on the algorithm
        ordered = unique_pairs[counts.argsort(descending=True)]
        first = _first_occurrences(ordered[:, 0])
        queries.append(ordered[first, 0])
        targets.append(ordered[first, 1])
        images.append(torch.full_like(first, index))
    return Matches(torch.cat(images), torch.cat(queries), torch.cat(targets))


def _first_occurrences(numbers: Tensor) -> Tensor:
    """Return the position of the first occurrence of each number in ``numbers`` [P]."""
    unique_numbers, inverse = numbers.unique(return_inverse=True)
    positions = torch.arange(len(numbers), device=numbers.device)
    last = torch.full_like(unique_numbers, len(numbers))
    return last.scatter_reduce(0, inverse, positions, "amin")


@torch.no_grad()
def find_ignored_queries(
    boxes: Tensor, targets: Sequence[WeightedQueryTargets]
) -> Tensor:
    """Return [B, Q] bool: at least half of the query's box (``boxes`` [B, Q, 4] cxcywh
    in 0..1), as far as it lies in the image, is inside one ignored region.
    """
    ignored = torch.zeros(boxes.shape[:2], dtype=torch.bool, device=boxes.device)
    for image, image_targets in enumerate(targets):
        regions = image_targets.ignored
        if len(regions):
            corners = to_corners(boxes[image].float()).clamp(0, 1)
            ignored[image] = _is_covered(corners, regions)
    return ignored


def _is_covered(boxes: Tensor, regions: Tensor) -> Tensor:
    """Return [Q] bool for ``boxes`` [Q, 4] and ``regions`` [M, 4] (xyxy). A box without
    area is covered where its centre is.
    """
    left_top = torch.maximum(boxes[:, None, :2], regions[:, :2])
    right_bottom = torch.minimum(boxes[:, None, 2:], regions[:, 2:])
    intersection = (right_bottom - left_top).clamp(min=0).prod(-1)
    area = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)[:, None]
    centre = ((boxes[:, :2] + boxes[:, 2:]) / 2)[:, None]
    has_centre = (centre >= regions[:, :2]) & (centre <= regions[:, 2:])
    is_covered = (intersection >= COVERED_SHARE * area) & has_centre.all(-1)
    return is_covered.any(1)


def to_corners(boxes: Tensor) -> Tensor:
    """Convert cxcywh [..., 4] to xyxy."""
    corners: Tensor = box_convert(boxes, "cxcywh", "xyxy")
    return corners
