"""Boxes with an independent score per class, as served detectors return them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.ops import batched_nms, nms

Floats = NDArray[np.float32]
ScoredBoxes = tuple[Floats, Floats]
"""Boxes [N, 4] xyxy in pixels of the image, and scores [N, K]."""

NMS_IOU = 0.5
DUPLICATE_IOU = 0.7
"""For detectors that already suppress overlapping boxes of one class: boxes that overlap
more are the same object with several labels."""
DETECTIONS_MAX = 100


def select_boxes(
    boxes: Floats,
    scores: Floats,
    image_size: tuple[int, int],
    score_min: float,
    nms_iou: float = NMS_IOU,
    class_wise: bool = False,
) -> ScoredBoxes:
    """Return the best of candidates [M, 4] with scores [M, K] after NMS, clipped to an
    image of ``image_size`` (width, height).

    ``class_wise``: a box suppresses only boxes whose best class is its own.
    """
    above = scores.max(1, initial=0) >= score_min
    limits = [*image_size, *image_size]
    boxes = np.clip(boxes[above], 0, limits).astype(np.float32)
    scores = np.clip(scores[above], 0, 1).astype(np.float32)
    best_scores = torch.from_numpy(scores.max(1, initial=0))
    box_tensor = torch.from_numpy(boxes)
    if class_wise and len(boxes):
        order = batched_nms(
            box_tensor, best_scores, torch.from_numpy(scores.argmax(1)), nms_iou
        )
    else:
        order = nms(box_tensor, best_scores, nms_iou)
    best = order[:DETECTIONS_MAX].numpy()
    return boxes[best], scores[best]
