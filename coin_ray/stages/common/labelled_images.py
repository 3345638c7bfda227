"""Labelled images of a step's folder, as supervised training and its evaluation read
them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from coin_ray import storage
from coin_ray.data.examples import Example
from coin_ray.data.pixels import IntensityRange
from coin_ray.errors import InputError
from coin_ray.stages.common.image_tables import ImageRow, open_annotations
from coin_ray.structures import Detections
from coin_ray.tables import Truth

logger = logging.getLogger(__name__)
THINNEST = 0.01
"""Sides of a box in pixels up to which it has no area: resizing and mirroring could
lose it."""
VALIDATION_STRIDE = 10
"""Without val images one of so many training images is used for validation."""


@dataclass(frozen=True)
class AnnotatedImages:
    """Rows of the images table that have annotations, and these by image id."""

    rows: list[ImageRow]
    truth: dict[str, Truth]


def read_labelled_images(images_folder: str, split: str) -> AnnotatedImages:
    """Return the annotated images of ``train``, ``val`` or ``test``. If there are no
    annotated val images, a part of the training images takes their place.
    """
    annotations = open_annotations(images_folder)
    images = storage.read_table(storage.join(images_folder, "images.parquet"))
    annotated: list[ImageRow] = [
        row for row in images.to_pylist() if row["image_id"] in annotations
    ]
    has_validation = any(row["split"] == "val" for row in annotated)
    if split == "test" or has_validation:
        rows = [row for row in annotated if row["split"] == split]
    else:
        validates = split == "val"
        rows = [
            row
            for row in annotated
            if row["split"] == "train"
            and is_validation_image(row["image_id"]) == validates
        ]
    truth = {row["image_id"]: annotations[row["image_id"]] for row in rows}
    return AnnotatedImages(rows, truth)


def is_validation_image(image_id: str) -> bool:
    """Return whether a training image is used for validation; its id alone decides."""
    return int(image_id[:8], 16) % VALIDATION_STRIDE == 0


def build_labelled_examples(
    images: AnnotatedImages,
    classes: Sequence[str],
    intensity_range: IntensityRange | None = None,
) -> list[Example]:
    """Return examples with ``labels`` of score 1 and ``ignored``, the difficult boxes.
    Boxes without an area inside their image are left out with a warning.
    ``intensity_range``: of deep grey images.

    Raises InputError where nothing could be learned.
    """
    examples = []
    class_counts = torch.zeros(len(classes), dtype=torch.int64)
    empty_boxes = []
    for row in images.rows:
        truth = images.truth[row["image_id"]]
        boxes = _clip_to_image(truth.boxes, row["width"], row["height"])
        has_area = (boxes[:, 2:] - boxes[:, :2] > THINNEST).all(1)
        empty_boxes += [
            f"{row['uri']}: {box}" for box in truth.boxes[~has_area].tolist()
        ]
        required = has_area & ~truth.difficult
        ignored = has_area & truth.difficult
        class_counts += torch.bincount(truth.labels[required], minlength=len(classes))
        detections = {
            "labels": _as_detections(boxes, truth, required, len(classes)),
            "ignored": _as_detections(boxes, truth, ignored, len(classes)),
        }
        examples.append(
            Example(
                row["image_id"],
                row["uri"],
                detections,
                intensity_range=intensity_range,
            )
        )
    if empty_boxes:
        logger.warning(
            "%d boxes have no area inside their image and are left out, the first"
            " one %s",
            len(empty_boxes),
            empty_boxes[0],
        )
    _check_trainable(examples, class_counts, classes)
    return examples


def _clip_to_image(boxes: torch.Tensor, width: int, height: int) -> torch.Tensor:
    clipped = boxes.clone()
    clipped[:, 0::2] = clipped[:, 0::2].clamp(0, width)
    clipped[:, 1::2] = clipped[:, 1::2].clamp(0, height)
    return clipped


def _check_trainable(
    examples: Sequence[Example], class_counts: torch.Tensor, classes: Sequence[str]
) -> None:
    if not examples:
        raise InputError(
            "no training image has annotations: --data needs read_labelled_images images"
            " (docs/formats.md), not a plain folder"
        )
    counts = class_counts.tolist()
    absent = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if absent:
        raise InputError(
            f"no training image has a box of {', '.join(absent)} (of {len(examples)}"
            f" annotated images, {sum(counts)} boxes). Leave such classes out of"
            " --classes, or give images that show them"
        )


def _as_detections(
    boxes: torch.Tensor, truth: Truth, mask: torch.Tensor, num_classes: int
) -> Detections:
    labels = truth.labels[mask]
    probs = torch.nn.functional.one_hot(labels, num_classes + 1).float()
    return Detections(boxes[mask], torch.ones(len(labels)), labels, probs)
