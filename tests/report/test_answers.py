from __future__ import annotations

from typing import Any

import pytest

from coin_ray.report.answers import answer_questions, build_headline
from coin_ray.report.methods import MINUS
from coin_ray.report.run_summary import CallCounts, RunSummary


def _summary(low: float, high: float, **changes: Any) -> RunSummary:
    figures: dict[str, Any] = {
        "classes": ["bird", "car", "cat"],
        "map50": {"cloud": 0.3, "student": 0.35, "pseudo_label": 0.33},
        "per_class": {"cloud": [0.3, 0.4, 0.2], "student": [0.2, 0.35, 0.5]},
        "class_change_interval": [[-0.2, -0.05], [-0.1, 0.1], [0.1, 0.5]],
        "map50_interval": {"student": {"low": 0.3, "high": 0.4}},
        "vs_cloud_interval": {"student": {"low": low, "high": high}},
        "images": {"train": 500, "test": 1300},
        "calls": {"made": 400, "cost_usd": 0.8},
        "seconds": {"total": 90.0},
    }
    return RunSummary.from_json(figures | changes)


def _answers(summary: RunSummary) -> dict[str, str]:
    return {answer.question: answer.text for answer in answer_questions(summary)}


@pytest.mark.parametrize(
    ("low", "high", "start", "interval"),
    [
        (0.01, 0.09, "Yes: +5.0", "+1.0 to +9.0"),
        (-0.09, -0.01, "No: ", f"{MINUS}9.0 to {MINUS}1.0"),
        (
            -0.01,
            0.1,
            "These test images can't tell: +5.0",
            f"{MINUS}1.0 to +10.0, which includes zero",
        ),
    ],
)
def test_the_student_is_better_only_if_the_interval_excludes_zero(
    low: float, high: float, start: str, interval: str
) -> None:
    text = _answers(_summary(low, high))["Is it better than the cloud?"]
    assert text.startswith(start)
    assert interval in text
    assert "plain cloud labels: +2.0" in text


def test_classes_below_the_cloud_are_named_worst_first() -> None:
    text = _answers(_summary(0, 1))["For which classes not?"]
    assert text == f"Below the cloud: bird {MINUS}10.0, car {MINUS}5.0 (may be chance)."
    better = _summary(
        0, 1, per_class={"cloud": [0.3, None, 0.2], "student": [0.3, None, 0.5]}
    )
    assert (
        _answers(better)["For which classes not?"]
        == "On no class with test objects does the student score below the cloud."
    )


def test_cost_and_belief() -> None:
    answers = _answers(_summary(0, 1))
    assert answers["What did it cost?"].startswith(
        "400 cloud calls, $0.80, 1 min 30 s of work. 1,000 further images would cost"
        " $2.00 at the cloud"
    )
    assert "1,300 annotated test images" in answers["Can it be believed?"]


def test_a_run_without_accuracy_answers_no_question_about_it() -> None:
    calls = CallCounts(made=3, cost_usd=0.0)
    assert list(_answers(RunSummary(calls=calls))) == ["What did it cost?"]
    assert answer_questions(RunSummary()) == []
    assert build_headline(_summary(-0.01, 0.09)).interval == f"{MINUS}1.0 to +9.0"
