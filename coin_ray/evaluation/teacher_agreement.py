"""Two teachers' names for the same boxes: which they exchange, and with whom a fusion
of both sides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from torch import Tensor

from coin_ray.evaluation.voc import Integers

PAIRED_KINDS = ("consistent", "inconsistent")


def teacher_confusion(separation: Iterable[pa.Table], classes: int) -> Integers:
    """Boxes [K+1, K+1] that both teachers saw, by the cloud's name (row) and CLIP's
    (column); background last. Of ``SEPARATION`` tables.
    """
    counts = np.zeros((classes + 1, classes + 1), np.int64)
    for table in separation:
        chosen = _of_kinds(table, PAIRED_KINDS)
        cloud, clip = (
            pc.list_flatten(table[name]).filter(chosen).to_numpy()
            for name in ("cloud_labels", "clip_labels")
        )
        np.add.at(counts, (cloud, clip), 1)
    return counts


def paired_probabilities(
    separation: pa.Table, classes: int, kinds: Sequence[str] = PAIRED_KINDS
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The cloud's and CLIP's probabilities [N, K+1] of boxes of these kinds in a
    ``SEPARATION`` table.
    """
    chosen = _of_kinds(separation, kinds).to_numpy().astype(bool)
    cloud, clip = (
        pc.list_flatten(pc.list_flatten(separation[name]))
        .to_numpy()
        .reshape(-1, classes + 1)[chosen]
        for name in ("cloud_probs", "clip_probs")
    )
    return cloud, clip


def _of_kinds(separation: pa.Table, kinds: Sequence[str]) -> pa.ChunkedArray:
    return pc.is_in(pc.list_flatten(separation["kind"]), value_set=pa.array(kinds))


def ckg_agreement_rates(
    cloud: Tensor, clip: Tensor, fused: Tensor, answers: Tensor
) -> dict[str, dict[str, float]]:
    """On boxes that the teachers name differently: the share of each ``side`` that the
    fused name takes, and how often it is right there.

    Three opinions [N, K+1] and the true names [N] (K: background). Sides: cloud, clip,
    neither; one that is never taken has no ``right``.
    """
    if not len(answers):
        return {}
    # a box is the cloud's word that there is something
    ours, theirs, chosen = cloud[:, :-1].argmax(1), clip.argmax(1), fused.argmax(1)
    disputed = ours != theirs
    total = int(disputed.sum())
    taken = {
        "cloud": chosen == ours,
        "clip": chosen == theirs,
        "neither": (chosen != ours) & (chosen != theirs),
    }
    found: dict[str, dict[str, float]] = {}
    for name, mask in taken.items() if total else ():
        mine = mask & disputed
        count = int(mine.sum())
        found[name] = {"share": count / total}
        if count:
            found[name]["right"] = int((chosen == answers)[mine].sum()) / count
    return found
