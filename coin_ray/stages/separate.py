"""Separate: the CLIP detector's results on the training images, and what they and the cloud's make together.

Training separates again at every step; this table is the view before distillation, for the report and for comparison.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import torch

from coin_ray import storage, tables
from coin_ray.fusion.separate import separate
from coin_ray.stages.knowledge import collected, corrected, image_rows, opinions
from coin_ray.stages.predicting import predictions
from coin_ray.stages.propagate import WEIGHTS
from coin_ray.steps import Context
from coin_ray.structures import Detections, Separation

BLOCK = 1024


def run(context: Context) -> dict[str, Any]:
    """Write ``clip_detector.parquet`` and ``separation.parquet``. The metrics count what the teachers say; reviewed images are a kind of their own."""
    config = context.config
    images = image_rows(context.inputs["images"], "train")
    weights = {"clip_detector": storage.join(context.inputs["propagate"], WEIGHTS)}
    found = predictions(weights, images, config)["clip_detector"]
    storage.write_table(storage.join(context.folder, "clip_detector.parquet"), found)
    clip = tables.read_detections(found, len(config.classes))
    cloud = collected(context.inputs["collect"], "cloud", config)
    know = opinions(cloud, clip, context.inputs["collect"], config)
    reviewed = corrected(context.inputs, config)
    blocks, rows, counts = [], list[dict[str, Any]](), {"consistent": 0, "inconsistent": 0, "private": 0}
    for number, image in enumerate(images):
        image_id = str(image["image_id"])
        person = reviewed.get(image_id)
        if person is not None:
            rows.append(_row(image_id, Separation.of_labels(person, reviewed=True)))
        elif image_id in cloud:
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + number)
            known = know(image_id)
            theirs = Detections.cat([known["clip"], known["clip_labels"]])
            parts = separate(known["cloud"], theirs, config.separate, fuse_boxes=True, generator=generator)
            for kind in counts:
                counts[kind] += len(getattr(parts, kind))
            rows.append(_row(image_id, parts))
        if len(rows) == BLOCK:  # Python's lists take nine times the memory of a table
            blocks.append(pa.Table.from_pylist(rows, schema=tables.SEPARATION))
            rows = []
    blocks.append(pa.Table.from_pylist(rows, schema=tables.SEPARATION))
    storage.write_table(storage.join(context.folder, "separation.parquet"), pa.concat_tables(blocks))
    return {"separation": counts}


def _row(image_id: str, parts: Separation) -> dict[str, Any]:
    pairs = (parts.consistent, parts.inconsistent)
    nothing = torch.zeros_like(parts.private.probs)
    return {
        "image_id": image_id,
        "boxes": torch.cat([*(p.boxes for p in pairs), parts.private.boxes]).tolist(),
        "kind": ["reviewed" if parts.reviewed else "consistent"] * len(pairs[0])
        + ["inconsistent"] * len(pairs[1])
        + ["private"] * len(parts.private),
        "cloud_probs": torch.cat([*(p.cloud.probs for p in pairs), parts.private.probs]).tolist(),
        "clip_probs": torch.cat([*(p.clip.probs for p in pairs), nothing]).tolist(),
    }
