"""Measure how often each kind of separated box is right, against the truth of its
images. A diagnosis; nothing is trained or selected by it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_iou

from coin_ray.tables import Truth

IOU = 0.5
FIGURES_BY_KIND = {
    "consistent": ("right",),
    "inconsistent": ("cloud", "clip", "mean", "neither"),
    "private": ("right",),
}


def separation_accuracy(
    separation: Iterable[Mapping[str, Any]], truth: Mapping[str, Truth]
) -> dict[str, dict[str, float]]:
    """Return shares in 0..1 by kind, over the ``SEPARATION`` rows whose image has
    truth; kinds without a box are left out.

    The true label of a box is that of the truth box it overlaps most, at IoU .5 or
    more, and background otherwise. ``consistent`` and ``private``: how often the label
    was ``right``; ``inconsistent``: how often the ``cloud`` was, ``clip``, the largest
    entry of the ``mean`` vector, and ``neither`` label.
    """
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in FIGURES_BY_KIND}
    for row in separation:
        has_kind = set(row["kind"]) & counts.keys()
        if has_kind and row["image_id"] in truth:
            _count_boxes(counts, row, truth[row["image_id"]])
    shares = {}
    for kind, figures in FIGURES_BY_KIND.items():
        boxes = counts[kind]["boxes"]
        if boxes:
            shares[kind] = {
                name: round(counts[kind][name] / boxes, 4) for name in figures
            }
    return shares


def _count_boxes(
    counts: Mapping[str, Counter[str]], row: Mapping[str, Any], truth: Truth
) -> None:
    """Add the boxes of one row to the counts of their kinds."""
    boxes = torch.tensor(row["boxes"], dtype=torch.float32)
    probs_sum = torch.tensor(row["cloud_probs"]) + torch.tensor(row["clip_probs"])
    true_labels = overlapped_truth_labels(boxes, truth, probs_sum.shape[1] - 1)
    labelled_boxes = zip(
        row["kind"],
        true_labels.tolist(),
        row["cloud_labels"],
        row["clip_labels"],
        probs_sum.argmax(1).tolist(),
        strict=True,
    )
    for kind, true_label, cloud_label, clip_label, mean_label in labelled_boxes:
        kind_counts = counts[kind]
        kind_counts["boxes"] += 1
        if kind == "inconsistent":
            kind_counts["cloud"] += cloud_label == true_label
            kind_counts["clip"] += clip_label == true_label
            kind_counts["mean"] += mean_label == true_label
            kind_counts["neither"] += true_label not in (cloud_label, clip_label)
        else:
            kind_counts["right"] += cloud_label == true_label


def overlapped_truth_labels(boxes: Tensor, truth: Truth, background: int) -> Tensor:
    """Return the true labels [N] of boxes [N, 4]: of the truth box each overlaps most,
    at IoU .5 or more, else ``background``.
    """
    if not len(truth.boxes):
        return torch.full((len(boxes),), background)
    overlap, best = box_iou(boxes, truth.boxes).max(1)
    return torch.where(overlap >= IOU, truth.labels[best], background)
