"""From both teachers' detections of a batch to separations, and from a separation to the
``Targets`` of a student that was a detector before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from coin_ray.config import Separate, TargetSettings
from coin_ray.config.students import KindOfBox
from coin_ray.data.examples import Batch
from coin_ray.fusion.separate import separate_knowledge
from coin_ray.structures import Detections, Pairs, Separation, Targets

Fuse = Callable[[Tensor, Tensor], Tensor]
"""Fuses the cloud's and CLIP's probabilities [R, K+1] into probabilities [R, K+1]."""
EPSILON = 1e-6


def separate_batch(
    batch: Batch,
    clip_detections: Sequence[Detections],
    config: Separate,
    *,
    fuse_boxes: bool,
) -> list[Separation]:
    """Separate the cloud's detections of each image from ``clip_detections``, to which
    CLIP's labels of the cloud's boxes are added. A person's review of an image replaces
    both teachers.
    """
    separations = []
    for cloud, clip, clip_labels, reviewed, generator in zip(
        batch.detections["cloud"],
        clip_detections,
        batch.detections["clip_labels"],
        batch.reviewed,
        batch.generators,
        strict=True,
    ):
        if reviewed:
            separation = Separation.from_labels(cloud, reviewed=True)
        else:
            separation = separate_knowledge(
                cloud,
                Detections.cat([clip, clip_labels]),
                config,
                fuse_boxes=fuse_boxes,
                generator=generator,
            )
        separations.append(separation)
    return separations


def make_targets(
    separation: Separation,
    settings: TargetSettings,
    fuse: Fuse,
    disputed_probs: Tensor | None = None,
    fused_score_min: float = 0.0,
) -> Targets:
    """Return what the separation of an image teaches. ``disputed_probs`` [B, K+1]: what
    CKG makes of both opinions on the inconsistent pairs, instead of ``fuse``; pairs
    whose best one is below ``fused_score_min`` are ignored regions.

    A box's classes are both opinions fused, or the only one, as a distribution over the
    foreground: its weight says how sure it is that there is an object. What a person
    has reviewed is certain.
    """
    if separation.reviewed:
        pairs = separation.consistent
        labels = pairs.cloud
        return Targets.from_labels(pairs.boxes, labels.labels, labels.num_classes)
    cloud_rows = torch.arange(len(separation.private)) < separation.cloud_private
    cloud_only = separation.private[cloud_rows]
    clip_only = separation.private[~cloud_rows]
    consistent, disputed = separation.consistent, separation.inconsistent
    if disputed_probs is None:
        disputed_probs = fuse(disputed.cloud.probs, disputed.clip.probs)
    is_confident = disputed_probs.amax(-1) >= fused_score_min
    parts = [
        _pair_targets(
            consistent,
            fuse(consistent.cloud.probs, consistent.clip.probs),
            "learn",
            settings,
        ),
        _pair_targets(
            disputed[is_confident],
            disputed_probs[is_confident],
            settings.inconsistent,
            settings,
        ),
        _pair_targets(
            disputed[~is_confident],
            disputed_probs[~is_confident],
            "drop" if settings.inconsistent == "drop" else "ignore",
            settings,
        ),
        _lone_targets(
            cloud_only, settings.private_cloud, settings.private_cloud_score, settings
        ),
        _lone_targets(
            clip_only, settings.private_clip, settings.private_clip_score, settings
        ),
    ]
    return Targets(
        torch.cat([part.boxes for part in parts]),
        torch.cat([part.probs for part in parts]),
        torch.cat([part.weights for part in parts]),
        torch.cat([part.ignored for part in parts]),
    )


def label_targets(labels: Detections) -> Targets:
    """Return labels as certain targets: plain pseudo-labels, or the truth."""
    return Targets.from_labels(labels.boxes, labels.labels, labels.num_classes)


def _pair_targets(
    pairs: Pairs, probs: Tensor, kind: KindOfBox, settings: TargetSettings
) -> Targets:
    """Return the targets of boxes that both teachers found, with fused probabilities
    [N, K+1].
    """
    scores = pairs.cloud.scores
    if settings.pair_score == "either":
        scores = 1 - (1 - scores) * (1 - pairs.clip.scores)
    return _targets_by_trust(pairs.boxes, probs, scores, kind, settings)


def _lone_targets(
    detections: Detections, kind: KindOfBox, score_min: float, settings: TargetSettings
) -> Targets:
    """Return the targets of boxes that one teacher found."""
    confident = detections[detections.scores >= score_min]
    return _targets_by_trust(
        confident.boxes, confident.probs, confident.scores, kind, settings
    )


def _targets_by_trust(
    boxes: Tensor,
    probs: Tensor,
    scores: Tensor,
    kind: KindOfBox,
    settings: TargetSettings,
) -> Targets:
    """Return boxes [N, 4] with class probabilities [N, K+1] and scores [N] as targets:
    those above ``certain_score`` have weight 1, the others what ``trust`` says.
    """
    if kind == "drop":
        boxes, probs, scores = boxes[:0], probs[:0], scores[:0]
    weights = (scores / settings.certain_score).clamp(max=1.0)
    is_learned = torch.full_like(scores, kind == "learn", dtype=torch.bool)
    is_ignored = ~is_learned
    if settings.trust != "soft":
        is_certain = scores >= settings.certain_score
        if settings.trust == "ignore":
            is_ignored |= ~is_certain
        is_learned &= is_certain
    return Targets(
        boxes[is_learned],
        foreground_distribution(probs[is_learned]),
        weights[is_learned],
        boxes[is_ignored],
    )


def foreground_distribution(probs: Tensor) -> Tensor:
    """Return probabilities [N, K+1] over the foreground alone: background is 0, and rows
    sum to 1. Where all is background, every class is equally likely.
    """
    foreground = probs[:, :-1]
    is_background = foreground.sum(1, keepdim=True) <= EPSILON
    foreground = torch.where(is_background, 1.0, foreground)
    return F.pad(foreground / foreground.sum(1, keepdim=True), (0, 1))
