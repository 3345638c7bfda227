from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from coin_ray.cloud.probabilities import fuse_duplicates, to_detections
from coin_ray.cloud.protocol import RawDetections
from coin_ray.structures import Detections

BOX = [0.0, 0.0, 10.0, 10.0]


def raw(scores: list[list[float]] | np.ndarray) -> RawDetections:
    class_scores = np.asarray(scores, np.float32)
    return RawDetections(np.tile(np.array(BOX, np.float32), (len(class_scores), 1)), class_scores, "per_class")


def single(boxes: list[list[float]], scores: list[float], labels: list[int]) -> Detections:
    rows = np.zeros((len(scores), 3), np.float32)
    rows[np.arange(len(scores)), labels] = scores
    return to_detections(RawDetections(np.array(boxes, np.float32).reshape(-1, 4), rows, "label"), "background")


EXAMPLES = [
    ([0.3], "background", [0.3, 0.7]),
    ([0.3, 0.05], "background", [0.287, 0.048, 0.665]),
    ([0.9, 0.88], "background", [0.5, 0.488, 0.012]),
    ([0.0, 0.0], "background", [0, 0, 1]),
    ([1.0, 1.0], "background", [0.5, 0.5, 0]),
    ([0.3], "published", [1, 0]),
    ([0.3, 0.05], "published", [0.857, 0.143, 0]),
    ([0.0, 0.0], "published", [0.5, 0.5, 0]),
]


@pytest.mark.parametrize(("scores", "kind", "expected"), EXAMPLES)
def test_examples(scores: list[float], kind: str, expected: list[float]) -> None:
    detections = to_detections(raw([scores]), kind)  # type: ignore[arg-type]
    assert torch.allclose(detections.probs[0], torch.tensor(expected).float(), atol=6e-4)
    assert detections.scores[0] == pytest.approx(max(scores))


SCORES = arrays(np.float32, st.tuples(st.integers(0, 6), st.integers(1, 5)), elements=st.floats(0, 1, width=32))


@settings(max_examples=150, deadline=None)
@given(SCORES, st.sampled_from(["background", "published"]))
def test_probabilities_are_distributions_that_keep_label_and_rank(scores: np.ndarray, kind: str) -> None:
    detections = to_detections(raw(scores), kind)  # type: ignore[arg-type]
    assert detections.probs.shape == (scores.shape[0], scores.shape[1] + 1)
    assert torch.allclose(detections.probs.sum(1), torch.ones(len(scores)), atol=1e-5)
    assert (detections.probs >= 0).all()
    foreground = detections.probs[:, :-1]
    assert torch.allclose(foreground.gather(1, detections.labels[:, None])[:, 0], foreground.amax(1), atol=1e-6)
    assert (detections.scores.diff() <= 0).all()
    assert np.allclose(np.sort(scores.max(1, initial=0))[::-1], detections.scores.numpy())
    if kind == "published":
        assert (detections.probs[:, -1] == 0).all()


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_a_higher_score_means_less_background(low: float, high: float, other: float) -> None:
    low, high = sorted((low, high))
    background = [float(to_detections(raw([[s, other]]), "background").probs[0, -1]) for s in (low, high)]
    assert background[1] <= background[0] + 1e-6


def test_one_class_keeps_its_rank_when_published() -> None:
    detections = to_detections(raw([[0.2], [0.9]]), "published")
    assert detections.scores.tolist() == pytest.approx([0.9, 0.2])
    assert detections.probs.tolist() == [[1, 0], [1, 0]]


def test_no_detections() -> None:
    none = to_detections(raw(np.zeros((0, 3))), "background")
    assert none.probs.shape == (0, 4)
    assert len(fuse_duplicates(none, 0.6)) == 0


def test_duplicates_become_the_weighted_mean() -> None:
    detections = single([[0, 0, 10, 10], [0, 0, 10, 12], [0, 0, 10, 11], [50, 50, 60, 60]], [0.8, 0.2, 0.9, 0.4], [0, 0, 1, 0])
    fused = fuse_duplicates(detections, 0.6)
    assert fused.labels.tolist() == [1, 0, 0]
    assert fused.scores.tolist() == pytest.approx([0.9, 0.8, 0.4])
    assert fused.boxes[1].tolist() == pytest.approx([0, 0, 10, 10.4])
    assert torch.equal(fused.probs[1], detections.probs[1])


def test_overlap_must_exceed_the_limit() -> None:
    halves = single([[0, 0, 10, 10], [0, 0, 10, 5]], [0.8, 0.7], [0, 0])
    assert len(fuse_duplicates(halves, 0.5)) == 2
    assert len(fuse_duplicates(halves, 0.49)) == 1


def test_boxes_without_score_are_kept_finite() -> None:
    fused = fuse_duplicates(single([BOX, BOX], [0, 0], [0, 0]), 0.6)
    assert fused.boxes.tolist() == [BOX]


BOXES = st.lists(
    st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(1, 8), st.integers(1, 8), st.floats(0.01, 1), st.integers(0, 2)),
    max_size=10,
)


@settings(max_examples=100, deadline=None)
@given(BOXES)
def test_fusion_keeps_the_best_of_each_class_and_stays_inside(rows: list[tuple[int, int, int, int, float, int]]) -> None:
    detections = single([[x, y, x + w, y + h] for x, y, w, h, _, _ in rows], [r[4] for r in rows], [r[5] for r in rows])
    fused = fuse_duplicates(detections, 0.5)
    assert len(fused) <= len(detections)
    assert set(fused.labels.tolist()) == set(detections.labels.tolist())
    for label in set(detections.labels.tolist()):
        assert fused.scores[fused.labels == label].max() == detections.scores[detections.labels == label].max()
    if len(fused):
        assert (fused.boxes.amin(0) >= detections.boxes.amin(0) - 1e-4).all()
        assert (fused.boxes.amax(0) <= detections.boxes.amax(0) + 1e-4).all()
