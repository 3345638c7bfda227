"""The gallery's pictures: which images are shown, and each method's boxes in them."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torchvision.ops import box_iou

from coin_ray import storage, tables
from coin_ray.config import PipelineConfig
from coin_ray.data.canonical import decode_rgb
from coin_ray.data.pixels import IntensityRange
from coin_ray.evaluation.operating import ImageCounts, regression_by_image
from coin_ray.report.gallery import Box, GalleryImage
from coin_ray.runs.steps import Context
from coin_ray.stages.common.image_tables import (
    ImageRow,
    open_annotations,
    read_image_rows,
    read_images,
)
from coin_ray.stages.evaluate import PredictionsByMethod
from coin_ray.stages.separate import SeparationRow
from coin_ray.structures import Detections
from coin_ray.tables import Truth

TEST_IMAGES = 12
TRAINING_IMAGES = 12
WORST_IMAGES = 6
LONG_SIDE = 640
"""Pixels of a picture's longer side, at most."""
DEFAULT_THRESHOLDS = {
    "cloud": 0.3,
    "clip_labels": 0.3,
    "clip_detector": 0.4,
    "student": 0.4,
}
"""Scores from which boxes are drawn, where there is no truth to find a better one."""
IOU = 0.5
T = TypeVar("T")


@dataclass(frozen=True)
class GalleryInputs:
    """``predictions``: what each method predicts, by image id. ``thresholds``: scores
    from which its boxes are drawn. ``counts``: of annotated test images, by method.
    """

    predictions: PredictionsByMethod
    thresholds: Mapping[str, float]
    truth: Mapping[str, Truth]
    counts: Mapping[str, ImageCounts]


class SelectedImage(NamedTuple):
    """An image of the gallery: its group and a note."""

    row: ImageRow
    group: str
    note: str = ""


def make_gallery_inputs(
    context: Context[PipelineConfig],
    predictions: PredictionsByMethod,
    operating_points: Mapping[str, Mapping[str, float]],
    counts: Mapping[str, ImageCounts],
) -> GalleryInputs:
    """Return the inputs of the gallery; boxes are drawn from the scores of the operating
    points, where those are known.
    """
    thresholds = {
        name: operating_points.get(name, {}).get("score", default)
        for name, default in DEFAULT_THRESHOLDS.items()
    }
    drawn = {
        name: by_image for name, by_image in predictions.items() if name in thresholds
    }
    truth = open_annotations(context.inputs["images"])
    return GalleryInputs(drawn, thresholds, truth, counts)


def make_gallery(
    context: Context[PipelineConfig], inputs: GalleryInputs
) -> list[GalleryImage]:
    """Return the test images on which the student is worst against the cloud, further
    ones evenly spread, and training images with their kinds of boxes.
    """
    test_rows = read_image_rows(context.inputs["images"], "test")
    worst = _select_worst(test_rows, inputs)
    worst_ids = {selected.row["image_id"] for selected in worst}
    other_rows = [row for row in test_rows if row["image_id"] not in worst_ids]
    further = _spread_evenly(other_rows, TEST_IMAGES)
    training_count = TRAINING_IMAGES + TEST_IMAGES - len(further)
    training = _select_training_images(context, training_count)
    separation = _read_separation(context, training)
    images = [
        *worst,
        *(SelectedImage(row, "test") for row in further),
        *(SelectedImage(row, "train") for row in training),
    ]
    return [
        _gallery_image(image, inputs, separation, context.config) for image in images
    ]


def _select_training_images(
    context: Context[PipelineConfig], count: int
) -> list[ImageRow]:
    """Return so many training images that have separated boxes, evenly spread."""
    images = read_images(context.inputs["images"], "train")
    blocks = storage.stream_table(_separation_uri(context), ["image_id"])
    chunks = [chunk for block in blocks for chunk in block["image_id"].chunks]
    separated_ids = pa.chunked_array(chunks, pa.string())
    separated = images.filter(pc.is_in(images["image_id"], value_set=separated_ids))
    positions = _spread_evenly(range(len(separated)), count)
    rows: list[ImageRow] = separated.take(positions).to_pylist()
    return rows


def _read_separation(
    context: Context[PipelineConfig], rows: Sequence[ImageRow]
) -> dict[str, SeparationRow]:
    """Return the separation of these images by image id."""
    image_ids = pa.array([row["image_id"] for row in rows], pa.string())
    separated = cast(
        "Iterator[SeparationRow]",
        tables.stream_rows(_separation_uri(context), image_ids),
    )
    return {row["image_id"]: row for row in separated}


def _separation_uri(context: Context[PipelineConfig]) -> str:
    return storage.join(context.inputs["separate"], "separation.parquet")


def _select_worst(
    test_rows: Sequence[ImageRow], inputs: GalleryInputs
) -> list[SelectedImage]:
    """Return the images with the largest loss, worst first, with a note on what changed."""
    if not {"cloud", "student"} <= set(inputs.counts):
        return []
    student = inputs.counts["student"]
    cloud = inputs.counts["cloud"]
    rows = {row["image_id"]: row for row in test_rows}
    annotated_ids = sorted(image_id for image_id in rows if image_id in inputs.truth)
    loss = regression_by_image(student, cloud)
    worst_first = np.argsort(-loss, kind="stable")[:WORST_IMAGES]
    selected = []
    for number in worst_first.tolist():
        if loss[number] <= 0:
            continue
        note = (
            f"Of {student.truth[number]} objects the cloud finds"
            f" {cloud.detected[number]}, the student {student.detected[number]}; wrong boxes:"
            f" cloud {cloud.wrong[number]}, student {student.wrong[number]}"
        )
        selected.append(SelectedImage(rows[annotated_ids[number]], "worst", note))
    return selected


