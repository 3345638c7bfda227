"""Fuse the detections of several detectors, or of one in several renderings, in one
image: weighted box fusion, as of several clouds (``coin_ray.cloud.answer_fusion``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from coin_ray.cloud.answer_fusion import fuse_answers
from coin_ray.cloud.protocol import RawDetections
from coin_ray.structures import Detections

FUSION_IOU = 0.55


def fuse_detections(
    sources: Sequence[Detections], weights: Sequence[float], iou: float = FUSION_IOU
) -> Detections:
    """Return one detection for each object of an image, best first, of at least one
    source; boxes in one frame.

    A fused box is the mean weighted by score; its class scores are the mean over all
    sources by ``weights``, 0 of those without a box on the object. So what several
    detectors see ranks above what one sees.
    """
    if not sources:
        raise ValueError("expected the detections of at least one detector, got none")
    answers = [
        RawDetections(
            source.boxes.numpy(), class_scores(source).numpy(), score_kind="per_class"
        )
        for source in sources
    ]
    fused = fuse_answers(answers, weights, iou)
    scores = torch.from_numpy(np.ascontiguousarray(fused.class_scores))
    boxes = torch.from_numpy(np.ascontiguousarray(fused.boxes))
    return detections_from_scores(boxes, scores)


def class_scores(detections: Detections) -> Tensor:
    """Return the score of each class [N, K], in the ratios of the probabilities; that
    of the label is the detection's own.
    """
    label_probs = detections.probs.gather(1, detections.labels[:, None])
    ratios = detections.probs[:, :-1] / label_probs.clamp(min=1e-12)
    return (detections.scores[:, None] * ratios).clamp(0, 1)


def detections_from_scores(boxes: Tensor, scores: Tensor) -> Detections:
    """Return boxes [N, 4] with independent class scores [N, K] as detections; what the
    scores leave is background.
    """
    num_classes = scores.shape[1]
    if not len(boxes):
        return Detections.empty(num_classes)
    best, labels = scores.max(1)
    foreground = scores / scores.sum(1, keepdim=True).clamp(min=1.0)
    background = (1 - foreground.sum(1, keepdim=True)).clamp(min=0.0)
    return Detections(boxes, best, labels, torch.cat([foreground, background], 1))
