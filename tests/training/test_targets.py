from __future__ import annotations

import pytest
import torch
from builders import separation, tiny_config
from torch import Tensor

from coin_ray.structures import Separation
from coin_ray.training.targets import anchor_targets, region_targets

SIZE = (100, 100)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _boxes(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows)


ON_A, ON_B, ON_C, NOWHERE, BETWEEN = (
    (0.0, 0, 20, 20),
    (40.0, 0, 60, 20),
    (0.0, 40, 20, 60),
    (70.0, 70, 90, 90),
    (0.0, 0, 20, 10),
)
KNOWLEDGE = separation(
    consistent=[(ON_A, 0, 0.9)], inconsistent=[(ON_B, 1, 0.8)], private=[(ON_C, 2, 0.7)]
)


def test_anchors() -> None:
    anchors = _boxes(ON_A, ON_B, ON_C, NOWHERE, BETWEEN, (0, 0, 20, 19))
    targets = anchor_targets(anchors, SIZE, KNOWLEDGE, tiny_config(), _generator())
    assert targets.positive.tolist() == [0, 1, 5]
    assert targets.boxes.tolist() == [list(ON_A), list(ON_B), list(ON_A)]
    assert targets.sampled.tolist() == [0, 1, 5, 3]
    assert targets.is_object.tolist() == [1, 1, 1, 0]
    assert targets.private.tolist() == [2]
    assert torch.equal(targets.private_probs, KNOWLEDGE.private.probs)


def test_private_anchors_get_their_own_teachers_probabilities() -> None:
    knowledge = separation(private=[(ON_A, 0, 0.9), (ON_C, 2, 0.7)])
    targets = anchor_targets(
        _boxes(ON_C, ON_A, NOWHERE), SIZE, knowledge, tiny_config(), _generator()
    )
    assert targets.private.tolist() == [0, 1]
    assert torch.equal(
        targets.private_probs, knowledge.private.probs[torch.tensor([1, 0])]
    )
    assert targets.sampled.tolist() == [2]


def test_anchors_in_the_padding_learn_nothing() -> None:
    targets = anchor_targets(
        _boxes(NOWHERE, (70, 70, 90, 140), (120, 0, 140, 20)),
        SIZE,
        KNOWLEDGE,
        tiny_config(),
        _generator(),
    )
    assert targets.sampled.tolist() == [0]


def test_a_box_without_area_claims_no_anchor() -> None:
    knowledge = separation(consistent=[(ON_A, 0, 0.9), ((50, 50, 50, 50), 1, 0.9)])
    targets = anchor_targets(
        _boxes(ON_A, ON_B, NOWHERE), SIZE, knowledge, tiny_config(), _generator()
    )
    assert (targets.positive.tolist(), targets.sampled.tolist()) == ([0], [0, 1, 2])


def test_without_detections_all_anchors_are_background() -> None:
    targets = anchor_targets(
        _boxes(ON_A, ON_B), SIZE, separation(), tiny_config(), _generator()
    )
    assert (
        targets.sampled.tolist(),
        targets.is_object.tolist(),
        len(targets.positive),
        len(targets.private),
    ) == ([0, 1], [0, 0], 0, 0)


@pytest.mark.parametrize(
    ("knowledge", "sampled"),
    [
        (separation(), []),
        (separation(private=[(ON_C, 0, 0.9)]), [0, 1]),
        (separation(consistent=[(ON_A, 0, 0.9)]), [0, 1]),
    ],
)
def test_anchors_of_images_without_detections_may_be_ignored(
    knowledge: Separation, sampled: list[int]
) -> None:
    """The published code ignores them; with only a private box, the others are still
    background."""
    targets = anchor_targets(
        _boxes(ON_A, ON_B),
        SIZE,
        knowledge,
        tiny_config(unseen_images="ignored"),
        _generator(),
    )
    assert targets.sampled.tolist() == sampled


def test_an_image_reviewed_as_empty_is_background() -> None:
    knowledge = Separation.from_labels(separation().private, reviewed=True)
    targets = anchor_targets(
        _boxes(ON_A, ON_B),
        SIZE,
        knowledge,
        tiny_config(unseen_images="ignored"),
        _generator(),
    )
    assert (targets.sampled.tolist(), targets.is_object.tolist()) == ([0, 1], [0, 0])
    assert knowledge.to(torch.device("cpu")).reviewed


