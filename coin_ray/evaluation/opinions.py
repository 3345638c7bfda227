"""Two teachers' names for the same boxes: which they exchange, and with whom a fusion of both sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from coin_ray.evaluation.voc import Integers

PAIRED = ("consistent", "inconsistent")


def confusion(separation: Sequence[Mapping[str, Any]], classes: int) -> Integers:
    """Boxes [K+1, K+1] that both teachers saw, by the cloud's name (row) and CLIP's (column); background last. Of ``SEPARATION`` rows."""
    counts = np.zeros((classes + 1, classes + 1), np.int64)
    for row in separation:
        for kind, cloud, clip in zip(row["kind"], row["cloud_probs"], row["clip_probs"], strict=True):
            if kind in PAIRED:
                counts[int(np.argmax(cloud)), int(np.argmax(clip))] += 1
    return counts


def sides(cloud: Tensor, clip: Tensor, fused: Tensor, answers: Tensor) -> dict[str, dict[str, float]]:
    """On boxes that the teachers name differently: the share of each ``side`` that the fused name takes, and how often it is right there.

    Three opinions [N, K+1] and the true names [N] (K: background). Sides: cloud, clip, neither; one that is never taken has no ``right``.
    """
    ours, theirs, chosen = (p.argmax(1) for p in (cloud, clip, fused))
    disputed = ours != theirs
    total = int(disputed.sum())
    taken = {"cloud": chosen == ours, "clip": chosen == theirs, "neither": (chosen != ours) & (chosen != theirs)}
    found: dict[str, dict[str, float]] = {}
    for name, mask in taken.items() if total else ():
        mine = mask & disputed
        count = int(mine.sum())
        found[name] = {"share": count / total}
        if count:
            found[name]["right"] = int((chosen == answers)[mine].sum()) / count
    return found
