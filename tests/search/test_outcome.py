from __future__ import annotations

import re
from xml.etree import ElementTree as ET

import pytest

from coin_ray.search.outcome import (
    TrialRecord,
    best_trial,
    format_trial,
    setting_importance,
    sort_trials,
    truth_correlation,
)
from coin_ray.search.plots import axis_height, importance_bars, parallel_coordinates
from coin_ray.search.space import Choice, Real, Space

SPACE: Space = {
    "distill.alignment": Real(0.1, 10.0, log=True),
    "distill.fusion": Choice(("ckg", "average")),
    "seedless": Real(0.0, 1.0),
}


def _record(
    number: int,
    score: float | None,
    ninths: int = 9,
    failure: str = "",
    **figures: float,
) -> TrialRecord:
    settings = {
        "distill.alignment": 10.0 ** (number / 5 - 1),
        "distill.fusion": "ckg" if number % 2 else "average",
        "seedless": 0.5,
    }
    return TrialRecord(
        number,
        settings,
        ({} if score is None else {"score": score}) | figures,
        ninths,
        60.0,
        failure,
    )


RECORDS = [
    _record(0, 0.40),
    _record(1, 0.45),
    _record(2, 0.60, ninths=1),
    _record(3, -1.0, failure="TrainingError: loss"),
    _record(4, 0.2, ninths=3),
]


def test_trials_are_ordered_by_how_far_they_came_then_by_score() -> None:
    assert [r.number for r in sort_trials(RECORDS)] == [1, 0, 4, 2, 3]
    assert [r.state for r in RECORDS] == [
        "finished",
        "finished",
        "stopped at 1/9",
        "failed",
        "stopped at 3/9",
    ]


def test_only_a_finished_trial_can_be_best() -> None:
    assert best_trial(RECORDS) is RECORDS[1]
    assert best_trial(RECORDS[2:]) is None


def test_importance_finds_the_setting_that_decides() -> None:
    rising = [_record(n, 0.1 * n) for n in range(6)]
    worth = setting_importance(rising, SPACE)
    assert worth["distill.alignment"] == pytest.approx(1.0)
    assert worth["seedless"] == 0.0
    assert worth["distill.fusion"] < 0.2
    assert setting_importance(rising[:2], SPACE) == {}


@pytest.mark.parametrize(("trend", "expected"), [(1, 1.0), (-1, -1.0)])
def test_the_correlation_with_the_truth_is_over_finished_trials(
    trend: int, expected: float
) -> None:
    records = [_record(n, 0.1 * n, validation=0.5 + trend * 0.02 * n) for n in range(5)]
    assert truth_correlation([*records, _record(9, 0.9, ninths=1, validation=0.0)]) == (
        pytest.approx(expected),
        5,
    )
    assert truth_correlation(records[:2]) is None


@pytest.mark.parametrize(("setting", "expected"), [(0.1, 0.0), (1.0, 0.5), (10.0, 1.0)])
def test_a_logarithmic_axis_is_drawn_so(setting: float, expected: float) -> None:
    assert axis_height(SPACE["distill.alignment"], setting) == pytest.approx(expected)
    assert axis_height(SPACE["distill.fusion"], "average") == 1.0


@pytest.mark.parametrize("records", [RECORDS, RECORDS[3:4], RECORDS[:1]])
def test_figures_are_svg_and_failed_trials_no_line(records: list[TrialRecord]) -> None:
    drawn = parallel_coordinates("Search & find", records, SPACE)
    ET.fromstring(drawn)
    lines = {int(number) for number in re.findall(r'id="trial-(\d+)"', drawn)}
    assert lines == {r.number for r in records if not r.failure}
    ET.fromstring(importance_bars("Search & find", setting_importance(records, SPACE)))


def test_a_trial_is_one_line_in_the_log() -> None:
    assert (
        format_trial(RECORDS[1])
        == "trial 1: score 45.0, finished, 60 s (alignment 0.158, fusion ckg, seedless"
        " 0.5)"
    )
    assert "failed, TrainingError: loss" in format_trial(RECORDS[3])
