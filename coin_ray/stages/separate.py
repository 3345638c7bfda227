"""Separate: the CLIP detector's results on the training images, and what they and the
cloud's make together.

Training separates again at every step; this table is the view before distillation, for
the report and for comparison.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from coin_ray import storage, tables
from coin_ray.data.review.record import KINDS
from coin_ray.fusion.separate import separate
from coin_ray.runs.steps import Context
from coin_ray.stages.common.prediction import write_predictions
from coin_ray.stages.common.teacher_outputs import (
    collected,
    corrected,
    image_table,
    opinions,
)
from coin_ray.stages.propagate import WEIGHTS
from coin_ray.structures import Detections, Separation


def run(context: Context) -> dict[str, Any]:
    """Write ``clip_detector.parquet`` and ``separation.parquet``. The metrics count
    what the teachers say; reviewed images are a kind of their own.
    """
    config = context.config
    images = image_table(context.inputs["images"], "train")
    weights = {"clip_detector": storage.join(context.inputs["propagate"], WEIGHTS)}
    write_predictions(weights, images, config, context.folder)
    place = storage.join(context.folder, "separation.parquet")
    with storage.table_writer(place, tables.SEPARATION) as table:
        for block in tables.blocks(
            _rows(context, images["image_id"]), tables.SEPARATION
        ):
            table.write(block)
    counts: Counter[str] = Counter()
    for block in storage.stream_table(place, ["kind"]):
        counts.update(pc.list_flatten(block["kind"]).to_pylist())
    return {"separation": {kind: counts[kind] for kind in KINDS}}


def _rows(context: Context, images: pa.ChunkedArray) -> Iterator[dict[str, Any]]:
    """Of each image that a person has labelled or the cloud has answered."""
    config = context.config
    clip = tables.open_detections(
        storage.join(context.folder, "clip_detector.parquet"), len(config.classes)
    )
    cloud = collected(context.inputs["collect"], "cloud", config)
    know = opinions(cloud, clip, context.inputs["collect"], config)
    reviewed = corrected(context.inputs, config)
    for number, image in enumerate(images):
        image_id = image.as_py()
        person = reviewed.get(image_id)
        if person is not None:
            yield _row(image_id, Separation.of_labels(person, reviewed=True))
        elif image_id in cloud:
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + number)
            known = know(image_id)
            theirs = Detections.cat([known["clip"], known["clip_labels"]])
            yield _row(
                image_id,
                separate(
                    known["cloud"],
                    theirs,
                    config.separate,
                    fuse_boxes=True,
                    generator=generator,
                ),
            )


def _row(image_id: str, parts: Separation) -> dict[str, Any]:
    pairs = (parts.consistent, parts.inconsistent)
    nothing, nobody = (
        torch.zeros_like(parts.private.probs),
        torch.full_like(parts.private.labels, tables.NOBODY),
    )
    return {
        "image_id": image_id,
        "boxes": torch.cat([*(p.boxes for p in pairs), parts.private.boxes]).tolist(),
        "kind": (
            ["reviewed" if parts.reviewed else "consistent"] * len(pairs[0])
            + ["inconsistent"] * len(pairs[1])
            + ["private"] * len(parts.private)
        ),
        "cloud_labels": (
            torch.cat([*(p.cloud.labels for p in pairs), parts.private.labels]).tolist()
        ),
        "clip_labels": torch.cat([*(p.clip.labels for p in pairs), nobody]).tolist(),
        "cloud_probs": (
            torch.cat([*(p.cloud.probs for p in pairs), parts.private.probs]).tolist()
        ),
        "clip_probs": torch.cat([*(p.clip.probs for p in pairs), nothing]).tolist(),
    }
