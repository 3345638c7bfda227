from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from coin_ray.cloud import probabilities
from coin_ray.cloud.label_map import Prior
from coin_ray.cloud.probabilities import (
    CloudDetections,
    calibrated_confusion,
    merge_cross_class_duplicates,
)
from coin_ray.cloud.protocol import RawDetections
from coin_ray.structures import Detections
from tests.cloud.tensors import merge_duplicates, to_detections

BOX = [0.0, 0.0, 10.0, 10.0]
PLAIN_PRIOR = Prior()


def _raw_detections(scores: list[list[float]] | np.ndarray) -> RawDetections:
    class_scores = np.asarray(scores, np.float32)
    boxes = np.tile(np.array(BOX, np.float32), (len(class_scores), 1))
    return RawDetections(boxes, class_scores, "per_class")


def _detections(
    scored: RawDetections, prior: Prior = PLAIN_PRIOR, score_min: float = 0.0
) -> Detections:
    return to_detections(scored, prior, score_min)[0]


def _merged(detections: Detections, iou: float) -> Detections:
    return merge_duplicates(detections, iou)[0]


def _one_label_detections(
    boxes: list[list[float]], scores: list[float], labels: list[int]
) -> Detections:
    class_scores = np.zeros((len(scores), 3), np.float32)
    class_scores[np.arange(len(scores)), labels] = scores
    xyxy = np.array(boxes, np.float32).reshape(-1, 4)
    return _detections(RawDetections(xyxy, class_scores, "label"))


EXAMPLES = [
    ([0.3], [0.3, 0.7]),
    ([0.3, 0.05], [0.287, 0.048, 0.665]),
    ([0.9, 0.88], [0.5, 0.488, 0.012]),
    ([0.0, 0.0], [0, 0, 1]),
    ([1.0, 1.0], [0.5, 0.5, 0]),
]


@pytest.mark.parametrize(("scores", "expected"), EXAMPLES)
def test_examples(scores: list[float], expected: list[float]) -> None:
    detections = _detections(_raw_detections([scores]))
    assert detections.probs[0].tolist() == pytest.approx(expected, abs=6e-4)
    assert detections.scores[0] == pytest.approx(max(scores))


SCORES = arrays(
    np.float32,
    st.tuples(st.integers(0, 6), st.integers(1, 5)),
    elements=st.floats(0, 1, width=32),
)


@given(SCORES)
def test_probabilities_are_distributions_that_keep_label_and_rank(
    scores: np.ndarray,
) -> None:
    detections = _detections(_raw_detections(scores))
    boxes, classes = scores.shape
    assert detections.probs.shape == (boxes, classes + 1)
    _check_distributions(detections)
    best_scores = np.sort(scores.max(1, initial=0))[::-1]
    assert np.allclose(best_scores, detections.scores.numpy())


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_a_higher_score_means_less_background(
    low: float, high: float, other: float
) -> None:
    low, high = sorted((low, high))
    low_probs = _detections(_raw_detections([[low, other]])).probs[0]
    high_probs = _detections(_raw_detections([[high, other]])).probs[0]
    assert high_probs[-1] <= low_probs[-1] + 1e-6


def test_no_detections() -> None:
    none = _detections(_raw_detections(np.zeros((0, 3))))
    assert none.probs.shape == (0, 4)
    assert len(_merged(none, 0.6)) == 0


def test_duplicates_become_the_weighted_mean() -> None:
    detections = _one_label_detections(
        [[0, 0, 10, 10], [0, 0, 10, 12], [0, 0, 10, 11], [50, 50, 60, 60]],
        [0.8, 0.2, 0.9, 0.4],
        [0, 0, 1, 0],
    )
    fused = _merged(detections, 0.6)
    assert fused.labels.tolist() == [1, 0, 0]
    assert fused.scores.tolist() == pytest.approx([0.9, 0.8, 0.4])
    assert fused.boxes[1].tolist() == pytest.approx([0, 0, 10, 10.4])
    assert torch.equal(fused.probs[1], detections.probs[1])


