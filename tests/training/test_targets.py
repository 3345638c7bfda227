from __future__ import annotations

import pytest
import torch
from builders import separation, tiny_config
from torch import Tensor

from coin_ray.structures import Separation
from coin_ray.training.targets import anchor_targets, region_targets

SIZE = (100, 100)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def boxes(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows)


ON_A, ON_B, ON_C, NOWHERE, BETWEEN = (
    (0.0, 0, 20, 20),
    (40.0, 0, 60, 20),
    (0.0, 40, 20, 60),
    (70.0, 70, 90, 90),
    (0.0, 0, 20, 10),
)
KNOWN = separation(
    consistent=[(ON_A, 0, 0.9)], inconsistent=[(ON_B, 1, 0.8)], private=[(ON_C, 2, 0.7)]
)


def test_anchors() -> None:
    anchors = boxes(ON_A, ON_B, ON_C, NOWHERE, BETWEEN, (0, 0, 20, 19))
    found = anchor_targets(anchors, SIZE, KNOWN, tiny_config(), generator())
    assert found.positive.tolist() == [0, 1, 5]
    assert found.boxes.tolist() == [list(ON_A), list(ON_B), list(ON_A)]
    assert found.sampled.tolist() == [0, 1, 5, 3]
    assert found.is_object.tolist() == [1, 1, 1, 0]
    assert found.private.tolist() == [2]
    assert torch.equal(found.private_probs, KNOWN.private.probs)


def test_private_anchors_get_their_own_teachers_probabilities() -> None:
    known = separation(private=[(ON_A, 0, 0.9), (ON_C, 2, 0.7)])
    found = anchor_targets(
        boxes(ON_C, ON_A, NOWHERE), SIZE, known, tiny_config(), generator()
    )
    assert found.private.tolist() == [0, 1]
    assert torch.equal(found.private_probs, known.private.probs[torch.tensor([1, 0])])
    assert found.sampled.tolist() == [2]


def test_anchors_in_the_padding_learn_nothing() -> None:
    found = anchor_targets(
        boxes(NOWHERE, (70, 70, 90, 140), (120, 0, 140, 20)),
        SIZE,
        KNOWN,
        tiny_config(),
        generator(),
    )
    assert found.sampled.tolist() == [0]


def test_a_box_without_area_claims_no_anchor() -> None:
    known = separation(consistent=[(ON_A, 0, 0.9), ((50, 50, 50, 50), 1, 0.9)])
    found = anchor_targets(
        boxes(ON_A, ON_B, NOWHERE), SIZE, known, tiny_config(), generator()
    )
    assert (found.positive.tolist(), found.sampled.tolist()) == ([0], [0, 1, 2])


def test_nothing_known_means_background_everywhere() -> None:
    found = anchor_targets(
        boxes(ON_A, ON_B), SIZE, separation(), tiny_config(), generator()
    )
    assert (
        found.sampled.tolist(),
        found.is_object.tolist(),
        len(found.positive),
        len(found.private),
    ) == ([0, 1], [0, 0], 0, 0)


@pytest.mark.parametrize(
    ("known", "sampled"),
    [
        (separation(), []),
        (separation(private=[(ON_C, 0, 0.9)]), [0, 1]),
        (separation(consistent=[(ON_A, 0, 0.9)]), [0, 1]),
    ],
)
def test_anchors_of_images_in_which_nobody_saw_anything_may_be_left_out(
    known: Separation, sampled: list[int]
) -> None:
    """The published code ignores them; with a private box only, background still is
    background."""
    found = anchor_targets(
        boxes(ON_A, ON_B),
        SIZE,
        known,
        tiny_config(unseen_images="ignored"),
        generator(),
    )
    assert found.sampled.tolist() == sampled


def test_where_a_person_saw_nothing_there_is_background() -> None:
    known = Separation.from_labels(separation().private, reviewed=True)
    found = anchor_targets(
        boxes(ON_A, ON_B),
        SIZE,
        known,
        tiny_config(unseen_images="ignored"),
        generator(),
    )
    assert (found.sampled.tolist(), found.is_object.tolist()) == ([0, 1], [0, 0])
    assert known.to(torch.device("cpu")).reviewed


