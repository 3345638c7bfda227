"""The losses of YOLOX with its SimOTA assignment (Ge et al. 2021, section 2.3), for
targets whose boxes count by weight, whose classes are distributions, and whose ignored
regions cost nothing.

With weights of 1, certain classes and nothing ignored they equal those of the reference
implementation. What differs otherwise:

- a weight multiplies the IoU of its box in the assignment, so that an uncertain box
  gets fewer cells and loses cells to a certain one, and the losses of its cells;
- the classes' target is the distribution over the foreground, times the IoU as before;
  the target of objectness is 1 less the probability of background;
- cells whose centre lies in an ignored region, and that no box got, have no loss.

A is the number of cells of an image, N its boxes, K the classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_convert

from coin_ray.models.students.yolox_network import decode_boxes_cxcywh
from coin_ray.parallel import all_sum
from coin_ray.structures import Targets

BOX_WEIGHT = 5.0
IOU_COST = 3.0
OUTSIDE_COST = 1e6
CENTRE_RADIUS = 1.5
"""Cells in whose square of so many strides around a box's centre they may learn it."""
MOST_CELLS = 10
"""Best IoUs of a box whose sum is its number of cells."""


@dataclass(frozen=True, slots=True, eq=False)
class Assignment:
    """Cells of an image that learn a box: ``cells`` [P], their ``boxes`` [P] (rows of
    the targets) and ``ious`` [P] with their predictions.
    """

    cells: Tensor
    boxes: Tensor
    ious: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class CellTargets:
    """Targets of all cells of an image: ``objectness`` [A] in 0..1 and its weights [A];
    of the P cells that learn a box ``cells`` [P], ``boxes`` [P, 4] as centre and size,
    ``classes`` [P, K] and ``weights`` [P].
    """

    objectness: Tensor
    objectness_weights: Tensor
    cells: Tensor
    boxes: Tensor
    classes: Tensor
    weights: Tensor


def yolox_losses(
    predictions: Tensor, cells: Tensor, strides: Tensor, targets: Sequence[Targets]
) -> dict[str, Tensor]:
    """Return the losses ``boxes``, ``objectness`` and ``classes`` of the network's
    predictions [B, A, 5 + K], over the sum of the weights of the cells of all workers.

    ``cells`` [A, 2] and ``strides`` [A] as of ``cell_grid``; boxes of ``targets`` are
    pixels of the network's input, on its device.
    """
    predictions = predictions.float()
    boxes = decode_boxes_cxcywh(predictions[..., :4], cells, strides)
    centres = (cells + 0.5) * strides[:, None]
    cell_targets = [
        _cell_targets(
            image_predictions.detach(), image_boxes.detach(), centres, strides, t
        )
        for image_predictions, image_boxes, t in zip(
            predictions, boxes, targets, strict=True
        )
    ]
    total_weight = torch.stack([t.weights.sum() for t in cell_targets]).sum()
    total = all_sum(total_weight).clamp(min=1.0)
    learned = [
        image[t.cells] for image, t in zip(predictions, cell_targets, strict=True)
    ]
    learned_boxes = [
        image[t.cells] for image, t in zip(boxes, cell_targets, strict=True)
    ]
    weights = torch.cat([t.weights for t in cell_targets])
    box_loss = _iou_loss(
        torch.cat(learned_boxes), torch.cat([t.boxes for t in cell_targets])
    )
    objectness_loss = F.binary_cross_entropy_with_logits(
        predictions[..., 4],
        torch.stack([t.objectness for t in cell_targets]),
        torch.stack([t.objectness_weights for t in cell_targets]),
        reduction="sum",
    )
    class_loss = F.binary_cross_entropy_with_logits(
        torch.cat(learned)[:, 5:],
        torch.cat([t.classes for t in cell_targets]),
        weights[:, None],
        reduction="sum",
    )
    return {
        "boxes": BOX_WEIGHT * (box_loss * weights).sum() / total,
        "objectness": objectness_loss / total,
        "classes": class_loss / total,
    }


@torch.no_grad()
def _cell_targets(
    predictions: Tensor,
    predicted: Tensor,
    centres: Tensor,
    strides: Tensor,
    targets: Targets,
) -> CellTargets:
    """Assign the boxes of an image to cells, from its predictions [A, 5 + K] and predicted
    boxes [A, 4] (centre and size).
    """
    objectness = torch.zeros_like(strides)
    objectness_weights = 1.0 - is_inside(centres, targets.ignored).float()
    boxes = box_convert(targets.boxes.float(), "xyxy", "cxcywh")
    probs, weights = targets.probs.float(), targets.weights.float()
    background = probs[:, -1:]
    classes = probs[:, :-1] / (1 - background).clamp(min=1e-6)
    assignment = assign_cells(
        predictions, predicted, centres, strides, (boxes, classes, weights)
    )
    cells, rows = assignment.cells, assignment.boxes
    objectness[cells] = 1 - background[rows, 0]
    objectness_weights[cells] = weights[rows]
    return CellTargets(
        objectness,
        objectness_weights,
        cells,
        boxes[rows],
        classes[rows] * assignment.ious[:, None],
        weights[rows],
    )


