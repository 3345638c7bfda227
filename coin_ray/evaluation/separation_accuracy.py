"""How right each kind of knowledge is: a separation against the truth of its images. A
diagnosis; nothing is trained or chosen by it.
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


def separation_accuracy(
    separation: Iterable[Mapping[str, Any]], truth: Mapping[str, Truth]
) -> dict[str, dict[str, float]]:
    """Shares in 0..1 by kind, over the ``SEPARATION`` rows whose image has truth; kinds
    without a box are left out.

    A box is about the truth box it overlaps most, at IoU .5 or more, and about
    background otherwise. ``consistent`` and ``private``: how often the name was
    ``right``; ``inconsistent``: how often the ``cloud`` was, ``clip``, the best of the
    ``mean`` vector, and ``neither`` name.
    """
    counts: dict[str, Counter[str]] = {
        "consistent": Counter(),
        "inconsistent": Counter(),
        "private": Counter(),
    }
    for row in separation:
        if row["image_id"] not in truth or not set(row["kind"]) & counts.keys():
            continue
        mean = torch.tensor(row["cloud_probs"]) + torch.tensor(row["clip_probs"])
        answers = overlapped_truth_labels(
            torch.tensor(row["boxes"], dtype=torch.float32),
            truth[row["image_id"]],
            mean.shape[1] - 1,
        )
        says = zip(
            row["kind"],
            answers.tolist(),
            row["cloud_labels"],
            row["clip_labels"],
            mean.argmax(1).tolist(),
            strict=True,
        )
        for kind, answer, by_cloud, by_clip, by_mean in says:
            found = counts[kind]
            found["boxes"] += 1
            if kind == "inconsistent":
                found["cloud"] += by_cloud == answer
                found["clip"] += by_clip == answer
                found["mean"] += by_mean == answer
                found["neither"] += answer not in (by_cloud, by_clip)
            else:
                found["right"] += by_cloud == answer
    names = {
        "consistent": ("right",),
        "inconsistent": ("cloud", "clip", "mean", "neither"),
        "private": ("right",),
    }
    return {
        kind: {name: round(found[name] / found["boxes"], 4) for name in names[kind]}
        for kind, found in counts.items()
        if found["boxes"]
    }


def overlapped_truth_labels(boxes: Tensor, truth: Truth, background: int) -> Tensor:
    """[N] labels of boxes [N, 4]: of the truth box each overlaps most, at IoU .5 or
    more, else ``background``.
    """
    if not len(truth.boxes):
        return torch.full((len(boxes),), background)
    overlap, best = box_iou(boxes, truth.boxes).max(1)
    return torch.where(overlap >= IOU, truth.labels[best], background)
