"""Separate: the CLIP detector's results on the training images, and what separation
makes of them and the cloud's.

Training separates again at every step; this table shows the state before distillation,
for the report and for comparison.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TypedDict

import pyarrow as pa
import pyarrow.compute as pc
import torch

from coin_ray import storage, tables
from coin_ray.config import PipelineConfig
from coin_ray.data.review.reviews import KINDS
from coin_ray.fusion.separate import separate_knowledge
from coin_ray.runs.steps import Context, Metrics
from coin_ray.stages.common.image_tables import read_images
from coin_ray.stages.common.prediction import write_predictions
from coin_ray.stages.common.teacher_outputs import (
    make_teacher_lookup,
    open_collected,
    open_corrections,
)
from coin_ray.stages.propagate import WEIGHTS
from coin_ray.structures import Detections, Separation


class SeparationRow(TypedDict):
    """One row of ``tables.SEPARATION``."""

    image_id: str
    boxes: list[list[float]]
    kind: list[str]
    cloud_labels: list[int]
    clip_labels: list[int]
    cloud_probs: list[list[float]]
    clip_probs: list[list[float]]


def run(context: Context[PipelineConfig]) -> Metrics:
    """Write ``clip_detector.parquet`` and ``separation.parquet``. The metrics count the
    teachers' boxes by kind; boxes of reviewed images are not counted.
    """
    images = read_images(context.inputs["images"], "train")
    weights = {"clip_detector": storage.join(context.inputs["propagate"], WEIGHTS)}
    write_predictions(weights, images, context.config, context.folder)
    uri = storage.join(context.folder, "separation.parquet")
    rows = _separate_images(context, images["image_id"])
    with storage.table_writer(uri, tables.SEPARATION) as writer:
        for block in tables.iterate_tables(rows, tables.SEPARATION):
            writer.write(block)
    counts: Counter[str] = Counter()
    for block in storage.stream_table(uri, ["kind"]):
        counts.update(pc.list_flatten(block["kind"]).to_pylist())
    return {"separation": {kind: counts[kind] for kind in KINDS}}


def _separate_images(
    context: Context[PipelineConfig], image_ids: pa.ChunkedArray
) -> Iterator[SeparationRow]:
    """Yield a row for each image that a person has labelled or the cloud has answered."""
    config = context.config
    collect_folder = context.inputs["collect"]
    clip_detector = tables.open_detections(
        storage.join(context.folder, "clip_detector.parquet"), len(config.classes)
    )
    cloud = open_collected(collect_folder, "cloud", config)
    look_up = make_teacher_lookup(cloud, clip_detector, collect_folder, config)
    reviewed = open_corrections(context.inputs, config)
    for number, image in enumerate(image_ids):
        image_id = image.as_py()
        correction = reviewed.get(image_id)
        if correction is not None:
            separation = Separation.from_labels(correction, reviewed=True)
            yield _separation_row(image_id, separation)
        elif image_id in cloud:
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + number)
            outputs = look_up(image_id)
            clip = Detections.cat([outputs["clip"], outputs["clip_labels"]])
            separation = separate_knowledge(
                outputs["cloud"],
                clip,
                config.separate,
                fuse_boxes=True,
                generator=generator,
            )
            yield _separation_row(image_id, separation)


def _separation_row(image_id: str, separation: Separation) -> SeparationRow:
    consistent = separation.consistent
    inconsistent = separation.inconsistent
    private = separation.private
    kinds = ["reviewed" if separation.reviewed else "consistent"] * len(consistent)
    kinds += ["inconsistent"] * len(inconsistent)
    kinds += ["private"] * len(private)
    boxes = torch.cat([consistent.boxes, inconsistent.boxes, private.boxes])
    cloud = Detections.cat([consistent.cloud, inconsistent.cloud, private])
    clip_labels = torch.cat(
        [
            consistent.clip.labels,
            inconsistent.clip.labels,
            torch.full_like(private.labels, tables.NO_LABEL),
        ]
    )
    clip_probs = torch.cat(
        [
            consistent.clip.probs,
            inconsistent.clip.probs,
            torch.zeros_like(private.probs),
        ]
    )
    return {
        "image_id": image_id,
        "boxes": boxes.tolist(),
        "kind": kinds,
        "cloud_labels": cloud.labels.tolist(),
        "clip_labels": clip_labels.tolist(),
        "cloud_probs": cloud.probs.tolist(),
        "clip_probs": clip_probs.tolist(),
    }
