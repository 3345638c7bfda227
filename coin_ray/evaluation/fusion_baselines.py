"""What the teachers reach without any training: cloud boxes named by CLIP or by both;
and how good labels are.

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
    """Each box once for every class, as a detector with a softmax head reports it:
    score_k = score * p_k / p_label, floor ``score_min``.

    Without this a teacher that names each box once would be measured without the names
    it held for nearly as likely.
    """
    own = detections.probs.gather(1, detections.labels[:, None]).clamp(min=1e-12)
    scores = detections.scores[:, None] * detections.probs[:, :-1] / own
    row, label = (scores > score_min).nonzero(as_tuple=True)
    return Detections(
        detections.boxes[row], scores[row, label], label, detections.probs[row]
    )


def relabel_with_clip(cloud: Detections, clip_probs: Tensor) -> Detections:
    """Cloud boxes with CLIP's most probable foreground class.

    clip_probs: [N, K+1], CLIP's opinion of each cloud box. score = s_cloud * max_c
    p_clip(c), c over the foreground; probs = p_clip. No box is dropped, not even those
    CLIP calls background: their score is low.
    """
    best, labels = _foreground(cloud, clip_probs).max(dim=1)
    return Detections(cloud.boxes, cloud.scores * best, labels, clip_probs)


def static_fusion(cloud: Detections, clip_probs: Tensor) -> Detections:
    """The free fusion at test time: cloud boxes named by the mean of both teachers.

    clip_probs: [N, K+1], CLIP's opinion of each cloud box. With the mean q(c) =
    (p_cloud(c | object) + p_clip(c | object)) / 2 and the objectness o = 1 -
    p_cloud(background), or s_cloud where the cloud gives background no mass: label =
    argmax q, score = o * max q, probs = [o * q, 1 - o].
    """
    _foreground(cloud, clip_probs)
    mean = (_given_object(cloud.probs) + _given_object(clip_probs)) / 2
    background = cloud.probs[:, -1]
    objectness = torch.where(background > 0, 1 - background, cloud.scores)[:, None]
    best, labels = mean.max(dim=1)
    return Detections(
        cloud.boxes,
        objectness[:, 0] * best,
        labels,
        torch.cat([objectness * mean, 1 - objectness], dim=1),
    )


def pseudo_label_quality(
    labels: Mapping[str, tuple[Tensor, Tensor]],
    truth: Mapping[str, Truth],
    iou: float = 0.5,
) -> LabelQuality:
    """How good labels are, over the images in ``truth``: boxes [N, 4] xyxy pixels and
    labels [N] of each image id.

    Each box is judged against the truth box, of any class, that it overlaps most, if by
    more than ``iou``. Several boxes on one object are all right: that is no harm when
    they teach.
    """
    counts = np.zeros(5, np.int64)
    for name, annotated in truth.items():
        boxes, names = labels.get(
            name, (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
        )
        counts += _count(boxes, names, annotated, iou)
    return LabelQuality(*counts.tolist())


def _count(
    boxes: Tensor, labels: Tensor, truth: Truth, iou: float
) -> tuple[int, int, int, int, int]:
    """The five fields of ``LabelQuality`` for one image."""
    difficult, required = truth.difficult.cpu().numpy(), int((~truth.difficult).sum())
    if not len(boxes) or not len(truth.boxes):
        return len(boxes), 0, 0, 0, required
    overlap = pairwise_iou(to_float64(boxes), to_float64(truth.boxes))
    best = overlap.argmax(1)
    localised = overlap.max(1) > iou
    ignored = localised & difficult[best]
    correct = (
        localised
        & ~ignored
        & (labels.cpu().numpy() == truth.labels.cpu().numpy()[best])
    )
    covered = len(np.unique(best[correct]))
    return (
        int((~ignored).sum()),
        int((localised & ~ignored).sum()),
        int(correct.sum()),
        covered,
        required,
    )


def _foreground(cloud: Detections, clip_probs: Tensor) -> Tensor:
    if clip_probs.shape != cloud.probs.shape:
        raise ValueError(
            "clip_probs must have the shape of the cloud's,"
            f" {tuple(cloud.probs.shape)}; got {tuple(clip_probs.shape)}"
        )
    return clip_probs[:, :-1]


def _given_object(probs: Tensor) -> Tensor:
    """p(c | object) [N, K]; uniform where all mass is background."""
    foreground = probs[:, :-1]
    mass = foreground.sum(dim=1, keepdim=True)
    return torch.where(
        mass > 0,
        foreground / mass.clamp_min(torch.finfo(probs.dtype).tiny),
        torch.full_like(foreground, 1 / foreground.shape[1]),
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
