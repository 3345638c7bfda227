from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from builders import truth
from hypothesis import given
from hypothesis import strategies as st
from operations import count_calls

from coin_ray.evaluation.fusion_baselines import expand_to_all_classes
from coin_ray.evaluation.voc import VocReport, average_precision, pairwise_iou
from coin_ray.structures import Detections
from coin_ray.tables import Truth

Box = tuple[float, float, float, float]
A: Box = (0, 0, 10, 10)
B: Box = (20, 20, 30, 30)
C: Box = (40, 40, 50, 50)
OFF: Box = (60, 60, 70, 70)


def _detections(*rows: tuple[Box, float, int], num_classes: int = 2) -> Detections:
    boxes, scores, labels = ([r[i] for r in rows] for i in range(3))
    return Detections(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(scores, dtype=torch.float32),
        torch.tensor(labels, dtype=torch.int64),
        torch.full((len(rows), num_classes + 1), 1 / (num_classes + 1)),
    )


def _evaluate_image(
    predictions: Detections, annotated: Truth, **options: bool
) -> VocReport:
    return average_precision({"a": predictions}, {"a": annotated}, 2, **options)


# name, detections, truth, AP of class 0
TABLE = [
    ("perfect", [(A, 0.9, 0), (B, 0.8, 0)], [(A, 0), (B, 0)], 1.0),
    ("none", [], [(A, 0)], 0.0),
    ("half found", [(A, 0.9, 0)], [(A, 0), (B, 0)], 0.5),
    ("wrong class", [(A, 0.9, 1)], [(A, 0)], 0.0),
    # right, wrong, right: precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1
    (
        "false positive between",
        [(A, 0.9, 0), (OFF, 0.8, 0), (B, 0.7, 0)],
        [(A, 0), (B, 0)],
        0.5 + 0.5 * 2 / 3,
    ),
    ("false positive first", [(OFF, 0.9, 0), (A, 0.8, 0)], [(A, 0)], 0.5),
    ("false positive last", [(A, 0.8, 0), (OFF, 0.1, 0)], [(A, 0)], 1.0),
    # the duplicate is wrong: precision 1, 1/2, 2/3
    (
        "duplicate",
        [(A, 0.9, 0), (A, 0.8, 0), (B, 0.7, 0)],
        [(A, 0), (B, 0)],
        0.5 + 0.5 * 2 / 3,
    ),
    ("difficult is not required", [(A, 0.9, 0)], [(A, 0), (B, 0, True)], 1.0),
    (
        "difficult does no harm",
        [(B, 0.9, 0), (B, 0.8, 0), (A, 0.7, 0)],
        [(A, 0), (B, 0, True)],
        1.0,
    ),
    # 5 of 10 columns shared, union exactly twice that: IoU = 50 / 100
    ("IoU of exactly .5", [((0, 0, 10, 5), 0.9, 0)], [(A, 0)], 0.0),
    ("IoU just above .5", [((0, 0, 10, 5.01), 0.9, 0)], [(A, 0)], 1.0),
    # the second detection overlaps the taken box most, so it is a duplicate even though
    # B2 is free (VOC, not COCO)
    (
        "no second choice",
        [(A, 0.9, 0), ((1, 0, 11, 10), 0.8, 0)],
        [(A, 0), ((3, 0, 13, 10), 0)],
        0.5,
    ),
]


@pytest.mark.parametrize(
    ("predictions", "annotated", "expected"),
    [row[1:] for row in TABLE],
    ids=[row[0] for row in TABLE],
)
def test_hand_computed(
    predictions: list[tuple[Box, float, int]],
    annotated: list[tuple[Box, int]],
    expected: float,
) -> None:
    assert _evaluate_image(_detections(*predictions), truth(*annotated)).ap[
        0
    ] == pytest.approx(expected)


def test_a_class_without_truth_is_nan_and_not_in_the_mean() -> None:
    report = _evaluate_image(
        _detections((A, 0.9, 0), (B, 0.9, 1)), truth((A, 0), (B, 1, True))
    )
    assert math.isnan(report.ap[1])
    assert report.map == 1.0
    assert report.truth.tolist() == [1, 0]


def test_no_truth_at_all() -> None:
    assert math.isnan(average_precision({}, {}, 3).map)
    assert math.isnan(_evaluate_image(_detections((A, 0.9, 0)), truth()).map)


def test_plus_one_changes_the_overlap() -> None:
    # 10 x 5 in 10 x 10 is .5; as inclusive pixels it is 11 x 6 in 11 x 11 = .545
    predictions, annotated = _detections(((0, 0, 10, 5), 0.9, 0)), truth((A, 0))
    assert _evaluate_image(predictions, annotated).ap[0] == 0
    assert _evaluate_image(predictions, annotated, plus_one=True).ap[0] == 1


def test_one_class_ranks_by_score_although_its_vectors_are_all_alike() -> None:
    """The published conversion gives every box of one class [1, 0]. Scores of 1 would
    leave the ranking to chance: AP .5 here, not 1."""
    annotated = {"b": truth((A, 0)), "a": truth()}
    vectors = torch.tensor([[1.0, 0.0]])

    def found(right: float, wrong: float) -> dict[str, Detections]:
        scores = {"b": right, "a": wrong}
        return {
            i: expand_to_all_classes(
                Detections(
                    torch.tensor([A]),
                    torch.tensor([s]),
                    torch.zeros(1, dtype=torch.int64),
                    vectors,
                )
            )
            for i, s in scores.items()
        }

    assert average_precision(found(0.9, 0.3), annotated, 1).ap[0] == 1
    assert average_precision(found(1.0, 1.0), annotated, 1).ap[0] == 0.5