@pytest.mark.parametrize(
    ("good", "bad", "expected"),
    [(50, 50, (4, 4)), (2, 50, (2, 6)), (50, 1, (4, 1)), (1, 0, (1, 0))],
)
def test_quotas_of_anchors(good: int, bad: int, expected: tuple[int, int]) -> None:
    """Half of eight may be objects; background fills up."""
    anchors = boxes(*[ON_A] * good, *[NOWHERE] * bad)
    found = anchor_targets(anchors, SIZE, KNOWN, tiny_config(rpn_batch=8), generator())
    assert (int(found.is_object.sum()), int((found.is_object == 0).sum())) == expected
    assert len(set(found.sampled.tolist())) == len(found.sampled)


def test_regions() -> None:
    """The pairs' own boxes are appended; those on private boxes are ignored; order:
    consistent, inconsistent, background."""
    proposals = boxes(NOWHERE, ON_C, (0, 0, 20, 19), (41, 0, 60, 20))
    found = region_targets(proposals, KNOWN, tiny_config(), generator())
    assert found.proposals.tolist() == [
        [0, 0, 20, 19],
        list(ON_A),
        [41, 0, 60, 20],
        list(ON_B),
        list(NOWHERE),
    ]
    assert (
        found.consistent.tolist(),
        found.inconsistent.tolist(),
        found.positives,
    ) == ([0, 0], [0, 0], 4)
    assert found.boxes.tolist() == [list(ON_A), list(ON_A), list(ON_B), list(ON_B)]


def test_rows_point_at_their_own_pair() -> None:
    other = (70.0, 0, 90, 20)
    known = separation(
        consistent=[(ON_A, 0, 0.9), (ON_B, 1, 0.9)],
        inconsistent=[(ON_C, 0, 0.8), (other, 1, 0.8)],
    )
    found = region_targets(boxes(other, ON_B), known, tiny_config(), generator())
    assert torch.equal(
        found.boxes[: len(found.consistent)], known.consistent.boxes[found.consistent]
    )
    assert torch.equal(
        found.boxes[len(found.consistent) :],
        known.inconsistent.boxes[found.inconsistent],
    )
    assert torch.equal(found.proposals[: found.positives], found.boxes)
    assert sorted(found.consistent.tolist()) == [0, 1, 1]
    assert sorted(found.inconsistent.tolist()) == [0, 1, 1]


@pytest.mark.parametrize(
    ("good", "bad", "expected"), [(50, 50, (4, 12)), (1, 50, (3, 13)), (50, 2, (4, 2))]
)
def test_quotas_of_regions(good: int, bad: int, expected: tuple[int, int]) -> None:
    """A quarter of sixteen may be on pairs, of both kinds together; two more come from
    the pairs' own boxes."""
    found = region_targets(
        boxes(*[ON_A] * good, *[NOWHERE] * bad),
        KNOWN,
        tiny_config(roi_batch=16, roi_positive=0.25),
        generator(),
    )
    assert (found.positives, len(found.proposals) - found.positives) == expected


def test_regions_of_an_image_without_knowledge() -> None:
    found = region_targets(boxes(ON_A, ON_B), separation(), tiny_config(), generator())
    assert (found.positives, found.proposals.tolist(), found.boxes.shape) == (
        0,
        [list(ON_A), list(ON_B)],
        (0, 4),
    )


def test_no_proposals_at_all() -> None:
    assert (
        len(
            region_targets(
                torch.zeros(0, 4), separation(), tiny_config(), generator()
            ).proposals
        )
        == 0
    )
    assert (
        region_targets(torch.zeros(0, 4), KNOWN, tiny_config(), generator()).positives
        == 2
    )


def test_draws_depend_on_the_generator_only() -> None:
    anchors = boxes(*[ON_A] * 30, *[NOWHERE] * 30)
    draws = [
        anchor_targets(
            anchors, SIZE, KNOWN, tiny_config(), generator()
        ).sampled.tolist()
        for _ in range(2)
    ]
    assert draws[0] == draws[1]
    other = anchor_targets(
        anchors, SIZE, KNOWN, tiny_config(), torch.Generator().manual_seed(1)
    ).sampled.tolist()
    assert other != draws[0]