@pytest.mark.parametrize(
    ("good", "bad", "expected"),
    [(50, 50, (4, 4)), (2, 50, (2, 6)), (50, 1, (4, 1)), (1, 0, (1, 0))],
)
def test_quotas_of_anchors(good: int, bad: int, expected: tuple[int, int]) -> None:
    """Half of eight may be objects; background fills up."""
    anchors = _boxes(*[ON_A] * good, *[NOWHERE] * bad)
    targets = anchor_targets(
        anchors, SIZE, KNOWLEDGE, tiny_config(rpn_batch=8), _generator()
    )
    assert (
        int(targets.is_object.sum()),
        int((targets.is_object == 0).sum()),
    ) == expected
    assert len(set(targets.sampled.tolist())) == len(targets.sampled)


def test_regions() -> None:
    """The pairs' own boxes are appended; those on private boxes are ignored; order:
    consistent, inconsistent, background."""
    proposals = _boxes(NOWHERE, ON_C, (0, 0, 20, 19), (41, 0, 60, 20))
    targets = region_targets(proposals, KNOWLEDGE, tiny_config(), _generator())
    assert targets.proposals.tolist() == [
        [0, 0, 20, 19],
        list(ON_A),
        [41, 0, 60, 20],
        list(ON_B),
        list(NOWHERE),
    ]
    assert (
        targets.consistent.tolist(),
        targets.inconsistent.tolist(),
        targets.positives,
    ) == ([0, 0], [0, 0], 4)
    assert targets.boxes.tolist() == [list(ON_A), list(ON_A), list(ON_B), list(ON_B)]


def test_rows_point_at_their_own_pair() -> None:
    other = (70.0, 0, 90, 20)
    knowledge = separation(
        consistent=[(ON_A, 0, 0.9), (ON_B, 1, 0.9)],
        inconsistent=[(ON_C, 0, 0.8), (other, 1, 0.8)],
    )
    targets = region_targets(
        _boxes(other, ON_B), knowledge, tiny_config(), _generator()
    )
    assert torch.equal(
        targets.boxes[: len(targets.consistent)],
        knowledge.consistent.boxes[targets.consistent],
    )
    assert torch.equal(
        targets.boxes[len(targets.consistent) :],
        knowledge.inconsistent.boxes[targets.inconsistent],
    )
    assert torch.equal(targets.proposals[: targets.positives], targets.boxes)
    assert sorted(targets.consistent.tolist()) == [0, 1, 1]
    assert sorted(targets.inconsistent.tolist()) == [0, 1, 1]


@pytest.mark.parametrize(
    ("good", "bad", "expected"), [(50, 50, (4, 12)), (1, 50, (3, 13)), (50, 2, (4, 2))]
)
def test_quotas_of_regions(good: int, bad: int, expected: tuple[int, int]) -> None:
    """A quarter of sixteen may be on pairs, of both kinds together; two more come from
    the pairs' own boxes."""
    targets = region_targets(
        _boxes(*[ON_A] * good, *[NOWHERE] * bad),
        KNOWLEDGE,
        tiny_config(roi_batch=16, roi_positive=0.25),
        _generator(),
    )
    assert (targets.positives, len(targets.proposals) - targets.positives) == expected


def test_regions_of_an_image_without_knowledge() -> None:
    targets = region_targets(
        _boxes(ON_A, ON_B), separation(), tiny_config(), _generator()
    )
    assert (targets.positives, targets.proposals.tolist(), targets.boxes.shape) == (
        0,
        [list(ON_A), list(ON_B)],
        (0, 4),
    )


def test_no_proposals_at_all() -> None:
    assert (
        len(
            region_targets(
                torch.zeros(0, 4), separation(), tiny_config(), _generator()
            ).proposals
        )
        == 0
    )
    assert (
        region_targets(
            torch.zeros(0, 4), KNOWLEDGE, tiny_config(), _generator()
        ).positives
        == 2
    )


def test_draws_depend_on_the_generator_only() -> None:
    anchors = _boxes(*[ON_A] * 30, *[NOWHERE] * 30)
    draws = [
        anchor_targets(
            anchors, SIZE, KNOWLEDGE, tiny_config(), _generator()
        ).sampled.tolist()
        for _ in range(2)
    ]
    assert draws[0] == draws[1]
    other = anchor_targets(
        anchors, SIZE, KNOWLEDGE, tiny_config(), torch.Generator().manual_seed(1)
    ).sampled.tolist()
    assert other != draws[0]
