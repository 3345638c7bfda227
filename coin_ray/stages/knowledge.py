"""What training reads of the collected tables: thresholds and label choices, applied for free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch.nn import functional as F

from coin_ray import storage, tables
from coin_ray.config import Labels, PipelineConfig
from coin_ray.errors import InputError
from coin_ray.structures import Detections

LabelSource = Literal["clip", "cloud", "truth"]


def image_rows(folder: str, split: str) -> list[dict[str, object]]:
    """Rows of the images table of one split."""
    rows = storage.read_table(storage.join(folder, "images.parquet")).to_pylist()
    return [r for r in rows if r["split"] == split]


def held_out(image_id: str, share: float) -> bool:
    """Whether an image is among the ``share`` of all that a search keeps from training; decided by its id alone."""
    return int(image_id[:8], 16) < share * 16**8


def collected(folder: str, name: str, config: PipelineConfig) -> dict[str, Detections]:
    """All answered images of ``cloud`` or ``clip_labels``, full tail."""
    table = storage.read_table(storage.join(folder, f"{name}.parquet"))
    return tables.read_detections(table, len(config.classes))


def foreground_only(detections: Detections) -> Detections:
    """Class vectors normalised to the foreground, background exactly 0: the published form. Scores keep their rank."""
    foreground = detections.probs[:, :-1] / detections.probs[:, :-1].sum(1, keepdim=True).clamp(min=1e-12)
    return Detections(detections.boxes, detections.scores, detections.labels, F.pad(foreground, (0, 1)))


def cloud_knowledge(cloud: Detections, labels: Labels) -> Detections:
    """The cloud's results that take part in training."""
    kept = cloud[cloud.scores >= labels.score_min]
    return foreground_only(kept) if labels.probabilities == "published" else kept


def clip_labelled(cloud: Detections, clip: Detections, labels: Labels) -> Detections:
    """Cloud boxes above the threshold with CLIP's labels; row i of ``clip`` is CLIP's opinion of row i of ``cloud``."""
    used = (cloud.scores >= labels.score_min) & (clip.scores >= labels.clip_score_min)
    if labels.clip_background == "drop":
        used &= clip.probs.argmax(1) < clip.num_classes
    return clip[used]


def standing_labels(cloud: dict[str, Detections], folder: str, config: PipelineConfig) -> dict[str, Detections]:
    """CLIP's verdicts that stand beside the CLIP detector's results in separation: none, unless ``separate.clip_labels``."""
    if not config.separate.clip_labels or config.collect.labeler == "none":
        return {i: Detections.empty(len(config.classes)) for i in cloud}
    clip = collected(folder, "clip_labels", config)
    return {i: clip_verdicts(cloud[i], clip[i], config.labels) for i in cloud}


def clip_verdicts(cloud: Detections, clip: Detections, labels: Labels) -> Detections:
    """CLIP's opinion of each cloud box above the threshold; ``labels`` is K where CLIP says "background", which no cloud label equals."""
    used = clip[cloud.scores >= labels.score_min]
    best = used.probs.max(1)
    return Detections(used.boxes, best.values, best.indices, used.probs)


def labels_for(
    source: LabelSource, images: Sequence[dict[str, object]], folders: dict[str, str], config: PipelineConfig
) -> dict[str, Detections]:
    """Training labels by image id: CLIP's on cloud boxes (the cloud's own without CLIP), the cloud's, or the truth (the oracle)."""
    if source == "truth":
        return _truth(images, folders["images"], len(config.classes))
    cloud = collected(folders["collect"], "cloud", config)
    wanted = [str(i["image_id"]) for i in images if str(i["image_id"]) in cloud]
    if source == "cloud" or config.collect.labeler == "none":
        return {i: cloud_knowledge(cloud[i], config.labels) for i in wanted}
    clip = collected(folders["collect"], "clip_labels", config)
    return {i: clip_labelled(cloud[i], clip[i], config.labels) for i in wanted}


def _truth(images: Sequence[dict[str, object]], folder: str, classes: int) -> dict[str, Detections]:
    truth = tables.read_truth(storage.read_table(storage.join(folder, "annotations.parquet")))
    wanted = [str(i["image_id"]) for i in images if str(i["image_id"]) in truth]
    if not wanted:
        raise InputError("the oracle baseline needs annotated training images; data.images has no labels in a format of docs/formats.md")
    found = {}
    for i in wanted:
        required = ~truth[i].difficult
        boxes, labels = truth[i].boxes[required], truth[i].labels[required]
        found[i] = Detections(boxes, torch.ones(len(labels)), labels, F.one_hot(labels, classes + 1).float())
    return found
