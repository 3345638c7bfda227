from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from builders import Row, detections
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coin_ray.config.co_detr import tiny
from coin_ray.models.co_detr.agreement import (
    average_head_confidences,
    class_agreement,
    deduplicate_detections,
)
from coin_ray.models.co_detr.atss import Atss
from coin_ray.models.co_detr.rcnn import Rcnn
from coin_ray.structures import Detections
from models.co_detr.scenes import (
    CLASSES,
    fill_zero_weights,
    new_collaborative,
    noise_batch,
    noise_maps,
)

FIELDS = ("boxes", "scores", "labels", "probs")
HERE, ELSEWHERE = (10, 10, 50, 50), (60, 60, 90, 90)


def same(one: Detections, other: Detections) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in FIELDS)


def some(seed: int, count: int) -> Detections:
    """Boxes that often overlap, some the same."""
    draw = Random(seed)
    rows: list[Row] = []
    for _ in range(count):
        x, y = draw.randrange(0, 60, 4), draw.randrange(0, 60, 4)
        rows.append(
            (
                (x, y, x + draw.randrange(1, 41), y + draw.randrange(1, 41)),
                draw.randrange(3),
                draw.uniform(0.01, 1.0),
            )
        )
    return detections(*rows)


SEEDS = st.integers(0, 10_000)
ANY, FOUND = (
    st.builds(some, SEEDS, st.integers(0, 6)),
    st.builds(some, SEEDS, st.integers(1, 6)),
)


