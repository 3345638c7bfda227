"""Suppression within an auxiliary head's detections, and confidences averaged over the
decoder and the auxiliary heads.
"""

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

from coin_ray.models.co_detr.model import append_background
from coin_ray.models.co_detr.targets import Size
from coin_ray.structures import Detections

CANDIDATES = 1000
"""(box, class) pairs of an image that enter suppression."""
SMALLEST_BOX = 1e-3
"""Boxes with a side below this many pixels are dropped."""


@torch.no_grad()
def deduplicate_detections(
    boxes: Tensor, scores: Tensor, probs: Tensor, size: Size, iou: float, limit: int
) -> Detections:
    """Return the best ``limit`` (box, class) pairs by ``scores`` [N, K] after
    class-wise NMS at ``iou``.

    ``boxes`` [N, 1 or K, 4] xyxy pixels, ``probs`` [N, K+1]; boxes are clipped to an
    image of ``size`` (height, width).
    """
    flat_scores = scores.flatten()
    count = min(CANDIDATES, len(flat_scores))
    pair_scores, pairs = flat_scores.topk(count)
    rows, labels = pairs // scores.shape[1], pairs % scores.shape[1]
    box_columns = labels if boxes.shape[1] > 1 else 0
    clipped = clip_boxes_to_image(boxes[rows, box_columns], size)
    selected = remove_small_boxes(clipped, SMALLEST_BOX)
    selected = selected[pair_scores[selected] > 0]
    selected = selected[
        batched_nms(clipped[selected], pair_scores[selected], labels[selected], iou)
    ]
    selected = selected[:limit]
    return Detections(
        clipped[selected],
        pair_scores[selected],
        labels[selected],
        probs[rows[selected]],
    )


@torch.no_grad()
def class_agreement(boxes: Tensor, detections: Detections) -> Tensor:
    """Return [N, K] in 0..1: how far one head's ``detections`` confirm class k at each
    of ``boxes`` [N, 4].

    It is the best IoU x class probability over the detections: 1 for the same box and a
    certain class, 0 where the head detects nothing of the class.
    """
    if not len(detections):
        return boxes.new_zeros(len(boxes), detections.num_classes)
    overlaps = box_iou(boxes, detections.boxes)
    class_probs = detections.probs[:, :-1]
    agreement: Tensor = (overlaps[:, :, None] * class_probs[None]).amax(1)
    return agreement


@torch.no_grad()
def average_head_confidences(
    detections: Detections, other_heads: Sequence[Detections]
) -> Detections:
    """Return the same boxes and labels with confidences averaged over all heads, best
    first.

    The confidence in a class is the mean of the detection's own probability and of its
    ``class_agreement`` with each of ``other_heads``.
    """
    confidences = [detections.probs[:, :-1]]
    confidences += [class_agreement(detections.boxes, head) for head in other_heads]
    mean = torch.stack(confidences).mean(0)
    scores = mean.gather(1, detections.labels[:, None])[:, 0]
    order = scores.argsort(descending=True, stable=True)
    averaged = Detections(
        detections.boxes, scores, detections.labels, append_background(mean)
    )
    return averaged[order]