def test_images_without_predictions_count_and_others_do_not() -> None:
    annotated = {"a": truth((A, 0)), "b": truth((A, 0)), "empty": truth()}
    predictions = {"a": _detections((A, 0.5, 0)), "elsewhere": _detections((A, 0.9, 0))}
    assert average_precision(predictions, annotated, 2).ap[0] == pytest.approx(0.5)


def test_detections_on_empty_images_are_wrong() -> None:
    annotated = {"a": truth((A, 0)), "empty": truth()}
    predictions = {"a": _detections((A, 0.5, 0)), "empty": _detections((A, 0.9, 0))}
    assert average_precision(predictions, annotated, 2).ap[0] == pytest.approx(0.5)


def test_equal_scores_are_ordered_by_image_id() -> None:
    annotated = {"a": truth((A, 0)), "b": truth()}
    predictions = {"b": _detections((A, 0.5, 0)), "a": _detections((A, 0.5, 0))}
    assert average_precision(predictions, annotated, 2).ap[0] == 1.0
    renamed = {"b": annotated["a"], "a": annotated["b"]}
    assert (
        average_precision(
            {"b": predictions["a"], "a": predictions["b"]}, renamed, 2
        ).ap[0]
        == 0.5
    )


def test_curve_points() -> None:
    curve = _evaluate_image(
        _detections((A, 0.9, 0), (OFF, 0.8, 0), (B, 0.7, 0)), truth((A, 0), (B, 0))
    ).curves[0]
    assert curve.precision == pytest.approx([1, 1 / 2, 2 / 3])
    assert curve.recall == pytest.approx([1 / 2, 1 / 2, 1])


def test_iou_of_empty_boxes_is_zero() -> None:
    point = np.zeros((1, 4))
    assert pairwise_iou(point, point).tolist() == [[0.0]]


def _draw_random_case(
    seed: int, images: int, objects: int, detection_count: int, num_classes: int = 3
) -> tuple[dict[str, Detections], dict[str, Truth]]:
    """Truth at random; detections are jittered truth and noise."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    predictions, annotated = {}, {}
    for image in range(images):
        corner, size = uniform(objects, 2) * 150, 10 + uniform(objects, 2) * 40
        boxes = torch.cat([corner, corner + size], 1)
        labels = torch.randint(num_classes, (objects,), generator=generator)
        annotated[f"{image:04d}"] = Truth(boxes, labels, uniform(objects) < 0.1)
        pick = torch.randint(objects, (detection_count,), generator=generator)
        noisy = boxes[pick] + (uniform(detection_count, 4) - 0.5) * 16
        guess = torch.where(
            uniform(detection_count) < 0.7,
            labels[pick],
            torch.randint(num_classes, (detection_count,), generator=generator),
        )
        probs = torch.full((detection_count, num_classes + 1), 1 / (num_classes + 1))
        predictions[f"{image:04d}"] = Detections(
            noisy, uniform(detection_count).mul(20).round() / 20, guess, probs
        )
    return predictions, annotated


@given(st.integers(0, 10_000))
def test_ap_lies_in_0_to_1(seed: int) -> None:
    report = average_precision(*_draw_random_case(seed, 3, 4, 8), 3)
    defined = report.ap[~np.isnan(report.ap)]
    assert ((defined >= 0) & (defined <= 1)).all()


@given(st.integers(0, 10_000))
def test_the_order_of_images_and_boxes_does_not_matter(seed: int) -> None:
    predictions, annotated = _draw_random_case(seed, 3, 4, 8)
    names = list(annotated)
    random.Random(seed).shuffle(names)
    shuffled = {n: predictions[n][torch.randperm(len(predictions[n]))] for n in names}
    turned = {}
    for n in reversed(names):
        order = torch.randperm(len(annotated[n].boxes))
        turned[n] = Truth(
            annotated[n].boxes[order],
            annotated[n].labels[order],
            annotated[n].difficult[order],
        )
    np.testing.assert_array_equal(
        average_precision(shuffled, turned, 3).ap,
        average_precision(predictions, annotated, 3).ap,
    )


@given(st.integers(0, 10_000), st.integers(0, 2))
def test_a_weaker_false_positive_never_raises_ap(seed: int, label: int) -> None:
    predictions, annotated = _draw_random_case(seed, 2, 4, 6)
    before = average_precision(predictions, annotated, 3).ap
    wrong = _detections(((500, 500, 510, 510), -1.0, label), num_classes=3)
    predictions["0000"] = Detections.cat([predictions["0000"], wrong])
    after = average_precision(predictions, annotated, 3).ap
    defined = ~np.isnan(before)
    assert (after[defined] <= before[defined]).all()


def _calls(images: int, detections: int) -> int:
    predictions, annotated = _draw_random_case(0, images, 5, detections)
    return count_calls(lambda: average_precision(predictions, annotated, 3))


def test_the_work_grows_with_the_images_and_not_with_their_detections() -> None:
    base = _calls(20, 10)
    assert _calls(40, 10) < 2.2 * base
    assert _calls(20, 100) < 1.2 * base
