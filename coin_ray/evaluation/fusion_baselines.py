"""Compute what the teachers reach without any training, cloud boxes labelled by CLIP or
by both, and the quality of pseudo-labels.

Notation: p is a probability vector of K foreground classes and, last, background; p(c |
object) = p(c) / (1 - p(background)).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from coin_ray.evaluation.voc import pairwise_iou, to_float64
from coin_ray.structures import Detections
from coin_ray.tables import Truth


@dataclass(frozen=True, slots=True)
class LabelQuality:
    """Counts over all images. Boxes on ``difficult`` truth are in none of them, and
    such truth is not required.

    boxes: labels given; localised: those that overlap some truth box; correct: those
    that also have its label; covered: truth boxes with at least one correct label;
    truth: truth boxes.
    """

    boxes: int
    localised: int
    correct: int
    covered: int
    truth: int

    @property
    def precision(self) -> float:
        """Share of the boxes given that are right in place and name; NaN without boxes."""
        return _share(self.correct, self.boxes)

    @property
    def recall(self) -> float:
        """Share of the truth boxes that got a correct label; NaN without truth."""
        return _share(self.covered, self.truth)

    @property
    def label_accuracy(self) -> float:
        """Share of the localised boxes that have the right name; NaN if none is
        localised.
        """
        return _share(self.correct, self.localised)


def expand_to_all_classes(
    detections: Detections, score_min: float = 0.01
) -> Detections:
    """Repeat each box for every class, as a detector with a softmax head reports it:
    score_k = score * p_k / p_label, floor ``score_min``.

    Otherwise a teacher that gives each box one label would be measured without the
    labels it held for nearly as likely.
    """
    label_probs = detections.probs.gather(1, detections.labels[:, None])
    label_probs = label_probs.clamp(min=1e-12)
    scores = detections.scores[:, None] * detections.probs[:, :-1] / label_probs
    row, label = (scores > score_min).nonzero(as_tuple=True)
    return Detections(
        detections.boxes[row], scores[row, label], label, detections.probs[row]
    )


def relabel_with_clip(cloud: Detections, clip_probs: Tensor) -> Detections:
    """Give cloud boxes CLIP's most probable foreground class.

    clip_probs: [N, K+1], CLIP's probabilities for each cloud box. score = s_cloud *
    max_c p_clip(c), c over the foreground; probs = p_clip. No box is dropped, not even
    those CLIP calls background: their score is low.
    """
    _check_shapes(cloud, clip_probs)
    best, labels = clip_probs[:, :-1].max(dim=1)
    return Detections(cloud.boxes, cloud.scores * best, labels, clip_probs)


def static_fusion(cloud: Detections, clip_probs: Tensor) -> Detections:
    """Fuse both teachers at test time without training: label cloud boxes by the mean
    of both.

    clip_probs: [N, K+1], CLIP's probabilities for each cloud box. With the mean q(c) =
    (p_cloud(c | object) + p_clip(c | object)) / 2 and the objectness o = 1 -
    p_cloud(background), or s_cloud where the cloud gives background no mass: label =
    argmax q, score = o * max q, probs = [o * q, 1 - o].
    """
    _check_shapes(cloud, clip_probs)
    mean = (_given_object(cloud.probs) + _given_object(clip_probs)) / 2
    background = cloud.probs[:, -1]
    objectness = torch.where(background > 0, 1 - background, cloud.scores)
    best, labels = mean.max(dim=1)
    foreground = objectness[:, None] * mean
    probs = torch.cat([foreground, 1 - objectness[:, None]], dim=1)
    return Detections(cloud.boxes, objectness * best, labels, probs)


def pseudo_label_quality(
    labels: Mapping[str, tuple[Tensor, Tensor]],
    truth: Mapping[str, Truth],
    iou: float = 0.5,
) -> LabelQuality:
    """Measure the quality of labels over the images in ``truth``: boxes [N, 4] xyxy
    pixels and labels [N] of each image id.

    Each box is compared with the truth box, of any class, that it overlaps most, if by
    more than ``iou``. Several boxes on one object are all correct: they do no harm in
    training.
    """
    no_labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    counts = np.zeros(5, np.int64)
    for image_id, image_truth in truth.items():
        boxes, box_labels = labels.get(image_id, no_labels)
        counts += _count_labels(boxes, box_labels, image_truth, iou)
    return LabelQuality(*counts.tolist())


def _count_labels(
    boxes: Tensor, labels: Tensor, truth: Truth, iou: float
) -> tuple[int, int, int, int, int]:
    """Return the five fields of ``LabelQuality`` for one image."""
    difficult = truth.difficult.cpu().numpy()
    required = int((~truth.difficult).sum())
    if not len(boxes) or not len(truth.boxes):
        return len(boxes), 0, 0, 0, required
    overlap = pairwise_iou(to_float64(boxes), to_float64(truth.boxes))
    best = overlap.argmax(1)
    localised = overlap.max(1) > iou
    ignored = localised & difficult[best]
    same_label = labels.cpu().numpy() == truth.labels.cpu().numpy()[best]
    correct = localised & ~ignored & same_label
    covered = len(np.unique(best[correct]))
    box_count = int((~ignored).sum())
    localised_count = int((localised & ~ignored).sum())
    return box_count, localised_count, int(correct.sum()), covered, required


def _check_shapes(cloud: Detections, clip_probs: Tensor) -> None:
    if clip_probs.shape != cloud.probs.shape:
        raise ValueError(
            "clip_probs must have the shape of the cloud's,"
            f" {tuple(cloud.probs.shape)}; got {tuple(clip_probs.shape)}"
        )


def _given_object(probs: Tensor) -> Tensor:
    """Return p(c | object) [N, K]; uniform where all mass is background."""
    foreground = probs[:, :-1]
    mass = foreground.sum(dim=1, keepdim=True)
    conditional = foreground / mass.clamp_min(torch.finfo(probs.dtype).tiny)
    uniform = torch.full_like(foreground, 1 / foreground.shape[1])
    return torch.where(mass > 0, conditional, uniform)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