def _spread_evenly(rows: Sequence[T], count: int) -> list[T]:
    count = min(count, len(rows))
    return [rows[number * len(rows) // count] for number in range(count)]


def _gallery_image(
    image: SelectedImage,
    inputs: GalleryInputs,
    separation: Mapping[str, SeparationRow],
    config: PipelineConfig,
) -> GalleryImage:
    image_id = image.row["image_id"]
    uri = image.row["uri"]
    truth = inputs.truth.get(image_id)
    detections = _visible_detections(image_id, inputs)
    layers = {
        name: _detection_boxes(visible, config) for name, visible in detections.items()
    }
    if truth is not None:
        layers["truth"] = _truth_boxes(truth, config)
    if image.group == "train":
        layers["separation"] = _separation_boxes(separation[image_id], config)
    jpeg, width, height = _read_thumbnail(uri, config.intensity_range)
    return GalleryImage(
        jpeg,
        width,
        height,
        uri.rpartition("/")[2],
        layers,
        image.group,
        image.note,
        find_disagreements(detections, truth),
    )


def _visible_detections(image_id: str, inputs: GalleryInputs) -> dict[str, Detections]:
    """Return the detections above each method's threshold."""
    detections = {
        name: by_image[image_id]
        for name, by_image in inputs.predictions.items()
        if image_id in by_image
    }
    visible = {}
    for name, in_image in detections.items():
        # rows of clip_labels are the cloud's boxes
        scored = detections["cloud"] if name == "clip_labels" else in_image
        threshold_name = "cloud" if name == "clip_labels" else name
        visible[name] = in_image[scored.scores >= inputs.thresholds[threshold_name]]
    return visible


def find_disagreements(
    detections: Mapping[str, Detections], truth: Truth | None
) -> tuple[str, ...]:
    """Return which differ on this image: ``teachers`` (labels of one box), ``student``
    (and the cloud), and by the truth ``worse``, ``better`` than the cloud.
    """
    cloud = detections.get("cloud")
    clip = detections.get("clip_labels")
    student = detections.get("student")
    disagreements = []
    if cloud is not None and clip is not None and _labels_differ(cloud, clip):
        disagreements.append("teachers")
    if cloud is None or student is None:
        return tuple(disagreements)
    if not (_matched(cloud, student).all() and _matched(student, cloud).all()):
        disagreements.append("student")
    if truth is not None:
        objects = _truth_as_detections(truth, cloud.num_classes)
        found_by_student = int(_matched(objects, student).sum())
        found_by_cloud = int(_matched(objects, cloud).sum())
        if found_by_student > found_by_cloud:
            disagreements.append("better")
        elif found_by_student < found_by_cloud:
            disagreements.append("worse")
    return tuple(disagreements)


def _labels_differ(cloud: Detections, clip: Detections) -> bool:
    return bool((cloud.labels != clip.labels).any())


def _truth_as_detections(truth: Truth, num_classes: int) -> Detections:
    count = len(truth.boxes)
    return Detections(
        truth.boxes,
        torch.ones(count),
        truth.labels,
        torch.zeros(count, num_classes + 1),
    )


def _matched(boxes: Detections, others: Detections) -> torch.Tensor:
    """Return for each box [N] whether a box of the same label among the others overlaps
    it.
    """
    if not len(boxes) or not len(others):
        return torch.zeros(len(boxes), dtype=torch.bool)
    same_label = boxes.labels[:, None] == others.labels[None]
    overlaps = box_iou(boxes.boxes, others.boxes) > IOU
    matched: torch.Tensor = (same_label & overlaps).any(1)
    return matched


def _detection_boxes(detections: Detections, config: PipelineConfig) -> list[Box]:
    names = (*config.classes, "background")
    return [
        _box(box, names[int(label)], float(score))
        for box, label, score in zip(
            detections.boxes.tolist(), detections.labels, detections.scores, strict=True
        )
    ]


def _truth_boxes(truth: Truth, config: PipelineConfig) -> list[Box]:
    return [
        _box(box, config.classes[int(label)])
        for box, label in zip(truth.boxes.tolist(), truth.labels, strict=True)
    ]


def _separation_boxes(row: SeparationRow, config: PipelineConfig) -> list[Box]:
    names = (*config.classes, "background")
    boxes = []
    for box, kind, cloud_label, clip_label in zip(
        row["boxes"], row["kind"], row["cloud_labels"], row["clip_labels"], strict=True
    ):
        label = names[cloud_label]
        if kind == "inconsistent":
            label = f"{names[cloud_label]} / {names[clip_label]}"
        boxes.append(_box(box, label, None, kind))
    return boxes


def _box(
    box: list[float], label: str, score: float | None = None, kind: str = ""
) -> Box:
    x1, y1, x2, y2 = box
    return Box((x1, y1, x2, y2), label, score, kind)


def _read_thumbnail(
    uri: str, intensity_range: IntensityRange | None
) -> tuple[bytes, int, int]:
    """Return a JPEG of at most ``LONG_SIDE`` pixels, and width and height of the
    original, in which boxes are drawn.
    """
    image = decode_rgb(storage.read_bytes(uri), intensity_range)
    width, height = image.size
    image.thumbnail((LONG_SIDE, LONG_SIDE))
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=85)
    return encoded.getvalue(), width, height
