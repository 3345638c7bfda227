from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coin_ray.evaluation.bootstrap import (
    bootstrap_average_precision,
    draw_bootstrap_samples,
    mean_ap,
    percentile_interval,
)
from coin_ray.evaluation.voc import average_precision, match_detections
from coin_ray.structures import Detections
from coin_ray.tables import Truth
from tests.builders import detections, truth

HERE, THERE, NOWHERE = (0, 0, 10, 10), (20, 20, 40, 40), (60, 60, 80, 80)


TRUTH = {"a": truth((HERE, 0), (THERE, 1)), "b": truth((HERE, 0)), "c": truth()}
FOUND = {
    "a": detections((HERE, 0, 0.9), (NOWHERE, 0, 0.8), (THERE, 1, 0.3)),
    "b": detections((THERE, 0, 0.7), (HERE, 0, 0.6)),
    "c": detections((NOWHERE, 1, 0.5)),
}


def test_an_image_drawn_twice_counts_as_two_images() -> None:
    draws = np.array([[1, 1, 1], [2, 1, 0], [0, 3, 0], [0, 0, 3]])
    ap_by_draw = bootstrap_average_precision(match_detections(FOUND, TRUTH, 2), draws)
    # class 0 as it is: right .9, wrong .8, wrong .7, right .6: 1/2 * 1 + 1/2 * 2/4
    # a twice: right twice, wrong twice, wrong, right: 2/3 * 1 + 1/3 * 3/6
    # b thrice: wrong thrice, right thrice: 3/6
    expected = [[0.75, 0.5], [2 / 3 + 1 / 6, 1.0], [0.5, np.nan], [np.nan, np.nan]]
    np.testing.assert_allclose(ap_by_draw, expected)
    np.testing.assert_allclose(mean_ap(ap_by_draw), [0.625, 11 / 12, 0.5, np.nan])


@st.composite
def _scenes(draw: st.DrawFn) -> tuple[dict[str, Detections], dict[str, Truth]]:
    boxes = st.sampled_from([HERE, THERE, NOWHERE])
    rows = st.lists(
        st.tuples(boxes, st.integers(0, 1)), max_size=3, unique_by=lambda row: row[0]
    )
    scores = iter(draw(st.permutations([i / 20 for i in range(1, 20)])))
    predictions, annotated = {}, {}
    for name in "abc":
        predictions[name] = detections(
            *[(box, label, next(scores)) for box, label in draw(rows)], classes=2
        )
        annotated[name] = truth(*draw(rows))
    return predictions, annotated


@given(_scenes(), st.lists(st.integers(0, 2), min_size=3, max_size=3))
def test_a_draw_scores_as_copies_of_its_images_would(
    scene: tuple[dict[str, Detections], dict[str, Truth]], counts: list[int]
) -> None:
    predictions, annotated = scene
    copies = {
        f"{name}{n}": name
        for name, count in zip("abc", counts, strict=True)
        for n in range(count)
    }
    expected = average_precision(
        {c: predictions[n] for c, n in copies.items()},
        {c: annotated[n] for c, n in copies.items()},
        2,
    ).ap
    np.testing.assert_allclose(
        bootstrap_average_precision(
            match_detections(predictions, annotated, 2), np.array([counts])
        )[0],
        expected,
    )


def test_each_image_drawn_once_is_the_figure_itself() -> None:
    as_it_is = bootstrap_average_precision(
        match_detections(FOUND, TRUTH, 2), np.ones((1, 3), np.int64)
    )
    np.testing.assert_allclose(as_it_is[0], average_precision(FOUND, TRUTH, 2).ap)


def test_difficult_matches_are_neither_right_nor_wrong() -> None:
    hard = {"a": truth((HERE, 0, True)), "b": truth((HERE, 0))}
    first, *_ = match_detections(
        {"a": detections((HERE, 0, 0.9)), "b": detections((HERE, 0, 0.5))}, hard, 2
    )
    assert (
        first.score.tolist(),
        first.image.tolist(),
        first.correct.tolist(),
        first.required.tolist(),
    ) == ([0.5], [1], [True], [0, 1])


def test_the_same_seed_draws_the_same_images() -> None:
    draws = draw_bootstrap_samples(7, seed=3, draws=20)
    assert (draws == draw_bootstrap_samples(7, seed=3, draws=20)).all()
    assert (draws != draw_bootstrap_samples(7, seed=4, draws=20)).any()
    assert (draws.sum(1) == 7).all()


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        (np.linspace(0, 1, 1001), (0.025, 0.975)),
        (np.array([0.4, np.nan, 0.4]), (0.4, 0.4)),
        (np.array([np.nan]), None),
    ],
)
def test_interval_holds_the_middle_95_percent(
    figures: np.ndarray[tuple[int], np.dtype[np.float64]], expected: object
) -> None:
    assert percentile_interval(figures) == (
        pytest.approx(expected) if expected else None
    )
