"""Labelled images of a step's folder, as supervised training and its evaluation read
them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from coin_ray import storage
from coin_ray.data.examples import Example
from coin_ray.errors import InputError
from coin_ray.structures import Detections
from coin_ray.tables import Truth, TruthTable

logger = logging.getLogger(__name__)
THINNEST = 0.01
"""Sides of a box in pixels up to which it has no area: resizing and mirroring could
lose it."""
HELD_OUT = 10
"""Without val images one of so many training images is held out."""


@dataclass(frozen=True)
class Labelled:
    """Rows of the images table that have annotations, and these by image id."""

    rows: list[dict[str, Any]]
    truth: dict[str, Truth]


def labelled(folder: str, split: str) -> Labelled:
    """Of ``train``, ``val`` or ``test``; a val part of the training images if there are
    no annotated val images.
    """
    truth = TruthTable(storage.join(folder, "annotations.parquet"))
    rows = [
        r
        for r in storage.read_table(storage.join(folder, "images.parquet")).to_pylist()
        if r["image_id"] in truth
    ]
    if split != "test" and not any(r["split"] == "val" for r in rows):
        chosen = [
            r
            for r in rows
            if r["split"] == "train"
            and held_out(str(r["image_id"])) == (split == "val")
        ]
    else:
        chosen = [r for r in rows if r["split"] == split]
    return Labelled(
        chosen, {str(r["image_id"]): truth[str(r["image_id"])] for r in chosen}
    )


def held_out(image_id: str) -> bool:
    return int(image_id[:8], 16) % HELD_OUT == 0


def training_examples(found: Labelled, classes: Sequence[str]) -> list[Example]:
    """``labels`` with score 1 and ``ignored``, boxes that are difficult; boxes without
    an area inside their image are left out and told.

    Raises InputError where nothing could be learned.
    """
    examples, counts, empty = [], torch.zeros(len(classes), dtype=torch.int64), []
    for row in found.rows:
        truth = found.truth[str(row["image_id"])]
        boxes = truth.boxes.clone()
        boxes[:, 0::2] = boxes[:, 0::2].clamp(0, row["width"])
        boxes[:, 1::2] = boxes[:, 1::2].clamp(0, row["height"])
        good = (boxes[:, 2:] - boxes[:, :2] > THINNEST).all(1)
        empty += [f"{row['uri']}: {box}" for box in truth.boxes[~good].tolist()]
        required, left = good & ~truth.difficult, good & truth.difficult
        counts += torch.bincount(truth.labels[required], minlength=len(classes))
        knowledge = {
            "labels": _as_detections(boxes, truth, required, len(classes)),
            "ignored": _as_detections(boxes, truth, left, len(classes)),
        }
        examples.append(Example(str(row["image_id"]), str(row["uri"]), knowledge))
    if empty:
        logger.warning(
            "%d boxes have no area inside their image and are left out, the first"
            " one %s",
            len(empty),
            empty[0],
        )
    _check(examples, counts, classes)
    return examples


def _check(
    examples: Sequence[Example], counts: torch.Tensor, classes: Sequence[str]
) -> None:
    if not examples:
        raise InputError(
            "no training image has annotations: --data needs labelled images"
            " (docs/formats.md), not a plain folder"
        )
    absent = [
        name for name, count in zip(classes, counts.tolist(), strict=True) if not count
    ]
    if absent:
        raise InputError(
            f"no training image has a box of {', '.join(absent)} (of {len(examples)}"
            f" annotated images, {int(counts.sum())} boxes). Leave such classes out of"
            " --classes, or give images that show them"
        )


def _as_detections(
    boxes: torch.Tensor, truth: Truth, kept: torch.Tensor, classes: int
) -> Detections:
    labels = truth.labels[kept]
    return Detections(
        boxes[kept],
        torch.ones(len(labels)),
        labels,
        torch.nn.functional.one_hot(labels, classes + 1).float(),
    )
