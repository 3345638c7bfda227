"""Greedy clusters of boxes, and the mean box of a cluster."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from coin_ray.fusion.box_clusters import greedy_clusters, score_weighted_mean

CHAIN = np.array([[True, True, False], [True, True, True], [False, True, True]])
"""Boxes 0 and 2 overlap box 1, but not each other."""


def _rows(overlapping: np.ndarray, scores: list[float]) -> list[tuple[int, list[int]]]:
    clusters = greedy_clusters(overlapping, np.array(scores, np.float32))
    return [(cluster.best, cluster.members.tolist()) for cluster in clusters]


def test_the_best_box_takes_all_that_overlap_it() -> None:
    assert _rows(CHAIN, [0.5, 0.9, 0.7]) == [(1, [0, 1, 2])]
    assert _rows(CHAIN, [0.9, 0.5, 0.7]) == [(0, [0, 1]), (2, [2])]
    assert _rows(CHAIN, [0.5, 0.5, 0.5]) == [(0, [0, 1]), (2, [2])]


def test_a_rejected_cluster_leaves_the_other_boxes_available() -> None:
    clusters = greedy_clusters(
        CHAIN,
        np.array([0.9, 0.8, 0.7], np.float32),
        can_merge=lambda rows: rows.tolist() != [0, 1],
    )
    assert [(c.best, c.members.tolist()) for c in clusters] == [(0, [0]), (1, [1, 2])]


def test_no_boxes_make_no_clusters() -> None:
    assert _rows(np.zeros((0, 0), bool), []) == []


@given(st.integers(0, 12), st.integers(0, 2**31))
def test_each_box_is_in_one_cluster(count: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    overlapping = generator.random((count, count)) < 0.3
    scores = generator.random(count, np.float32)
    clusters = list(greedy_clusters(overlapping, scores))
    rows = [row for cluster in clusters for row in cluster.members.tolist()]
    assert sorted(rows) == list(range(count))
    assert all(cluster.best in cluster.members for cluster in clusters)


def test_the_mean_is_weighted_and_finite_without_scores() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 14]], np.float32)
    weighted = score_weighted_mean(boxes, np.array([0.75, 0.25], np.float32))
    assert weighted.tolist() == [0, 0, 10, 11]
    unweighted = score_weighted_mean(boxes, np.zeros(2, np.float32))
    assert np.array_equal(unweighted, boxes[0])
