"""Knowledge separation: detections on which both teachers agree, on which they disagree,
and which only one of them has (paper section 3.3).

The published matching is many-to-many: no best match, no Hungarian assignment, no
confidence threshold on agreement. Where the paper says nothing and the official code
draws at random, we draw from a seeded generator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

from coin_ray import boxes as box_ops
from coin_ray.config import Separate
from coin_ray.structures import Detections, Pairs, Separation

SAME_CLOUD_BOX = 0.95
"""IoU from which two cloud boxes are two labels for one object."""

Match = tuple[int, int]
"""(row of the cloud detection, row of the CLIP detection)"""


def separate_knowledge(
    cloud: Detections,
    clip: Detections,
    config: Separate,
    *,
    fuse_boxes: bool,
    generator: torch.Generator,
) -> Separation:
    """Split one image's detections. All boxes in one frame; ``clip`` may hold one box
    several times with different classes.

    ``fuse_boxes``: a pair's box is the score-weighted mean of both boxes, else the
    cloud's.
    """
    clip = clip[clip.scores > config.clip_score_min]
    if not len(cloud) or not len(clip):
        return _separate_one_teacher(cloud, clip, config, generator)
    is_match = box_iou(cloud.boxes, clip.boxes) >= config.iou_min
    all_matches, unmatched_clip = _match_boxes(cloud, clip, is_match, generator)
    matched_cloud = {cloud_row for cloud_row, _ in all_matches}
    unmatched_cloud = [row for row in range(len(cloud)) if row not in matched_cloud]

    matches = _resolve_duplicate_cloud_labels(all_matches, cloud, clip)
    pairs = _make_pairs(matches, cloud, clip, fuse_boxes)
    is_agreed = pairs.cloud.labels == pairs.clip.labels
    consistent = _deduplicate(pairs[is_agreed], generator)
    inconsistent = _deduplicate(pairs[~is_agreed], generator)
    is_same_box = (inconsistent.boxes[:, None] == consistent.boxes[None]).all(-1)
    inconsistent = inconsistent[~is_same_box.any(1)]
    unmatched = [_select(cloud, unmatched_cloud), _select(clip, unmatched_clip)]
    return Separation(
        consistent,
        inconsistent,
        Detections.cat(unmatched),
        cloud_private=len(unmatched[0]),
    )


def _separate_one_teacher(
    cloud: Detections, clip: Detections, config: Separate, generator: torch.Generator
) -> Separation:
    """Apply the two published fallbacks for images in which one teacher detected nothing
    (the paper: all private). A box keeps one label.
    """
    no_pairs = Pairs.empty(cloud.num_classes)
    if len(cloud):
        if not config.lone_cloud_consistent:
            return Separation(no_pairs, no_pairs, cloud, cloud_private=len(cloud))
        pairs = Pairs(cloud.boxes, cloud, cloud)
        return Separation(_deduplicate(pairs, generator), no_pairs, cloud[:0])
    confident = clip.scores > config.lone_clip_score
    labels = clip[confident]
    pairs = Pairs(labels.boxes, labels, labels)
    return Separation(_deduplicate(pairs, generator), no_pairs, clip[~confident])


def _match_boxes(
    cloud: Detections, clip: Detections, is_match: Tensor, generator: torch.Generator
) -> tuple[list[Match], list[int]]:
    """Return every overlapping pair, and the CLIP rows without any. ``is_match``
    [cloud, CLIP].

    A CLIP box with several classes takes part once, with the class the cloud gave if it
    has it.
    """
    matches: list[Match] = []
    unmatched: list[int] = []
    cloud_labels, clip_labels = cloud.labels.tolist(), clip.labels.tolist()
    for clip_rows in _group_identical_boxes(clip.boxes):
        cloud_rows = is_match[:, clip_rows[0]].nonzero()[:, 0].tolist()
        if not cloud_rows:
            unmatched.append(_draw_row(clip_rows, generator))
        elif len(clip_rows) == 1:
            matches += [(cloud_row, clip_rows[0]) for cloud_row in cloud_rows]
        else:
            best = max(cloud_rows, key=lambda row: float(cloud.scores[row]))
            agreeing = [r for r in clip_rows if clip_labels[r] == cloud_labels[best]]
            clip_row = agreeing[0] if agreeing else _draw_row(clip_rows, generator)
            matches.append((best, clip_row))
    return matches, unmatched


def _group_identical_boxes(boxes: Tensor) -> list[list[int]]:
    """Group rows with bit-identical boxes, in order of first appearance (class-agnostic
    regression gives one box several classes).
    """
    groups: dict[tuple[float, ...], list[int]] = {}
    for row, box in enumerate(boxes.tolist()):
        groups.setdefault(tuple(box), []).append(row)
    return list(groups.values())


def _resolve_duplicate_cloud_labels(
    matches: list[Match], cloud: Detections, clip: Detections
) -> list[Match]:
    """Keep, where the cloud gave one object several labels, only the matches whose label
    CLIP confirms; if CLIP has several labels too, only the disagreements.
    """
    cloud_labels, clip_labels = cloud.labels.tolist(), clip.labels.tolist()
    same_object = box_iou(cloud.boxes, cloud.boxes) >= SAME_CLOUD_BOX
    visited: set[int] = set()
    dropped: set[Match] = set()
    for best in cloud.scores.argsort(descending=True, stable=True).tolist():
        overlapping = same_object[best].nonzero()[:, 0].tolist()
        duplicates = [row for row in overlapping if row not in visited]
        if len(duplicates) < 2 or best in visited:
            continue
        visited.update(duplicates)
        candidates = {(i, j) for i, j in matches if i in duplicates}
        best_labels = {clip_labels[j] for i, j in matches if i == best}
        if len(best_labels) == 1:
            confirmed = {
                (i, j) for i, j in candidates if cloud_labels[i] in best_labels
            }
            if confirmed:
                dropped |= candidates - confirmed
        elif best_labels:
            agreeing = {
                (i, j) for i, j in candidates if cloud_labels[i] == clip_labels[j]
            }
            dropped |= agreeing
    return [match for match in matches if match not in dropped]


def _make_pairs(
    matches: list[Match], cloud: Detections, clip: Detections, fuse_boxes: bool
) -> Pairs:
    rows = torch.tensor(matches, dtype=torch.int64).reshape(-1, 2)
    cloud, clip = cloud[rows[:, 0]], clip[rows[:, 1]]
    boxes = cloud.boxes
    if fuse_boxes:
        boxes = box_ops.weighted_mean_boxes(
            cloud.boxes, clip.boxes, cloud.scores, clip.scores
        )
    return Pairs(boxes, cloud, clip)


def _deduplicate(pairs: Pairs, generator: torch.Generator) -> Pairs:
    """Keep one pair, drawn at random, of those with bit-identical boxes."""
    groups = _group_identical_boxes(pairs.boxes)
    rows = [_draw_row(group, generator) for group in groups]
    return pairs[torch.tensor(sorted(rows), dtype=torch.int64)]


def _select(detections: Detections, rows: Sequence[int]) -> Detections:
    return detections[torch.tensor(rows, dtype=torch.int64)]


def _draw_row(rows: list[int], generator: torch.Generator) -> int:
    if len(rows) == 1:
        return rows[0]
    index = int(torch.randint(len(rows), (), generator=generator))
    return rows[index]
