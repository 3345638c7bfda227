"""Class vectors as the published code feeds them to separation, one form for each kind
of cloud it used.

Background is 0 in all of them. With one class every vector is [1, 0]; only ``smoothed``
keeps the scores' order then.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from coin_ray.structures import Detections


def normalised(cloud: Detections) -> Detections:
    """Normalise probs [N, K+1] over the foreground classes; the score is the best of
    them (1 with one class). Used with Grounding DINO.
    """
    foreground = cloud.probs[:, :-1]
    foreground = foreground / foreground.sum(1, keepdim=True).clamp(min=1e-12)
    return _with_foreground(cloud, foreground, foreground.amax(1))


def smoothed(cloud: Detections) -> Detections:
    """Give the label its score s, and each of the other K - 1 classes (1 - s) / (K -
    1). Used with GLIP.
    """
    classes = cloud.num_classes
    if classes == 1:
        return _with_foreground(
            cloud, torch.ones_like(cloud.probs[:, :-1]), cloud.scores
        )
    share = (1 - cloud.scores) / (classes - 1)
    other_classes = share[:, None].expand(-1, classes)
    foreground = other_classes.scatter(1, cloud.labels[:, None], cloud.scores[:, None])
    return _with_foreground(cloud, foreground, cloud.scores)


def one_hot(cloud: Detections) -> Detections:
    """Give the label probability 1, and every box score 1, for a cloud that returns
    labels only.
    """
    probs = F.one_hot(cloud.labels, cloud.probs.shape[1]).to(cloud.probs)
    return Detections(cloud.boxes, torch.ones_like(cloud.scores), cloud.labels, probs)


CLOUD_VECTOR_FORMS: dict[str, Callable[[Detections], Detections]] = {
    "collected": lambda cloud: cloud,
    "normalised": normalised,
    "smoothed": smoothed,
    "one_hot": one_hot,
}
"""Names as in ``labels.cloud_vectors``."""


def _with_foreground(
    cloud: Detections, foreground: Tensor, scores: Tensor
) -> Detections:
    """Replace the vectors by ``foreground`` [N, K], with background 0, and the
    scores.
    """
    return Detections(cloud.boxes, scores, cloud.labels, F.pad(foreground, (0, 1)))