def confidence(*others: Row) -> float:
    return float(
        average_head_confidences(
            detections((HERE, 0, 0.8)), [detections(*others)]
        ).scores
    )


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([(HERE, 0, 0.8)], 0.8),
        ([(HERE, 0, 1.0)], 0.9),
        ([], 0.4),
        ([(ELSEWHERE, 0, 1.0)], 0.4),
        ([(HERE, 1, 1.0)], 0.4),
        ([((10, 10, 50, 30), 0, 1.0)], 0.65),
        ([((10, 10, 50, 30), 0, 1.0), (HERE, 0, 0.8)], 0.8),
    ],
    ids=[
        "same",
        "surer",
        "nothing",
        "elsewhere",
        "another name",
        "half the box",
        "the best counts",
    ],
)
def test_a_confidence_is_the_mean_of_what_the_heads_say_of_box_and_name(
    others: list[Row], expected: float
) -> None:
    assert confidence(*others) == pytest.approx(expected, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(ANY, st.lists(ANY, max_size=3))
def test_boxes_and_names_stay_and_confidences_are_probabilities(
    own: Detections, others: list[Detections]
) -> None:
    shared = average_head_confidences(own, others)
    assert bool(((shared.scores >= 0) & (shared.scores <= 1 + 1e-6)).all())
    assert shared.scores.tolist() == sorted(shared.scores.tolist(), reverse=True)
    torch.testing.assert_close(shared.probs.sum(1), torch.ones(len(own)))

    def rows(d: Detections) -> list[list[float]]:
        return sorted(torch.cat([d.boxes, d.labels[:, None]], 1).tolist())

    assert rows(shared) == rows(own)


@settings(max_examples=40, deadline=None)
@given(FOUND, ANY, ANY)
def test_the_order_of_heads_and_of_their_detections_changes_nothing(
    own: Detections, one: Detections, other: Detections
) -> None:
    backwards = one[torch.arange(len(one)).flip(0)]
    torch.testing.assert_close(
        average_head_confidences(own, [one, other]).scores,
        average_head_confidences(own, [other, backwards]).scores,
    )


@settings(max_examples=40, deadline=None)
@given(FOUND, ANY, ANY)
def test_more_detections_of_a_head_never_take_support_away(
    own: Detections, one: Detections, more: Detections
) -> None:
    before, after = (
        class_agreement(own.boxes, one),
        class_agreement(own.boxes, Detections.cat([one, more])),
    )
    assert bool((after >= before).all())
    assert bool((after <= 1).all())


@settings(max_examples=40, deadline=None)
@given(FOUND)
def test_a_head_gives_its_own_detections_at_least_their_probabilities(
    own: Detections,
) -> None:
    assert bool((class_agreement(own.boxes, own) >= own.probs[:, :-1] - 1e-6).all())
    best_first = own.scores.argsort(descending=True, stable=True)
    torch.testing.assert_close(
        average_head_confidences(own, []).probs,
        own.probs[best_first],
        atol=1e-6,
        rtol=0,
    )


def test_of_doubles_in_a_class_only_the_best_is_kept() -> None:
    boxes = torch.tensor(
        [[0, 0, 20, 20], [1, 0, 21, 20], [40, 40, 60, 60], [70, 70, 90, 90]]
    ).float()[:, None]
    scores = torch.tensor([[0.5, 0.4], [0.9, 0.0], [0.3, 0.0], [0.8, 0.0]])
    vectors = torch.cat([scores, 1 - scores.sum(1, keepdim=True)], 1)
    kept = deduplicate_detections(boxes, scores, vectors, (64, 64), iou=0.5, limit=10)
    assert kept.labels.tolist() == [0, 1, 0]
    torch.testing.assert_close(kept.scores, torch.tensor([0.9, 0.4, 0.3]))
    assert torch.equal(kept.probs, vectors[[1, 0, 2]])
    assert (
        len(deduplicate_detections(boxes, scores, vectors, (64, 64), iou=0.5, limit=2))
        == 2
    )


def test_the_decoder_s_opinion_is_the_shipped_detector_s_bit_for_bit() -> None:
    model = new_collaborative().eval()
    opinions = model.predict_by_head(noise_batch())
    assert list(opinions) == ["decoder", "rcnn", "atss"]
    assert all(
        same(a, b)
        for a, b in zip(
            opinions["decoder"], model.base.predict(noise_batch()), strict=True
        )
    )
    assert list(
        new_collaborative(tiny(auxiliary=())).eval().predict_by_head(noise_batch())
    ) == ["decoder"]


def with_objects(name: str, roi_boxes: str = "per_class") -> tuple[Any, Tensor]:
    """A head and the image each of its detections should lie in."""
    torch.manual_seed(0)
    config = tiny(roi_boxes=roi_boxes, detections=7)
    return fill_zero_weights(
        Atss(config, CLASSES) if name == "atss" else Rcnn(config, CLASSES)
    ), torch.tensor([[96.0, 64.0], [70.0, 50.0]])


@pytest.mark.parametrize(
    ("name", "roi_boxes"),
    [("atss", "per_class"), ("rcnn", "per_class"), ("rcnn", "agnostic")],
)
def test_a_head_s_own_detections_lie_in_their_image_best_first(
    name: str, roi_boxes: str
) -> None:
    head, corners = with_objects(name, roi_boxes)
    for own, corner in zip(head.predict(noise_maps(5)), corners, strict=True):
        assert len(own) == 7
        assert own.num_classes == CLASSES
        assert bool(
            (own.boxes >= 0).all()
            and (own.boxes[:, 2:] <= corner).all()
            and (own.boxes[:, 2:] > own.boxes[:, :2]).all()
        )
        assert own.scores.tolist() == sorted(own.scores.tolist(), reverse=True)
        torch.testing.assert_close(own.probs.sum(1), torch.ones(7))


def test_what_a_trained_head_says_of_the_objects_it_was_trained_on() -> None:
    """Both heads, on fixed maps of two objects, find both with their names."""
    from models.co_detr.scenes import TWO_IMAGES, seeded

    maps = noise_maps(5)
    for name in ("atss", "rcnn"):
        head, _ = with_objects(name)
        optimizer, draw = torch.optim.AdamW(head.parameters(), 2e-3), seeded()
        for _ in range(80):
            optimizer.zero_grad()
            losses = head(maps, TWO_IMAGES, draw).losses
            torch.stack(
                [head.weights[part] * value for part, value in losses.items()]
            ).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        for target, own in zip(TWO_IMAGES, head.predict(maps), strict=True):
            named = class_agreement(target.boxes, own).gather(1, target.labels[:, None])
            others = class_agreement(target.boxes, own).scatter(
                1, target.labels[:, None], 0.0
            )
            assert float(named.min()) > 2 * float(others.max()), name
            assert float(named.min()) > 0.2, name