def assign_cells(
    predictions: Tensor,
    predicted: Tensor,
    centres: Tensor,
    strides: Tensor,
    targets: tuple[Tensor, Tensor, Tensor],
) -> Assignment:
    """Assign cells to the boxes [N, 4] (centre and size), classes [N, K] and weights
    [N] of ``targets``: each box gets the cells near its centre where it costs least, as
    many as its best predictions overlap it, and each cell one box.
    """
    boxes, classes, weights = targets
    distance = (centres[None] - boxes[:, None, :2]).abs().amax(-1)
    is_near = distance < CENTRE_RADIUS * strides
    candidates = is_near.any(0).nonzero()[:, 0]
    if not len(candidates):
        return Assignment(candidates, candidates, predictions.new_zeros(0))
    ious = _box_ious(boxes, predicted[candidates])
    weighted_ious = ious * weights[:, None]
    cost = (
        _class_costs(predictions[candidates], classes)
        - IOU_COST * torch.log(weighted_ious + 1e-8)
        + OUTSIDE_COST * (~is_near[:, candidates])
    )
    is_assigned = _cheapest_cells(cost, weighted_ious)
    contested = (is_assigned.sum(0) > 1).nonzero()[:, 0]
    is_assigned[:, contested] = False
    is_assigned[cost[:, contested].argmin(0), contested] = True
    columns = is_assigned.any(0).nonzero()[:, 0]
    rows = is_assigned[:, columns].int().argmax(0)
    return Assignment(candidates[columns], rows, ious[rows, columns])


def _class_costs(predictions: Tensor, classes: Tensor) -> Tensor:
    """Return the cross entropies [N, C] between the class distributions [N, K] and the
    scores of the predictions [C, 5 + K].
    """
    scores = (predictions[:, 5:].sigmoid() * predictions[:, 4:5].sigmoid()).sqrt()
    present, absent = scores.log().clamp(min=-100), (1 - scores).log().clamp(min=-100)
    return -(classes @ (present - absent).T) - absent.sum(1)


def _cheapest_cells(cost: Tensor, ious: Tensor) -> Tensor:
    """Return [N, C] whether a cell is among the cheapest of a box; how many of them is
    the sum of its best IoUs, at least one.
    """
    limit = min(MOST_CELLS, cost.shape[1])
    counts = ious.topk(limit).values.sum(1).int().clamp(min=1)
    cheapest = cost.topk(limit, largest=False).indices
    is_taken = torch.arange(limit, device=cost.device) < counts[:, None]
    is_assigned = torch.zeros_like(cost, dtype=torch.bool)
    return is_assigned.scatter_(1, cheapest, is_taken)


def is_inside(points: Tensor, regions: Tensor) -> Tensor:
    """Return [A] whether a point [A, 2] lies in one of the regions [M, 4] (xyxy)."""
    points, regions = points[:, None], regions[None].to(points)
    is_right_below = (points >= regions[..., :2]).all(-1)
    is_left_above = (points < regions[..., 2:]).all(-1)
    return (is_right_below & is_left_above).any(1)


def _box_ious(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the IoUs [N, C] of boxes [N, 4] and [C, 4], as centre and size."""
    first, second = boxes[:, None], others[None]
    return _iou(first, second, 0.0).nan_to_num(0.0)


def _iou_loss(predicted: Tensor, boxes: Tensor) -> Tensor:
    """Return 1 - IoU squared [P] of boxes [P, 4], as centre and size."""
    return 1 - _iou(predicted, boxes, 1e-16) ** 2


def _iou(first: Tensor, second: Tensor, epsilon: float) -> Tensor:
    first_half, second_half = first[..., 2:] / 2, second[..., 2:] / 2
    left_top = torch.maximum(first[..., :2] - first_half, second[..., :2] - second_half)
    right_bottom = torch.minimum(
        first[..., :2] + first_half, second[..., :2] + second_half
    )
    overlaps = (left_top < right_bottom).all(-1)
    intersection = (right_bottom - left_top).prod(-1) * overlaps
    union = first[..., 2:].prod(-1) + second[..., 2:].prod(-1) - intersection
    return intersection / (union + epsilon)