def test_overlap_must_exceed_the_limit() -> None:
    halves = _one_label_detections([[0, 0, 10, 10], [0, 0, 10, 5]], [0.8, 0.7], [0, 0])
    assert len(_merged(halves, 0.5)) == 2
    assert len(_merged(halves, 0.49)) == 1


def test_boxes_without_score_are_kept_finite() -> None:
    fused = _merged(_one_label_detections([BOX, BOX], [0, 0], [0, 0]), 0.6)
    assert fused.boxes.tolist() == [BOX]


BOXES = st.lists(
    st.tuples(
        st.integers(0, 8),
        st.integers(0, 8),
        st.integers(1, 8),
        st.integers(1, 8),
        st.floats(0.01, 1),
        st.integers(0, 2),
    ),
    max_size=10,
)


@given(BOXES)
def test_fusion_keeps_the_best_of_each_class_and_stays_inside(
    rows: list[tuple[int, int, int, int, float, int]],
) -> None:
    boxes = [[x, y, x + width, y + height] for x, y, width, height, _, _ in rows]
    scores = [score for *_, score, _ in rows]
    labels = [label for *_, label in rows]
    detections = _one_label_detections(boxes, scores, labels)
    fused = _merged(detections, 0.5)
    assert len(fused) <= len(detections)
    assert set(fused.labels.tolist()) == set(labels)
    for label in set(labels):
        best_score = detections.scores[detections.labels == label].max()
        assert fused.scores[fused.labels == label].max() == best_score
    if len(fused):
        assert (fused.boxes.amin(0) >= detections.boxes.amin(0) - 1e-4).all()
        assert (fused.boxes.amax(0) <= detections.boxes.amax(0) + 1e-4).all()


KINDS = ("per_class", "label", "self_reported", "none")
CONFUSION = (
    (0.0, 0.5, 0.1, 0.1, 0.1, 0.2),
    None,
    (0.3, 0.3, 0.2, 0.1, 0.0, 0.1),
    (0.0, 0.0, 0.0, 1.0, 0.0, 0.0),
)
PRIORS = (Prior(), Prior(CONFUSION, (0.9, None, 0.2)))


def _cut_prior(prior: Prior, classes: int) -> Prior:
    """Keep the first ``classes`` labels and columns; the background, last, gets the rest."""
    rows: list[tuple[float, ...] | None] = []
    for row in prior.confusion[:classes]:
        if row is None:
            rows.append(None)
        else:
            rows.append((*row[:classes], row[-1] + sum(row[classes:-1])))
    return Prior(tuple(rows), prior.precision[:classes])


def _one_label_raw(
    scores: np.ndarray, labels: list[int], classes: int, kind: str
) -> RawDetections:
    class_scores = np.zeros((len(labels), classes), np.float32)
    class_scores[np.arange(len(labels)), labels] = 1.0 if kind == "none" else scores
    boxes = np.tile(np.array(BOX, np.float32), (len(labels), 1))
    return RawDetections(boxes, class_scores, kind)  # type: ignore[arg-type]


def _check_distributions(detections: Detections) -> None:
    """Check that the rows are distributions whose best class is the label, sorted by
    score.
    """
    sums = detections.probs.sum(1)
    assert torch.allclose(sums, torch.ones(len(detections)), atol=1e-5)
    assert (detections.probs >= 0).all()
    foreground = detections.probs[:, :-1]
    label_probs = foreground.gather(1, detections.labels[:, None])[:, 0]
    assert torch.allclose(label_probs, foreground.amax(1), atol=1e-6)
    assert (detections.scores.diff() <= 0).all()


def _check_contract(detections: Detections) -> None:
    _check_distributions(detections)
    if detections.num_classes == 1:
        foreground = detections.probs[:, 0]
        assert torch.allclose(foreground, detections.scores, atol=1e-6)


