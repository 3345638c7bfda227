from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from builders import Row, detections
from hypothesis import given
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
    have_same_fields,
    new_collaborative,
    noise_batch,
    noise_maps,
)

HERE, ELSEWHERE = (10, 10, 50, 50), (60, 60, 90, 90)


def _random_detections(seed: int, count: int) -> Detections:
    """Return boxes that often overlap, some the same."""
    random = Random(seed)
    rows: list[Row] = []
    for _ in range(count):
        x, y = random.randrange(0, 60, 4), random.randrange(0, 60, 4)
        rows.append(
            (
                (x, y, x + random.randrange(1, 41), y + random.randrange(1, 41)),
                random.randrange(3),
                random.uniform(0.01, 1.0),
            )
        )
    return detections(*rows)


SEEDS = st.integers(0, 10_000)
ANY = st.builds(_random_detections, SEEDS, st.integers(0, 6))
FOUND = st.builds(_random_detections, SEEDS, st.integers(1, 6))


def _averaged_confidence(*others: Row) -> float:
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
        "higher confidence",
        "nothing",
        "elsewhere",
        "another class",
        "half the box",
        "the best counts",
    ],
)
def test_a_confidence_is_the_mean_over_heads_for_box_and_class(
    others: list[Row], expected: float
) -> None:
    assert _averaged_confidence(*others) == pytest.approx(expected, abs=1e-6)


@given(ANY, st.lists(ANY, max_size=3))
def test_boxes_and_labels_stay_and_confidences_are_probabilities(
    detected: Detections, others: list[Detections]
) -> None:
    averaged = average_head_confidences(detected, others)
    assert bool(((averaged.scores >= 0) & (averaged.scores <= 1 + 1e-6)).all())
    assert averaged.scores.tolist() == sorted(averaged.scores.tolist(), reverse=True)
    torch.testing.assert_close(averaged.probs.sum(1), torch.ones(len(detected)))

    def boxes_and_labels(d: Detections) -> list[list[float]]:
        return sorted(torch.cat([d.boxes, d.labels[:, None]], 1).tolist())

    assert boxes_and_labels(averaged) == boxes_and_labels(detected)


@given(FOUND, ANY, ANY)
def test_the_order_of_heads_and_of_their_detections_changes_nothing(
    detected: Detections, first_head: Detections, second_head: Detections
) -> None:
    reversed_head = first_head[torch.arange(len(first_head)).flip(0)]
    torch.testing.assert_close(
        average_head_confidences(detected, [first_head, second_head]).scores,
        average_head_confidences(detected, [second_head, reversed_head]).scores,
    )


@given(FOUND, ANY, ANY)
def test_more_detections_of_a_head_never_lower_the_agreement(
    detected: Detections, head: Detections, additional: Detections
) -> None:
    before = class_agreement(detected.boxes, head)
    after = class_agreement(detected.boxes, Detections.cat([head, additional]))
    assert bool((after >= before).all())
    assert bool((after <= 1).all())


@given(FOUND)
def test_a_head_gives_its_own_detections_at_least_their_probabilities(
    detected: Detections,
) -> None:
    assert bool(
        (
            class_agreement(detected.boxes, detected) >= detected.probs[:, :-1] - 1e-6
        ).all()
    )
    best_first = detected.scores.argsort(descending=True, stable=True)
    torch.testing.assert_close(
        average_head_confidences(detected, []).probs,
        detected.probs[best_first],
        atol=1e-6,
        rtol=0,
    )


def test_only_the_best_of_duplicates_in_a_class_is_kept() -> None:
    boxes = torch.tensor(
        [[0, 0, 20, 20], [1, 0, 21, 20], [40, 40, 60, 60], [70, 70, 90, 90]]
    ).float()[:, None]
    scores = torch.tensor([[0.5, 0.4], [0.9, 0.0], [0.3, 0.0], [0.8, 0.0]])
    probs = torch.cat([scores, 1 - scores.sum(1, keepdim=True)], 1)
    deduplicated = deduplicate_detections(
        boxes, scores, probs, (64, 64), iou=0.5, limit=10
    )
    assert deduplicated.labels.tolist() == [0, 1, 0]
    torch.testing.assert_close(deduplicated.scores, torch.tensor([0.9, 0.4, 0.3]))
    assert torch.equal(deduplicated.probs, probs[[1, 0, 2]])
    assert (
        len(deduplicate_detections(boxes, scores, probs, (64, 64), iou=0.5, limit=2))
        == 2
    )


def test_the_decoders_detections_are_the_base_detectors_bit_for_bit() -> None:
    model = new_collaborative().eval()
    by_head = model.predict_by_head(noise_batch())
    assert list(by_head) == ["decoder", "rcnn", "atss"]
    assert all(
        have_same_fields(a, b)
        for a, b in zip(
            by_head["decoder"], model.base.predict(noise_batch()), strict=True
        )
    )
    assert list(
        new_collaborative(tiny(auxiliary=())).eval().predict_by_head(noise_batch())
    ) == ["decoder"]


def _new_head_and_corners(
    name: str, roi_boxes: str = "per_class"
) -> tuple[Any, Tensor]:
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
def test_a_heads_own_detections_lie_in_their_image_best_first(
    name: str, roi_boxes: str
) -> None:
    head, corners = _new_head_and_corners(name, roi_boxes)
    for detected, corner in zip(head.predict(noise_maps(5)), corners, strict=True):
        assert len(detected) == 7
        assert detected.num_classes == CLASSES
        assert bool(
            (detected.boxes >= 0).all()
            and (detected.boxes[:, 2:] <= corner).all()
            and (detected.boxes[:, 2:] > detected.boxes[:, :2]).all()
        )
        assert detected.scores.tolist() == sorted(
            detected.scores.tolist(), reverse=True
        )
        torch.testing.assert_close(detected.probs.sum(1), torch.ones(7))


def test_a_trained_head_detects_the_objects_it_was_trained_on() -> None:
    """Both heads, on fixed maps of two objects, find both with their names."""
    from models.co_detr.scenes import TWO_IMAGES, seeded

    maps = noise_maps(5)
    for name in ("atss", "rcnn"):
        head, _ = _new_head_and_corners(name)
        optimizer, generator = torch.optim.AdamW(head.parameters(), 2e-3), seeded()
        for _ in range(80):
            optimizer.zero_grad()
            losses = head(maps, TWO_IMAGES, generator).losses
            torch.stack(
                [head.weights[part] * loss for part, loss in losses.items()]
            ).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        for target, detected in zip(TWO_IMAGES, head.predict(maps), strict=True):
            labelled = class_agreement(target.boxes, detected).gather(
                1, target.labels[:, None]
            )
            others = class_agreement(target.boxes, detected).scatter(
                1, target.labels[:, None], 0.0
            )
            assert float(labelled.min()) > 2 * float(others.max()), name
            assert float(labelled.min()) > 0.2, name
