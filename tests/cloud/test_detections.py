"""Detections of answers as Arrow columns."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from coin_ray import tables
from coin_ray.cloud.detections import detection_columns, vectors_column
from coin_ray.cloud.probabilities import CloudDetections

COLUMNS = ("boxes", "scores", "labels", "probs", "prob_source")
ONE_BOX = CloudDetections(
    np.array([[1, 2, 30, 40]], np.float32),
    np.array([0.75], np.float32),
    np.array([1]),
    np.array([[0.125, 0.75, 0.125]], np.float32),
    ("label_prior",),
)
NO_BOX = CloudDetections.empty(2)


@pytest.mark.parametrize(
    "images", [[], [NO_BOX], [ONE_BOX], [NO_BOX, ONE_BOX, NO_BOX, ONE_BOX]]
)
def test_columns_equal_those_made_of_python_lists(
    images: list[CloudDetections],
) -> None:
    rows = [
        {
            "boxes": image.boxes.tolist(),
            "scores": image.scores.tolist(),
            "labels": image.labels.tolist(),
            "probs": image.probs.tolist(),
            "prob_source": list(image.prob_sources),
        }
        for image in images
    ]
    schema = pa.schema([tables.DETECTIONS.field(name) for name in COLUMNS])
    columns = detection_columns(images)
    table = pa.table({name: columns[name] for name in COLUMNS}, schema=schema)
    table.validate(full=True)
    assert table.equals(pa.Table.from_pylist(rows, schema=schema))


def test_vectors_of_different_lengths() -> None:
    vectors = [
        np.zeros((0, 3), np.float32),
        np.array([[0.5, 0.25, 0.25]], np.float32),
        np.ones((2, 3), np.float32),
    ]
    column = vectors_column(vectors)
    column.validate(full=True)
    assert column.type == tables.VECTORS
    assert column.to_pylist() == [v.tolist() for v in vectors]
