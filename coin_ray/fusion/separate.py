"""Knowledge separation: which results both teachers share, where they contradict, and
what only one of them saw (paper section 3.3).

The published matching is many-to-many: no best match, no Hungarian assignment, no
confidence threshold on agreement. Where the paper says nothing and the official code
draws at random, we draw from a seeded generator.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou

from coin_ray import boxes as box_ops
from coin_ray.config import Separate
from coin_ray.structures import Detections, Pairs, Separation

SAME_CLOUD_BOX = 0.95
"""Cloud boxes overlapping more are two names for one object."""

Match = tuple[int, int]
"""(row of the cloud result, row of the CLIP-detector result)"""


@dataclass(frozen=True, slots=True)
class _Matches:
    pairs: list[Match]
    private_clip: list[int]


def separate(
    cloud: Detections,
    clip: Detections,
    config: Separate,
    *,
    fuse_boxes: bool,
    generator: torch.Generator,
) -> Separation:
    """Split one image's results. All boxes in one frame; ``clip`` may carry one box
    several times with different classes.

    ``fuse_boxes``: a pair's box is the score-weighted mean of both boxes, else the
    cloud's.
    """
    clip = clip[clip.scores > config.clip_score_min]
    if not len(cloud) or not len(clip):
        return _from_one_teacher(cloud, clip, config, generator)
    overlap = box_iou(cloud.boxes, clip.boxes)
    matches = _match(cloud, clip, overlap >= config.iou_min, generator)
    pairs = _resolve_cloud_doubles(matches.pairs, cloud, clip)
    matched = {o for o, _ in matches.pairs}
    lonely = [o for o in range(len(cloud)) if o not in matched]
    agreeing = [(o, f) for o, f in pairs if cloud.labels[o] == clip.labels[f]]
    disagreeing = [(o, f) for o, f in pairs if cloud.labels[o] != clip.labels[f]]
    consistent = _without_doubles(_pairs(agreeing, cloud, clip, fuse_boxes), generator)
    inconsistent = _without_doubles(
        _pairs(disagreeing, cloud, clip, fuse_boxes), generator
    )
    claimed = (inconsistent.boxes[:, None] == consistent.boxes[None]).all(-1).any(1)
    private = Detections.cat(
        [
            cloud[torch.tensor(lonely, dtype=torch.int64)],
            clip[torch.tensor(matches.private_clip, dtype=torch.int64)],
        ]
    )
    return Separation(consistent, inconsistent[~claimed], private)


def _from_one_teacher(
    cloud: Detections, clip: Detections, config: Separate, generator: torch.Generator
) -> Separation:
    """The two published fallbacks for images in which one teacher saw nothing (the
    paper: all private). A box keeps one name.
    """
    none = Pairs.empty(cloud.num_classes)
    if len(cloud):
        if config.lone_cloud_consistent:
            return Separation(
                _without_doubles(Pairs(cloud.boxes, cloud, cloud), generator),
                none,
                cloud[:0],
            )
        return Separation(none, none, cloud)
    sure = clip.scores > config.lone_clip_score
    return Separation(
        _without_doubles(Pairs(clip.boxes[sure], clip[sure], clip[sure]), generator),
        none,
        clip[~sure],
    )


def _match(
    cloud: Detections, clip: Detections, overlaps: Tensor, generator: torch.Generator
) -> _Matches:
    """Every overlapping pair; a CLIP box with several classes takes part once, with the
    class the cloud gave if it has it.
    """
    pairs: list[Match] = []
    private: list[int] = []
    for members in _same_box_groups(clip.boxes):
        hits = overlaps[:, members[0]].nonzero()[:, 0].tolist()
        if not hits:
            private.append(_choose(members, generator))
        elif len(members) == 1:
            pairs += [(hit, members[0]) for hit in hits]
        else:
            first = max(hits, key=lambda hit: float(cloud.scores[hit]))
            same = [m for m in members if clip.labels[m] == cloud.labels[first]]
            pairs.append((first, same[0] if same else _choose(members, generator)))
    return _Matches(pairs, private)


def _same_box_groups(boxes: Tensor) -> list[list[int]]:
    """Rows with bit-identical boxes, in order of first appearance (class-agnostic
    regression gives one box several classes).
    """
    groups: dict[tuple[float, ...], list[int]] = {}
    for row, box in enumerate(boxes.tolist()):
        groups.setdefault(tuple(box), []).append(row)
    return list(groups.values())


def _resolve_cloud_doubles(
    pairs: list[Match], cloud: Detections, clip: Detections
) -> list[Match]:
    """Where the cloud gave one object two names: keep the name CLIP confirms; if CLIP
    contradicts itself, only the conflicts.
    """
    same = box_iou(cloud.boxes, cloud.boxes) >= SAME_CLOUD_BOX
    done: set[int] = set()
    dropped: set[Match] = set()
    for first in cloud.scores.argsort(descending=True, stable=True).tolist():
        doubles = [o for o in same[first].nonzero()[:, 0].tolist() if o not in done]
        if len(doubles) < 2 or first in done:
            continue
        done.update(doubles)
        named = {int(clip.labels[f]) for o, f in pairs if o == first}
        ours = [(o, f) for o, f in pairs if o in doubles]
        if len(named) == 1:
            confirmed = [(o, f) for o, f in ours if int(cloud.labels[o]) in named]
            dropped.update(set(ours) - set(confirmed) if confirmed else ())
        elif named:
            dropped.update((o, f) for o, f in ours if cloud.labels[o] == clip.labels[f])
    return [pair for pair in pairs if pair not in dropped]


def _pairs(
    matches: list[Match], cloud: Detections, clip: Detections, fuse_boxes: bool
) -> Pairs:
    rows = torch.tensor(matches, dtype=torch.int64).reshape(-1, 2)
    ours, theirs = cloud[rows[:, 0]], clip[rows[:, 1]]
    boxes = (
        box_ops.weighted_mean(ours.boxes, theirs.boxes, ours.scores, theirs.scores)
        if fuse_boxes
        else ours.boxes
    )
    return Pairs(boxes, ours, theirs)


def _without_doubles(pairs: Pairs, generator: torch.Generator) -> Pairs:
    """Of pairs with bit-identical boxes one, drawn at random, stays."""
    kept = [_choose(group, generator) for group in _same_box_groups(pairs.boxes)]
    return pairs[torch.tensor(sorted(kept), dtype=torch.int64)]


def _choose(rows: list[int], generator: torch.Generator) -> int:
    return (
        rows[0]
        if len(rows) == 1
        else rows[int(torch.randint(len(rows), (), generator=generator))]
    )