@given(
    SCORES,
    st.sampled_from(KINDS),
    st.sampled_from(PRIORS),
    st.floats(0, 0.5),
)
def test_the_contract_of_every_tier(
    scores: np.ndarray, score_kind: str, prior: Prior, score_min: float
) -> None:
    boxes = _raw_detections(scores).boxes
    scored = RawDetections(boxes, scores, score_kind)  # type: ignore[arg-type]
    cut_prior = _cut_prior(prior, scores.shape[1])
    detections, sources = to_detections(scored, cut_prior, score_min)
    assert len(sources) == len(detections) == len(scores)
    _check_contract(detections)


@given(
    st.lists(
        st.tuples(st.floats(2**-10, 1, width=32), st.integers(0, 3)),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from(KINDS[1:]),
    st.sampled_from(PRIORS),
)
def test_one_label_keeps_its_score_and_its_place(
    rows: list[tuple[float, int]], score_kind: str, prior: Prior
) -> None:
    scores = np.array([score for score, _ in rows], np.float32)
    labels = [label for _, label in rows]
    scored = _one_label_raw(scores, labels, 4, score_kind)
    detections, _ = to_detections(scored, _cut_prior(prior, 4))
    _check_contract(detections)
    best = detections.probs[:, :-1].max(1)
    assert torch.equal(best.indices, detections.labels), (
        "strictly the best class, no tie"
    )
    assert torch.allclose(best.values, detections.scores, atol=1e-6)
    assert sorted(detections.labels.tolist()) == sorted(labels)


@given(
    st.floats(2**-10, 1, width=32),
    st.floats(2**-10, 1, width=32),
    arrays(np.float32, 3, elements=st.floats(0, 1, width=32)),
    st.sampled_from(KINDS[:3]),
    st.sampled_from(PRIORS),
    st.floats(0, 0.5),
)
def test_every_tier_rises_with_the_score(
    low: float,
    high: float,
    others: np.ndarray,
    score_kind: str,
    prior: Prior,
    score_min: float,
) -> None:
    """The first class' probability rises with its score, as long as it is the label."""
    low, high = sorted((low, high))
    if score_kind != "per_class":
        others = np.zeros(3, np.float32)
    probs = []
    for score in (low, high):
        row = np.concatenate([np.array([score], np.float32), np.minimum(others, low)])
        boxes = np.array([BOX], np.float32)
        scored = RawDetections(boxes, row[None], score_kind)  # type: ignore[arg-type]
        probs.append(_detections(scored, _cut_prior(prior, 4), score_min).probs[0])
    low_probs, high_probs = probs
    assert low_probs[0] <= high_probs[0] + 1e-6
    assert low_probs[-1] >= high_probs[-1] - 1e-6


@given(SCORES, st.floats(0, 0.5))
def test_scores_of_several_classes_keep_the_contract_where_some_are_missing(
    scores: np.ndarray, score_min: float
) -> None:
    boxes = _raw_detections(scores).boxes
    known_scores = np.where(scores < score_min, 0, scores).astype(np.float32)
    scored = RawDetections(boxes, known_scores, "label")
    _check_contract(_detections(scored, score_min=score_min))


TIERS = [
    (
        "per_class",
        [0.6, 0.2, 0.1],
        Prior(),
        "native",
        [0.474667, 0.158222, 0.079111, 0.288],
    ),
    (
        "label",
        [0.6, 0.2, 0.0],
        Prior(),
        "grouped",
        [0.505108, 0.168369, 0.010523, 0.316],
    ),
    (
        "label",
        [0.6, 0.0, 0.0],
        Prior(),
        "label_prior",
        [0.6, 0.4 / 3, 0.4 / 3, 0.4 / 3],
    ),
    ("label", [0.1, 0.0, 0.0], Prior(), "label_prior", [0.1, 0.095, 0.095, 0.71]),
    (
        "label",
        [0.6, 0.0, 0.0],
        Prior(((0.5, 0.4, 0.0, 0.1), None, None)),
        "label_confusion",
        [0.6, 0.32, 0.0, 0.08],
    ),
    (
        "label",
        [0.6, 0.0, 0.0],
        Prior(((1.0, 0.0, 0.0, 0.0), None, None)),
        "label_confusion",
        [0.6, 0.0, 0.0, 0.4],
    ),
    (
        "self_reported",
        [0.6, 0.0, 0.0],
        Prior(),
        "self_reported",
        [0.6, 0.4 / 3, 0.4 / 3, 0.4 / 3],
    ),
    (
        "none",
        [1.0, 0.0, 0.0],
        Prior(precision=(0.7, None, None)),
        "precision",
        [0.7, 0.1, 0.1, 0.1],
    ),
    (
        "none",
        [0.5, 0.0, 0.0],
        Prior(precision=(0.7, None, None)),
        "precision",
        [0.35, 0.65 / 3, 0.65 / 3, 0.65 / 3],
    ),
    (
        "none",
        [0.0, 1.0, 0.0],
        Prior(precision=(0.7, None, None)),
        "assumed",
        [0.5 / 3, 0.5, 0.5 / 3, 0.5 / 3],
    ),
]


@pytest.mark.parametrize(("score_kind", "scores", "prior", "source", "expected"), TIERS)
def test_tiers(
    score_kind: str,
    scores: list[float],
    prior: Prior,
    source: str,
    expected: list[float],
) -> None:
    boxes, class_scores = np.array([BOX], np.float32), np.array([scores], np.float32)
    scored = RawDetections(boxes, class_scores, score_kind)  # type: ignore[arg-type]
    detections, sources = to_detections(scored, prior, score_min=0.05)
    assert sources == [source]
    assert detections.probs[0].tolist() == pytest.approx(expected, abs=2e-5)
    label = int(detections.labels[0])
    expected_score = 0.6 if source in ("native", "grouped") else expected[label]
    assert detections.scores[0] == pytest.approx(expected_score)


def test_sources_follow_their_rows() -> None:
    boxes = np.array([BOX, BOX, BOX], np.float32)
    scores = np.array([[0.2, 0, 0], [0.5, 0.4, 0], [0, 0, 0.9]], np.float32)
    prior = Prior((None, None, (0.0, 0.5, 0.0, 0.5)))
    detections, sources = to_detections(RawDetections(boxes, scores, "label"), prior)
    assert detections.labels.tolist() == [2, 0, 0]
    assert sources == ["label_confusion", "grouped", "label_prior"]


def test_where_each_class_is_asked_a_lone_label_says_something_of_the_others() -> None:
    scored = RawDetections(
        np.array([BOX], np.float32), np.array([[0.6, 0, 0]], np.float32), "label"
    )
    detections, sources = to_detections(scored, score_min=0.05, each_class_asked=True)
    background = 0.4 * 0.9875**2
    expected = [(1 - background) * s / 0.625 for s in (0.6, 0.0125, 0.0125)]
    assert sources == ["grouped"]
    assert detections.probs[0].tolist() == pytest.approx(
        [*expected, background], abs=1e-6
    )
    _check_contract(detections)


def _probabilities_of_older_versions(
    scores: np.ndarray,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Convert class scores as older versions did, before there were tiers."""
    clamped = torch.from_numpy(scores).double().clamp(0, 1)
    best = clamped.max(1).values
    background = (1 - clamped).prod(1, keepdim=True)
    shares = clamped / clamped.sum(1, keepdim=True).clamp_min(1e-12)
    foreground = (1 - background) * shares
    probs = torch.cat([foreground, 1 - foreground.sum(1, keepdim=True)], 1)
    order = best.argsort(descending=True, stable=True)
    return best.float()[order], probs.float()[order]


@given(SCORES, st.floats(0, 1))
def test_class_scores_are_read_as_before(scores: np.ndarray, score_min: float) -> None:
    detections = _detections(
        merge_cross_class_duplicates(_raw_detections(scores)), PRIORS[1], score_min
    )
    expected_scores, expected_probs = _probabilities_of_older_versions(scores)
    assert torch.equal(detections.scores, expected_scores)
    # sums of several numbers are rounded in another order
    assert torch.allclose(detections.probs, expected_probs, rtol=0, atol=1e-7)


def _labelled_boxes(*rows: tuple[list[float], int, float]) -> RawDetections:
    scores = np.zeros((len(rows), 3), np.float32)
    for i, (_, label, score) in enumerate(rows):
        scores[i, label] = score
    boxes = np.array([box for box, _, _ in rows], np.float32).reshape(-1, 4)
    return RawDetections(boxes, scores, "label", ("tree",))


def test_labels_of_one_box_are_joined() -> None:
    near, far = [0.0, 0.0, 10.0, 11.0], [30.0, 0.0, 40.0, 10.0]
    merged = merge_cross_class_duplicates(
        _labelled_boxes((BOX, 0, 0.5), (near, 1, 0.6), (far, 2, 0.3), (BOX, 1, 0.2))
    )
    assert merged.boxes.tolist() == [near, far]
    assert merged.class_scores.tolist() == [
        pytest.approx([0.5, 0.6, 0]),
        pytest.approx([0, 0, 0.3]),
    ]
    assert (merged.score_kind, merged.unmapped) == ("label", ("tree",))


def test_boxes_of_one_label_and_distant_ones_are_left_alone() -> None:
    half = [0.0, 0.0, 10.0, 13.0]
    for boxes in (
        _labelled_boxes((BOX, 0, 0.5), (BOX, 0, 0.6)),
        _labelled_boxes((BOX, 0, 0.5), (half, 1, 0.6)),
        _labelled_boxes(),
    ):
        scores = merge_cross_class_duplicates(boxes).class_scores
        assert sorted(scores.tolist()) == sorted(boxes.class_scores.tolist())


@given(BOXES)
def test_joining_keeps_each_label_at_its_best_score(
    rows: list[tuple[int, int, int, int, float, int]],
) -> None:
    labelled = []
    for x, y, width, height, score, label in rows:
        box = [float(x), float(y), float(x + width), float(y + height)]
        labelled.append((box, label, score))
    boxes = _labelled_boxes(*labelled)
    merged = merge_cross_class_duplicates(boxes)
    assert len(merged) <= len(boxes)
    best_scores = boxes.class_scores.max(0, initial=0)
    assert np.array_equal(merged.class_scores.max(0, initial=0), best_scores)
    original_boxes = set(map(tuple, boxes.boxes.tolist()))
    assert set(map(tuple, merged.boxes.tolist())) <= original_boxes


def test_confusion_is_measured_where_each_class_was_scored() -> None:
    measured = probabilities.to_detections(
        _raw_detections([[0.8, 0.4, 0.0], [0.7, 0.5, 0.0], [0.0, 0.0, 0.9]])
    )
    rows = calibrated_confusion([measured, CloudDetections.empty(3)], 3, uniform=1e-6)
    assert rows[1] is None
    for k in (0, 2):
        row = rows[k]
        assert row is not None
        assert sum(row) == pytest.approx(1)
        assert row[k] == 0
    first = rows[0]
    assert first is not None
    assert first[1] > first[3] > first[2]
    scored = RawDetections(
        np.array([BOX], np.float32), np.array([[0.6, 0, 0]], np.float32), "label"
    )
    detections, sources = to_detections(scored, Prior(rows))
    assert sources == ["label_confusion"]
    assert detections.probs[0, 1] > detections.probs[0, 2]


def test_few_boxes_decide_little() -> None:
    measured = probabilities.to_detections(_raw_detections([[0.8, 0.4, 0.0]]))
    steady, eager = (
        calibrated_confusion([measured], 3, uniform=u)[0] for u in (100.0, 1e-6)
    )
    assert steady is not None
    assert eager is not None
    assert abs(steady[1] - 1 / 3) < 0.01 < abs(eager[1] - 1 / 3)


def test_fused_rows_name_where_they_come_from() -> None:
    detections = _one_label_detections(
        [[0, 0, 10, 10], [0, 0, 10, 12], [0, 0, 10, 11], [50, 50, 60, 60]],
        [0.2, 0.8, 0.9, 0.4],
        [0, 0, 1, 0],
    )
    fused, rows = merge_duplicates(detections, 0.6)
    assert torch.equal(detections.scores[rows], fused.scores)
    assert torch.equal(detections.probs[rows], fused.probs)
    assert len(merge_duplicates(Detections.empty(3), 0.6)[1]) == 0
