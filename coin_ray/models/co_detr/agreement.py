"""What auxiliary heads find by themselves, and how much they agree with the decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import (
    batched_nms,
    box_iou,
    clip_boxes_to_image,
    remove_small_boxes,
)

from coin_ray.models.co_detr.model import with_background
from coin_ray.models.co_detr.targets import Size
from coin_ray.structures import Detections

CANDIDATES = 1000
"""(box, class) pairs of an image that are compared in suppression."""


@torch.no_grad()
def without_doubles(
    boxes: Tensor, scores: Tensor, vectors: Tensor, size: Size, iou: float, limit: int
) -> Detections:
    """The best ``limit`` of (box, class) pairs by ``scores`` [N, K], of those that
    overlap by ``iou`` in one class only the best.

    ``boxes`` [N, 1 or K, 4] xyxy pixels, ``vectors`` [N, K+1]; boxes are cut at the
    border of an image of ``size`` (height, width).
    """
    flat = scores.flatten()
    best, chosen = flat.topk(min(CANDIDATES, len(flat)))
    row, label = chosen // scores.shape[1], chosen % scores.shape[1]
    placed = clip_boxes_to_image(boxes[row, label if boxes.shape[1] > 1 else 0], size)
    kept = remove_small_boxes(placed, 1e-3)
    kept = kept[best[kept] > 0]
    kept = kept[batched_nms(placed[kept], best[kept], label[kept], iou)][:limit]
    return Detections(placed[kept], best[kept], label[kept], vectors[row[kept]])


@torch.no_grad()
def support(boxes: Tensor, found: Detections) -> Tensor:
    """[N, K] in 0..1: how much one head says that class k is at each of ``boxes`` [N,
    4].

    The best IoU x class probability over the head's detections: 1 for the same box and
    a certain name, 0 where it sees nothing of the class.
    """
    if not len(found):
        return boxes.new_zeros(len(boxes), found.num_classes)
    overlaps = box_iou(boxes, found.boxes)
    best: Tensor = (overlaps[:, :, None] * found.probs[None, :, :-1]).amax(1)
    return best


@torch.no_grad()
def agreed(found: Detections, others: Sequence[Detections]) -> Detections:
    """``found`` by one head with confidences that all share, best first: same boxes and
    names.

    The confidence in a class is the mean of ``found``'s own probability and of the
    ``support`` of each of ``others``.
    """
    opinions = [found.probs[:, :-1], *(support(found.boxes, other) for other in others)]
    shared = torch.stack(opinions).mean(0)
    scores = shared.gather(1, found.labels[:, None])[:, 0]
    order = scores.argsort(descending=True, stable=True)
    return Detections(found.boxes, scores, found.labels, with_background(shared))[order]
