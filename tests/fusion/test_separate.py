"""The published cases of knowledge separation (docs: coin-method section 4).
Coordinates are whole numbers, so that geometry is exact."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import Row, detections, sorted_rows
from hypothesis import given
from hypothesis import strategies as st

from coin_ray import boxes as box_ops
from coin_ray.config import Separate
from coin_ray.fusion.separate import separate_knowledge
from coin_ray.fusion.vectors import CLOUD_VECTOR_FORMS, one_hot
from coin_ray.structures import Detections, Separation

RULES = Separate(
    iou_min=0.5, clip_score_min=0.05, lone_clip_score=0.8, lone_cloud_consistent=True
)
LEFT, LEFT_MOVED, RIGHT, FAR = (
    (0, 0, 20, 20),
    (0, 0, 20, 18),
    (100, 0, 140, 40),
    (0, 200, 30, 230),
)


def _split(
    cloud: Detections,
    clip: Detections,
    *,
    fuse: bool = False,
    seed: int = 0,
    **changes: Any,
) -> Separation:
    return separate_knowledge(
        cloud,
        clip,
        replace(RULES, **changes),
        fuse_boxes=fuse,
        generator=torch.Generator().manual_seed(seed),
    )


def _counts(parts: Separation) -> tuple[int, int, int]:
    return len(parts.consistent), len(parts.inconsistent), len(parts.private)


def test_both_empty() -> None:
    assert _counts(_split(detections(), detections())) == (0, 0, 0)


def test_cloud_empty_sure_results_are_consistent() -> None:
    parts = _split(
        detections(), detections((LEFT, 0, 0.81), (RIGHT, 1, 0.8), (FAR, 2, 0.3))
    )
    assert _counts(parts) == (1, 0, 2)
    assert parts.consistent.boxes.tolist() == [list(LEFT)]
    assert (
        parts.consistent.cloud.labels.tolist()
        == parts.consistent.clip.labels.tolist()
        == [0]
    )
    assert parts.private.labels.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("believed", "expected"), [(True, (2, 0, 0)), (False, (0, 0, 2))]
)
def test_clip_empty(believed: bool, expected: tuple[int, int, int]) -> None:
    cloud = detections((LEFT, 0, 0.3), (RIGHT, 1, 0.9))
    parts = _split(cloud, detections((LEFT, 0, 0.04)), lone_cloud_consistent=believed)
    assert _counts(parts) == expected
    assert (
        parts.consistent.boxes if believed else parts.private.boxes
    ).tolist() == cloud.boxes.tolist()


def test_agreement_contradiction_and_lonely_results() -> None:
    cloud = detections((LEFT, 0, 0.9), (RIGHT, 1, 0.8), (FAR, 2, 0.7))
    clip = detections(
        (LEFT_MOVED, 0, 0.6), (RIGHT, 2, 0.5), ((300, 300, 320, 320), 1, 0.4)
    )
    parts = _split(cloud, clip)
    assert _counts(parts) == (1, 1, 2)
    assert (
        parts.consistent.cloud.scores.tolist(),
        parts.consistent.clip.scores.tolist(),
    ) == (
        pytest.approx([0.9]),
        pytest.approx([0.6]),
    )
    assert (
        parts.inconsistent.cloud.labels.tolist(),
        parts.inconsistent.clip.labels.tolist(),
    ) == ([1], [2])
    assert sorted(parts.private.labels.tolist()) == [1, 2]


@pytest.mark.parametrize(("side", "matches"), [(10, True), (9, False)])
def test_the_threshold_itself_matches(side: int, matches: bool) -> None:
    """IoU of [0, 20] x [0, 20] with [0, 20] x [0, side] is side / 20."""
    parts = _split(detections((LEFT, 0, 0.9)), detections(((0, 0, 20, side), 0, 0.9)))
    assert _counts(parts) == ((1, 0, 0) if matches else (0, 0, 2))


def test_matching_is_many_to_many() -> None:
    """Two cloud boxes (IoU .9 with each other) and two CLIP boxes, all overlapping:
    four pairs."""
    cloud = detections((LEFT, 0, 0.9), ((0, 0, 18, 20), 1, 0.8))
    clip = detections(((0, 0, 20, 19), 0, 0.7), ((0, 1, 20, 20), 1, 0.6))
    parts = _split(cloud, clip, fuse=True)
    assert _counts(parts) == (2, 2, 0)
    label_pairs = sorted(
        zip(
            parts.inconsistent.cloud.labels.tolist(),
            parts.inconsistent.clip.labels.tolist(),
            strict=True,
        )
    )
    assert label_pairs == [(0, 1), (1, 0)]


def test_box_with_several_classes_takes_the_one_the_cloud_gave() -> None:
    clip = detections((LEFT_MOVED, 1, 0.6), (LEFT_MOVED, 0, 0.2), (LEFT_MOVED, 2, 0.1))
    parts = _split(detections((LEFT, 0, 0.9)), clip)
    assert _counts(parts) == (1, 0, 0)
    assert parts.consistent.clip.scores.tolist() == pytest.approx([0.2])


def test_box_with_several_classes_none_of_them_the_clouds() -> None:
    clip = detections((LEFT_MOVED, 1, 0.6), (LEFT_MOVED, 2, 0.3))
    separations = [
        _split(detections((LEFT, 0, 0.9)), clip, seed=seed) for seed in range(20)
    ]
    assert {_counts(r) for r in separations} == {(0, 1, 0)}
    assert {int(r.inconsistent.clip.labels[0]) for r in separations} == {1, 2}


def test_box_with_several_classes_meets_only_the_surest_cloud_box() -> None:
    cloud = detections(((0, 0, 20, 16), 1, 0.5), (LEFT, 0, 0.9))
    parts = _split(cloud, detections((LEFT_MOVED, 1, 0.6), (LEFT_MOVED, 0, 0.3)))
    assert _counts(parts) == (1, 0, 1)
    assert parts.consistent.cloud.labels.tolist() == [0]
    assert parts.private.labels.tolist() == [1]


def test_unmatched_box_with_several_classes_is_private_once() -> None:
    clip = detections((FAR, 1, 0.6), (FAR, 2, 0.3))
    separations = [
        _split(detections((LEFT, 0, 0.9)), clip, seed=seed) for seed in range(20)
    ]
    assert {_counts(r) for r in separations} == {(0, 0, 2)}
    assert {tuple(r.private.labels.tolist()) for r in separations} == {(0, 1), (0, 2)}


TWO_NAMES = detections((LEFT, 0, 0.9), (LEFT, 1, 0.8))


@pytest.mark.parametrize(
    ("clip", "consistent", "inconsistent"),
    [
        pytest.param([(LEFT_MOVED, 1, 0.7)], [(1, 1)], [], id="clip confirms one name"),
        pytest.param(
            [(LEFT_MOVED, 2, 0.7)], [], [(0, 2), (1, 2)], id="clip confirms neither"
        ),
        pytest.param(
            [(LEFT_MOVED, 0, 0.7), ((0, 0, 18, 20), 1, 0.6)],
            [],
            [(0, 1), (1, 0)],
            id="clip contradicts itself",
        ),
    ],
)
def test_two_cloud_names_for_one_object(
    clip: list[Row],
    consistent: list[tuple[int, int]],
    inconsistent: list[tuple[int, int]],
) -> None:
    parts = _split(TWO_NAMES, detections(*clip), fuse=True)

    def names(kind: Any) -> list[tuple[int, int]]:
        return sorted(
            zip(kind.cloud.labels.tolist(), kind.clip.labels.tolist(), strict=True)
        )

    assert (names(parts.consistent), names(parts.inconsistent)) == (
        consistent,
        inconsistent,
    )
    assert len(parts.private) == 0


def test_doubles_are_judged_by_the_surest_name_whatever_the_order() -> None:
    """95 % overlap, but only the surer one reaches the second CLIP box."""
    cloud = detections(((0, 0, 100, 100), 0, 0.9), ((0, 0, 100, 96), 1, 0.8))
    clip = detections(((0, 0, 100, 100), 1, 0.7), ((0, 50, 100, 100), 0, 0.6))
    for order in ([0, 1], [1, 0]):
        parts = _split(cloud[torch.tensor(order)], clip, fuse=True)
        assert _counts(parts) == (0, 1, 0)
        assert parts.inconsistent.cloud.labels.tolist() == [0]


def test_cloud_box_with_agreement_and_contradiction_is_consistent_only() -> None:
    """Both pairs have the cloud's box if boxes are not fused: the inconsistent one is
    dropped."""
    clip = detections((LEFT_MOVED, 0, 0.6), ((0, 0, 18, 20), 1, 0.7))
    cloud = detections((LEFT, 0, 0.9))
    assert _counts(_split(cloud, clip)) == (1, 0, 0)
    assert _counts(_split(cloud, clip, fuse=True)) == (1, 1, 0)


@pytest.mark.parametrize(("label", "kind"), [(0, "consistent"), (1, "inconsistent")])
def test_of_pairs_with_one_box_a_random_one_stays(label: int, kind: str) -> None:
    clip = detections((LEFT_MOVED, label, 0.6), ((0, 0, 18, 20), label, 0.7))
    cloud = detections((LEFT, 0, 0.9))
    pairs = [getattr(_split(cloud, clip, seed=seed), kind) for seed in range(20)]
    assert {len(p) for p in pairs} == {1}
    assert {round(float(p.clip.scores[0]), 3) for p in pairs} == {0.6, 0.7}


def test_fused_boxes_are_means_weighted_by_score() -> None:
    """(.75 x 20 + .25 x 12) / 1 = 18."""
    parts = _split(
        detections((LEFT, 0, 0.75)), detections(((0, 0, 12, 20), 0, 0.25)), fuse=True
    )
    assert parts.consistent.boxes.tolist() == [[0, 0, 18, 20]]
    parts = _split(
        detections(((0, 0, 10, 10), 0, 0.6)),
        detections(((1, 2, 11, 12), 1, 0.3)),
        fuse=True,
    )
    torch.testing.assert_close(
        parts.inconsistent.boxes, torch.tensor([[1 / 3, 2 / 3, 31 / 3, 32 / 3]])
    )


def test_the_published_form_of_the_cloud_moves_fused_boxes_and_private_vectors() -> (
    None
):
    """A label without score counts 1: (1 x 20 + .25 x 10) / 1.25 = 18."""
    cloud, clip = (
        detections((LEFT, 0, 0.5), (FAR, 1, 0.5)),
        detections(((0, 0, 10, 20), 0, 0.25)),
    )
    parts = _split(one_hot(cloud), clip, fuse=True)
    assert parts.consistent.boxes.tolist() == [[0, 0, 18, 20]]
    assert parts.consistent.cloud.scores.tolist() == [1]
    assert parts.private.probs.tolist() == [[0, 1, 0, 0]]
    assert _split(cloud, clip, fuse=True).private.probs.tolist() == [
        pytest.approx([1 / 6, 0.5, 1 / 6, 1 / 6])
    ]


corner = st.integers(0, 6).map(lambda n: n * 8)
extent = st.integers(2, 6).map(lambda n: n * 8)
score = st.integers(6, 99).map(lambda n: n / 100)


def _rows(limit: int) -> st.SearchStrategy[list[Row]]:
    row = st.tuples(st.tuples(corner, corner, extent, extent), st.integers(0, 2), score)
    boxed = row.map(
        lambda r: ((r[0][0], r[0][1], r[0][0] + r[0][2], r[0][1] + r[0][3]), r[1], r[2])
    )
    return st.lists(boxed, max_size=limit, unique_by=lambda r: r[2])  # type: ignore[return-value]


def _one_class_per_box(rows: list[Row]) -> list[Row]:
    return list({tuple(row[0]): row for row in rows}.values())


def _as_sets(parts: Separation) -> list[list[tuple[float, ...]]]:
    sets = []
    for pairs in (parts.consistent, parts.inconsistent):
        cloud, clip = pairs.cloud, pairs.clip
        rows = sorted_rows(
            pairs.boxes, cloud.labels, cloud.scores, clip.labels, clip.scores
        )
        sets.append(rows)
    private = parts.private
    sets.append(sorted_rows(private.boxes, private.labels, private.scores))
    return sets


@given(_rows(6), _rows(8), st.booleans())
def test_same_seed_same_separation(
    cloud: list[Row], clip: list[Row], fuse: bool
) -> None:
    first, second = (
        _as_sets(_split(detections(*cloud), detections(*clip), fuse=fuse, seed=3))
        for _ in range(2)
    )
    assert first == second


@given(_rows(6), _rows(8).map(_one_class_per_box), st.randoms(use_true_random=False))
def test_order_of_results_does_not_matter(
    cloud: list[Row], clip: list[Row], draw: Any
) -> None:
    """Up to which of several pairs with one box is drawn. (Of a CLIP box with several
    classes, one is drawn too: left out here.)"""
    shuffled = draw.sample(cloud, len(cloud)), draw.sample(clip, len(clip))
    first = _split(detections(*cloud), detections(*clip), fuse=True)
    second = _split(detections(*shuffled[0]), detections(*shuffled[1]), fuse=True)
    for kind in ("consistent", "inconsistent", "private"):
        assert sorted_rows(getattr(first, kind).boxes) == sorted_rows(
            getattr(second, kind).boxes
        )


@given(_rows(6), _rows(8))
def test_mirrored_images_separate_alike(cloud: list[Row], clip: list[Row]) -> None:
    cloud_detections, clip_detections = detections(*cloud), detections(*clip)
    mirrored = _split(
        cloud_detections.with_boxes(box_ops.mirror_boxes(cloud_detections.boxes, 128)),
        clip_detections.with_boxes(box_ops.mirror_boxes(clip_detections.boxes, 128)),
        seed=5,
    )
    plain = _split(cloud_detections, clip_detections, seed=5)
    back = Separation(
        *(
            replace(p, boxes=box_ops.mirror_boxes(p.boxes, 128))
            for p in (mirrored.consistent, mirrored.inconsistent)
        ),
        mirrored.private.with_boxes(box_ops.mirror_boxes(mirrored.private.boxes, 128)),
    )
    assert _as_sets(back) == _as_sets(plain)


@given(_rows(6), _rows(8), st.booleans())
def test_kinds_keep_their_promise(
    cloud: list[Row], clip: list[Row], fuse: bool
) -> None:
    parts = _split(detections(*cloud), detections(*clip), fuse=fuse)
    assert torch.equal(parts.consistent.cloud.labels, parts.consistent.clip.labels)
    assert not bool(
        (parts.inconsistent.cloud.labels == parts.inconsistent.clip.labels).any()
    )
    boxes = [
        tuple(b)
        for kind in (parts.consistent, parts.inconsistent)
        for b in kind.boxes.tolist()
    ]
    assert len(boxes) == len(set(boxes))


@given(
    _rows(6),
    _rows(8).map(_one_class_per_box),
    st.sampled_from(["collected", "normalised"]),
)
def test_one_class_is_never_inconsistent_and_keeps_the_order(
    cloud: list[Row], clip: list[Row], form: str
) -> None:
    cloud_detections, clip_detections = (
        detections(*[(box, 0, s) for box, _, s in rows], classes=1)
        for rows in (cloud, clip)
    )
    parts = _split(CLOUD_VECTOR_FORMS[form](cloud_detections), clip_detections)
    assert len(parts.inconsistent) == 0
    assert set(parts.consistent.cloud.labels.tolist()) <= {0}
    if form == "collected" and len(clip):
        assert set(parts.consistent.cloud.scores.tolist()) <= {
            *cloud_detections.scores.tolist(),
            *clip_detections.scores.tolist(),
        }
