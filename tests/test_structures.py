from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import detections

from coin_ray.structures import Detections, Pairs, Targets

GOOD: dict[str, Any] = {
    "boxes": torch.zeros(2, 4),
    "scores": torch.zeros(2),
    "labels": torch.zeros(2, dtype=torch.int64),
    "probs": torch.zeros(2, 3),
}


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("boxes", torch.zeros(2, 5)),
        ("boxes", torch.zeros(3, 4)),
        ("boxes", torch.zeros(8)),
        ("scores", torch.zeros(3)),
        ("scores", torch.zeros(2, 1)),
        ("labels", torch.zeros(1, dtype=torch.int64)),
        ("probs", torch.zeros(3, 3)),
        ("probs", torch.zeros(2)),
    ],
)
def test_wrong_shapes_are_refused_and_shown(field: str, wrong: torch.Tensor) -> None:
    Detections(**GOOD)
    with pytest.raises(ValueError, match=r"\[N, 4\], \[N\], \[N\], \[N, K\+1\]"):
        Detections(**(GOOD | {field: wrong}))


def test_index_by_mask_rows_and_slice() -> None:
    three = detections(
        ([0, 0, 1, 1], 0, 0.9), ([0, 0, 2, 2], 1, 0.8), ([0, 0, 3, 3], 2, 0.7)
    )
    assert three[three.scores > 0.75].labels.tolist() == [0, 1]
    assert three[torch.tensor([2, 0])].labels.tolist() == [2, 0]
    assert three[1:].boxes.tolist() == [[0, 0, 2, 2], [0, 0, 3, 3]]
    assert three.num_classes == 3


def test_empty_and_cat() -> None:
    empty, single = Detections.empty(3), detections(([0, 0, 1, 1], 1, 0.9))
    assert (len(empty), empty.num_classes, empty.labels.dtype) == (0, 3, torch.int64)
    joined = Detections.cat([empty, single, single])
    assert joined.labels.tolist() == [1, 1]
    assert joined.probs.shape == (2, 4)
    assert len(Pairs.empty(3)) == 0


def test_with_boxes_keeps_the_rest() -> None:
    single = detections(([0, 0, 1, 1], 1, 0.9))
    moved = single.with_boxes(single.boxes + 5)
    assert moved.boxes.tolist() == [[5, 5, 6, 6]]
    assert moved.probs is single.probs


def test_pairs_are_indexed_together() -> None:
    cloud = detections(([0, 0, 1, 1], 0, 0.9), ([0, 0, 2, 2], 1, 0.8))
    clip = detections(([0, 0, 1, 2], 2, 0.5), ([0, 0, 2, 1], 1, 0.4))
    second = Pairs(cloud.boxes, cloud, clip)[torch.tensor([1])]
    assert (
        second.boxes.tolist(),
        second.cloud.labels.tolist(),
        second.clip.boxes.tolist(),
    ) == ([[0, 0, 2, 2]], [1], [[0, 0, 2, 1]])


def test_targets_tell_wrong_shapes():
    boxes, probs = torch.zeros(2, 4), torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"\[N, 4\], \[N, K\+1\], \[N\], \[M, 4\]"):
        Targets(boxes, probs, torch.ones(3), torch.zeros(0, 4))


def test_targets_from_labels_are_certain():
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [1.0, 1.0, 2.0, 2.0]])
    targets = Targets.from_labels(boxes, torch.tensor([2, 0]), 3)
    assert targets.probs.tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]
    assert targets.weights.tolist() == [1, 1]
    assert targets.labels.tolist() == [2, 0]
    assert targets.ignored.shape == (0, 4)
    assert targets.num_classes == 3
