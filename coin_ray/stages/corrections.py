"""Corrections: people's labels of training images. They replace every teacher's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.nn import functional as F

from coin_ray import storage, tables
from coin_ray.cloud.label_map import LabelMap
from coin_ray.config import PipelineConfig
from coin_ray.data.review import corrections
from coin_ray.data.review.reviews import Review
from coin_ray.runs.steps import Context, Metrics
from coin_ray.stages.common.image_tables import ImageRow
from coin_ray.structures import Detections
from coin_ray.tables import Provenance, detections_row

CORRECTIONS_FILE = "corrections.parquet"


def run(context: Context[PipelineConfig]) -> Metrics:
    """Write ``corrections.parquet``: certain detections of the reviewed images.

    Images with a region that can't be used are left out, printed and counted. Raises
    InputError for corrections that do not fit the run.
    """
    config = context.config
    sources = config.corrections
    reviews = [
        review for source in sources for review in corrections.read_reviews(source)
    ]
    images = storage.read_table(
        storage.join(context.inputs["images"], "images.parquet")
    )
    # of several rows of an image the first counts: one may be a test image too
    rows_by_id: dict[str, ImageRow] = {
        row["image_id"]: row for row in reversed(images.to_pylist())
    }
    indexes = class_indexes(reviews, config.classes)
    corrected = corrections.correction_rows(
        reviews, rows_by_id, indexes, ", ".join(sources)
    )
    left_out = sum(review.reviewed for review in reviews) - len(corrected)
    rows = [
        detections_row(
            row["image_id"],
            _certain_detections(row["boxes"], row["labels"], len(config.classes)),
            Provenance("person"),
        )
        for row in corrected
    ]
    uri = storage.join(context.folder, CORRECTIONS_FILE)
    storage.write_table(uri, tables.detections_table(rows))
    return {
        "images": len(corrected),
        "boxes": sum(len(row["boxes"]) for row in corrected),
        "empty": sum(not row["boxes"] for row in corrected),
        **({"left_out": left_out} if left_out else {}),
    }


def class_indexes(reviews: Iterable[Review], classes: Sequence[str]) -> dict[str, int]:
    """Return the index of the class by each label that people wrote, as far as it names
    a class.
    """
    label_map = LabelMap.of_classes(classes)
    names = {box.label for review in reviews for box in review.boxes}
    indexes = {}
    for name in names:
        match = label_map.find([name])
        if match is not None:
            indexes[name] = match[0]
    return indexes


def _certain_detections(
    boxes: Sequence[Sequence[float]], labels: Sequence[int], num_classes: int
) -> Detections:
    """Return detections with score and probability 1."""
    label_tensor = torch.tensor(labels, dtype=torch.int64)
    return Detections(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.ones(len(labels)),
        label_tensor,
        F.one_hot(label_tensor, num_classes + 1).float(),
    )
