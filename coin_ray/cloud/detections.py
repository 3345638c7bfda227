"""Conversion of the clouds' answers to the detections that CLIP labels, and their Arrow
columns. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from coin_ray import tables
from coin_ray.cloud.answer import Answer
from coin_ray.cloud.ensemble import cloud_names
from coin_ray.cloud.label_map import Prior
from coin_ray.cloud.probabilities import (
    CloudDetections,
    merge_cross_class_duplicates,
    to_detections,
)
from coin_ray.cloud.services import adapter_for, label_map_for
from coin_ray.config import Cloud, PipelineConfig
from coin_ray.fusion.box_clusters import merge_duplicates


@dataclass(frozen=True, slots=True)
class ScoreInterpretation:
    """How the scores of an answer are converted to probabilities; the parameters of
    ``to_detections``.
    """

    prior: Prior
    score_min: float
    each_class_asked: bool

    @classmethod
    def for_cloud(cls, cloud: Cloud, classes: Sequence[str]) -> ScoreInterpretation:
        label_map = label_map_for(cloud, classes)
        capabilities = adapter_for(cloud).capabilities
        # an http service returns class scores only where its answer contains them
        each_class_asked = capabilities.per_class_scores and cloud.service != "http"
        return cls(
            label_map.prior if label_map is not None else Prior(),
            max(cloud.score_min, capabilities.score_min),
            each_class_asked,
        )

    @classmethod
    def for_fused_clouds(
        cls, interpretations: Sequence[ScoreInterpretation]
    ) -> ScoreInterpretation:
        """Return the interpretation of boxes fused from several clouds, without a
        prior: what is known of one cloud's labels does not hold for them.
        """
        return cls(
            Prior(),
            max(i.score_min for i in interpretations),
            all(i.each_class_asked for i in interpretations),
        )


class AnswerConverter:
    """Converts answers of a configuration's clouds to detections."""

    def __init__(self, config: PipelineConfig) -> None:
        self._num_classes = len(config.classes)
        self._fuse_iou = config.collect.fuse_iou
        names = cloud_names(config.clouds)
        self._interpretations = {
            name: ScoreInterpretation.for_cloud(cloud, config.classes)
            for name, cloud in zip(names, config.clouds, strict=True)
        }

    def convert(self, answer: Answer) -> CloudDetections:
        """Return the detections of an answer; none if it has no result."""
        if answer.raw is None:
            return CloudDetections.empty(self._num_classes)
        interpretation = self._interpretation(answer.teachers)
        unmerged = to_detections(
            merge_cross_class_duplicates(answer.raw),
            interpretation.prior,
            interpretation.score_min,
            each_class_asked=interpretation.each_class_asked,
        )
        return merge_detections(unmerged, self._fuse_iou)

    def _interpretation(self, clouds: Sequence[str]) -> ScoreInterpretation:
        """Return how scores from these clouds are interpreted; no name: the first."""
        interpretations = [self._interpretations[name] for name in clouds]
        if not interpretations:
            return next(iter(self._interpretations.values()))
        if len(interpretations) == 1:
            return interpretations[0]
        return ScoreInterpretation.for_fused_clouds(interpretations)


def merge_detections(
    detections: CloudDetections, iou_threshold: float
) -> CloudDetections:
    """Merge duplicates of one class (``merge_duplicates``): a merged detection has the
    score, probabilities and source of the best one.
    """
    boxes, rows = merge_duplicates(
        detections.boxes, detections.scores, detections.labels, iou_threshold
    )
    if len(rows) == len(detections):
        return detections
    return CloudDetections(
        boxes,
        detections.scores[rows],
        detections.labels[rows],
        detections.probs[rows],
        tuple(detections.prob_sources[row] for row in rows),
    )


def detection_columns(images: Sequence[CloudDetections]) -> dict[str, pa.Array]:
    """Return the columns boxes, scores, labels, probs and prob_source of a
    ``DETECTIONS`` table, one row per image.
    """
    offsets = _list_offsets([len(image) for image in images])
    coordinates = pa.array(_concatenate([image.boxes for image in images], np.float32))
    boxes = pa.FixedSizeListArray.from_arrays(coordinates, type=tables.BOXES.value_type)
    sources = [source for image in images for source in image.prob_sources]
    flat = {
        "boxes": boxes,
        "scores": pa.array(
            _concatenate([image.scores for image in images], np.float32)
        ),
        "labels": pa.array(_concatenate([image.labels for image in images], np.int64)),
        "prob_source": pa.array(sources, pa.string()),
    }
    columns = {
        name: pa.ListArray.from_arrays(
            offsets, column, tables.DETECTIONS.field(name).type
        )
        for name, column in flat.items()
    }
    return columns | {"probs": vectors_column([image.probs for image in images])}


def vectors_column(vectors: Sequence[NDArray[np.float32]]) -> pa.Array:
    """Return a column of type ``tables.VECTORS`` from the array [N, D] of each image."""
    lengths = np.repeat(
        [rows.shape[1] for rows in vectors], [len(rows) for rows in vectors]
    )
    flat = pa.array(_concatenate(vectors, np.float32))
    rows = pa.ListArray.from_arrays(
        _list_offsets(lengths), flat, tables.VECTORS.value_type
    )
    row_counts = [len(rows) for rows in vectors]
    return pa.ListArray.from_arrays(_list_offsets(row_counts), rows, tables.VECTORS)


def _concatenate(
    arrays: Sequence[NDArray[np.generic]], dtype: type
) -> NDArray[np.generic]:
    """Return all elements of the arrays, one after another."""
    flat = [array.reshape(-1) for array in arrays]
    return np.concatenate([np.zeros(0, dtype), *flat]).astype(dtype, copy=False)


def _list_offsets(lengths: Sequence[int] | NDArray[np.int64]) -> pa.Array:
    ends = np.cumsum(lengths, dtype=np.int32)
    return pa.array(np.concatenate([np.zeros(1, np.int32), ends]))
