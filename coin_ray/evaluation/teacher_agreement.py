"""Compare two teachers' labels of the same boxes: which they confuse, and which of the
two CKG agrees with.
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
    """Count the boxes that both teachers found [K+1, K+1] by the cloud's label (row)
    and CLIP's (column), background last, in ``SEPARATION`` tables.
    """
    counts = np.zeros((classes + 1, classes + 1), np.int64)
    for table in separation:
        is_paired = _has_kind(table, PAIRED_KINDS)
        cloud = pc.list_flatten(table["cloud_labels"]).filter(is_paired).to_numpy()
        clip = pc.list_flatten(table["clip_labels"]).filter(is_paired).to_numpy()
        np.add.at(counts, (cloud, clip), 1)
    return counts


def paired_probabilities(
    separation: pa.Table, classes: int, kinds: Sequence[str] = PAIRED_KINDS
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the cloud's and CLIP's probabilities [N, K+1] of boxes of these kinds in a
    ``SEPARATION`` table.
    """
    mask = _has_kind(separation, kinds).to_numpy().astype(bool)
    cloud = _flat_array(separation["cloud_probs"]).reshape(-1, classes + 1)
    clip = _flat_array(separation["clip_probs"]).reshape(-1, classes + 1)
    return cloud[mask], clip[mask]


def _flat_array(column: pa.ChunkedArray) -> NDArray[np.float32]:
    flat: NDArray[np.float32] = pc.list_flatten(pc.list_flatten(column)).to_numpy()
    return flat


def _has_kind(separation: pa.Table, kinds: Sequence[str]) -> pa.ChunkedArray:
    return pc.is_in(pc.list_flatten(separation["kind"]), value_set=pa.array(kinds))


def ckg_agreement_rates(
    cloud: Tensor, clip: Tensor, fused: Tensor, true_labels: Tensor
) -> dict[str, dict[str, float]]:
    """Measure, on boxes that the teachers label differently, the share in which CKG's
    label is that of the cloud, of CLIP or of neither, and how often it is right there.

    Three probability tensors [N, K+1] and the true labels [N] (K: background). A label
    that CKG never takes has no ``right``; without disagreement the result is empty.
    """
    if not len(true_labels):
        return {}
    # the cloud returned the box, so its label is never background
    cloud_labels, clip_labels = cloud[:, :-1].argmax(1), clip.argmax(1)
    fused_labels = fused.argmax(1)
    is_disagreement = cloud_labels != clip_labels
    total = int(is_disagreement.sum())
    if not total:
        return {}
    is_cloud, is_clip = fused_labels == cloud_labels, fused_labels == clip_labels
    masks = {"cloud": is_cloud, "clip": is_clip, "neither": ~is_cloud & ~is_clip}
    rates: dict[str, dict[str, float]] = {}
    for name, mask in masks.items():
        boxes = mask & is_disagreement
        count = int(boxes.sum())
        rates[name] = {"share": count / total}
        if count:
            right_count = int((fused_labels == true_labels)[boxes].sum())
            rates[name]["right"] = right_count / count
    return rates
