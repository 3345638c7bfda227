"""Corrections: what people say of training images. It outranks every teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from coin_ray import storage, tables
from coin_ray.cloud.label_map import LabelMap
from coin_ray.data.review import corrections
from coin_ray.runs.steps import Context
from coin_ray.structures import Detections
from coin_ray.tables import Provenance, detections_row

FILE = "corrections.parquet"


def run(context: Context) -> dict[str, Any]:
    """Write ``corrections.parquet``: certain detections of the reviewed images. Raises
    InputError for what does not fit the run.
    """
    places, classes = context.config.corrections, context.config.classes
    reviews = [review for place in places for review in corrections.read(place)]
    listed = storage.read_table(
        storage.join(context.inputs["images"], "images.parquet")
    ).to_pylist()
    # the first row counts: a training image may be a test image too
    images = {row["image_id"]: row for row in reversed(listed)}
    asked = LabelMap.of_classes(classes)
    named = {
        name: asked.find([name])
        for review in reviews
        for name in {box.label for box in review.boxes}
    }
    indexes = {name: match[0] for name, match in named.items() if match is not None}
    rows = corrections.checked(reviews, images, indexes, ", ".join(places))
    found = [
        detections_row(
            row["image_id"], _certain(row, len(classes)), Provenance("person")
        )
        for row in rows
    ]
    storage.write_table(
        storage.join(context.folder, FILE), tables.detections_table(found)
    )
    return {
        "images": len(rows),
        "boxes": sum(len(row["boxes"]) for row in rows),
        "empty": sum(not row["boxes"] for row in rows),
    }


def _certain(row: dict[str, Any], classes: int) -> Detections:
    labels = torch.tensor(row["labels"], dtype=torch.int64)
    boxes = torch.tensor(row["boxes"], dtype=torch.float32).reshape(-1, 4)
    return Detections(
        boxes, torch.ones(len(labels)), labels, F.one_hot(labels, classes + 1).float()
    )
