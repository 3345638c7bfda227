"""The forms in which the published code feeds a cloud's results to separation, one for
each kind of cloud it used.

Background gets nothing in any of them. With one class every vector is [1, 0]; only
``smoothed`` keeps the scores' order then.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from coin_ray.structures import Detections


def normalised(cloud: Detections) -> Detections:
    """Grounding DINO: probs [N, K+1] normalised over the classes, score = the best of
    them (1 with one class).
    """
    foreground = _over_classes(cloud.probs[:, :-1])
    return Detections(
        cloud.boxes, foreground.amax(1), cloud.labels, F.pad(foreground, (0, 1))
    )


def smoothed(cloud: Detections) -> Detections:
    """GLIP: the label has the score s, each of the other K - 1 classes (1 - s) / (K -
    1).
    """
    classes = cloud.num_classes
    if classes == 1:
        return Detections(
            cloud.boxes,
            cloud.scores,
            cloud.labels,
            F.pad(torch.ones_like(cloud.probs[:, :-1]), (0, 1)),
        )
    others = ((1 - cloud.scores) / (classes - 1))[:, None].expand(-1, classes)
    foreground = others.scatter(1, cloud.labels[:, None], cloud.scores[:, None])
    return Detections(
        cloud.boxes, cloud.scores, cloud.labels, F.pad(foreground, (0, 1))
    )


def one_hot(cloud: Detections) -> Detections:
    """A cloud that only names its boxes: the label has probability 1, and so is every
    score.
    """
    probs = F.one_hot(cloud.labels, cloud.probs.shape[1]).to(cloud.probs)
    return Detections(cloud.boxes, torch.ones_like(cloud.scores), cloud.labels, probs)


FORMS: dict[str, Callable[[Detections], Detections]] = {
    "collected": lambda cloud: cloud,
    "normalised": normalised,
    "smoothed": smoothed,
    "one_hot": one_hot,
}


def _over_classes(foreground: Tensor) -> Tensor:
    return foreground / foreground.sum(1, keepdim=True).clamp(min=1e-12)
