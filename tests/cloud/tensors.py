"""Detections of clouds as tensors, which are easier to compare."""

from __future__ import annotations

from typing import Any

import torch

from coin_ray.cloud import probabilities
from coin_ray.cloud.probabilities import CloudDetections, ProbSource
from coin_ray.cloud.protocol import RawDetections
from coin_ray.fusion import box_clusters
from coin_ray.structures import Detections


def as_tensors(detections: CloudDetections) -> Detections:
    return Detections(
        torch.from_numpy(detections.boxes),
        torch.from_numpy(detections.scores),
        torch.from_numpy(detections.labels),
        torch.from_numpy(detections.probs),
    )


def to_detections(
    raw: RawDetections, *options: Any, **named_options: Any
) -> tuple[Detections, list[ProbSource]]:
    detections = probabilities.to_detections(raw, *options, **named_options)
    return as_tensors(detections), list(detections.prob_sources)


def merge_duplicates(
    detections: Detections, iou_threshold: float
) -> tuple[Detections, torch.Tensor]:
    boxes, rows = box_clusters.merge_duplicates(
        detections.boxes.numpy(),
        detections.scores.numpy(),
        detections.labels.numpy(),
        iou_threshold,
    )
    selected = detections[torch.from_numpy(rows)]
    return selected.with_boxes(torch.from_numpy(boxes)), torch.from_numpy(rows)
