"""The questions that the owner of a run asks first, each answered in a sentence."""

from __future__ import annotations

from dataclasses import dataclass

from coin_ray.report.charts import change_verdict
from coin_ray.report.methods import (
    MINUS,
    finite_number,
    format_change,
    format_duration,
    format_points,
    format_usd,
)
from coin_ray.report.run_summary import Interval, RunSummary

MAX_CLASSES = 6
"""Classes that are named before "and N more"."""

Bounds = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Headline:
    """The verdict (``text``) and the figures behind it, in points; figures may be empty.

    ``interval``: the 95 % interval of the change. ``gap``: the share of the gap between
    the cloud and the oracle that the student closes.
    """

    text: str
    student: str = ""
    cloud: str = ""
    change: str = ""
    interval: str = ""
    gap: str = ""


@dataclass(frozen=True, slots=True)
class AnsweredQuestion:
    """A question and its answer."""

    question: str
    text: str


def build_headline(summary: RunSummary) -> Headline:
    """Return whether the student is better than the cloud, with the figures."""
    student = finite_number(summary.map50.get("student"))
    cloud = finite_number(summary.map50.get("cloud"))
    if student is None:
        return Headline(
            "No annotated test images were given, so nothing here was measured against"
            " truth."
        )
    if cloud is None:
        return Headline(
            "The student was evaluated; the cloud was not.",
            student=format_points(student),
        )
    change = format_change(student, cloud)
    change_size = change.lstrip("+" + MINUS)
    verdicts = {
        "+": f"scores {change_size} points above",
        MINUS: f"scores {change_size} points below",
    }
    verdict = verdicts.get(change[0], "scores the same as")
    interval = interval_bounds((summary.vs_cloud_interval or {}).get("student"))
    return Headline(
        f"The student {verdict} the cloud detector it learned from, and needs no cloud"
        " call.",
        student=format_points(student),
        cloud=format_points(cloud),
        change=change,
        interval=format_interval(interval),
        gap=_format_gap(summary),
    )


def answer_questions(summary: RunSummary) -> list[AnsweredQuestion]:
    """Return the questions that this run's figures can answer, with the answers."""
    answers = [
        AnsweredQuestion("Is it better than the cloud?", _compare_with_cloud(summary)),
        AnsweredQuestion("Why this student?", _explain_choice(summary)),
        AnsweredQuestion("For which classes not?", _list_worse_classes(summary)),
        AnsweredQuestion("What did it cost?", _describe_cost(summary)),
        AnsweredQuestion("Can it be believed?", _describe_evidence(summary)),
    ]
    return [answer for answer in answers if answer.text]


def format_interval(bounds: Bounds | None, signed: bool = True) -> str:
    """Format bounds in points, as ``+4.0 to +11.7`` or unsigned; empty if None."""
    if bounds is None:
        return ""
    if signed:
        return " to ".join(format_change(bound, 0.0) for bound in bounds)
    return " to ".join(format_points(bound) for bound in bounds)


def interval_bounds(interval: Interval | None) -> Bounds | None:
    """Return the low and high bound, or None if either is unknown."""
    if interval is None:
        return None
    low, high = finite_number(interval.low), finite_number(interval.high)
    return None if low is None or high is None else (low, high)


def _format_gap(summary: RunSummary) -> str:
    gap_closed = finite_number(summary.gap_closed)
    if gap_closed is None:
        return ""
    return f"{gap_closed * 100:.0f} %".replace("-", MINUS)


def _compare_with_cloud(summary: RunSummary) -> str:
    bounds = interval_bounds((summary.vs_cloud_interval or {}).get("student"))
    if bounds is None:
        return ""
    scores = summary.map50
    change = format_change(scores.get("student"), scores.get("cloud"))
    figures = f"{change} points mAP50, 95 % interval {format_interval(bounds)}"
    verdicts = {
        "better": f"Yes: {figures}.",
        "worse": f"No: {figures}.",
        "": (
            f"These test images can't tell: {figures}, which includes zero. More"
            " annotated test images would."
        ),
    }
    return f"{verdicts[change_verdict(*bounds)]}{_compare_with_baseline(summary)}"


def _compare_with_baseline(summary: RunSummary) -> str:
    """Say how much of the change plain pseudo-labels would have brought too."""
    baseline = finite_number(summary.map50.get("pseudo_label"))
    if baseline is None:
        return ""
    change = format_change(summary.map50.get("student"), baseline)
    return f" Against the same student on plain cloud labels: {change} points."


def _explain_choice(summary: RunSummary) -> str:
    return "" if summary.choice is None else summary.choice.reason


def _list_worse_classes(summary: RunSummary) -> str:
    per_class = summary.per_class or {}
    if not {"student", "cloud"} <= set(per_class):
        return ""
    intervals = summary.class_change_interval
    if intervals is None:
        intervals = ((None, None),) * len(summary.classes)
    worse_classes = []
    for student, cloud, name, interval in zip(
        per_class["student"],
        per_class["cloud"],
        summary.classes,
        intervals,
        strict=True,
    ):
        if finite_number(student) is None or finite_number(cloud) is None:
            continue
        assert student is not None
        assert cloud is not None
        if student < cloud:
            by_chance = "" if change_verdict(*interval) else " (may be chance)"
            text = f"{name} {format_change(student, cloud)}{by_chance}"
            worse_classes.append((student - cloud, name, text))
    if not worse_classes:
        return "On no class with test objects does the student score below the cloud."
    texts = [text for _, _, text in sorted(worse_classes)]
    unlisted = max(len(texts) - MAX_CLASSES, 0)
    suffix = f" and {unlisted} more" if unlisted else ""
    return f"Below the cloud: {', '.join(texts[:MAX_CLASSES])}{suffix}."


def _describe_cost(summary: RunSummary) -> str:
    call_count = finite_number(summary.calls.made)
    cost = finite_number(summary.calls.cost_usd)
    if call_count is None:
        return ""
    call_count += finite_number(summary.calls.maybe_billed) or 0
    costs = [f"{call_count:,.0f} cloud calls"]
    if cost is not None:
        costs.append(format_usd(cost))
    seconds = finite_number(summary.seconds.get("total"))
    if seconds:
        costs.append(f"{format_duration(seconds)} of work")
    text = f"{', '.join(costs)}."
    if not cost or not call_count:
        return text
    cost_of_1000 = format_usd(1000 * cost / call_count)
    return (
        f"{text} 1,000 further images would cost {cost_of_1000} at the cloud, and nothing"
        " with the student."
    )


def _describe_evidence(summary: RunSummary) -> str:
    """Say on how many images the student was measured, and what intervals leave out."""
    image_count = summary.images.get("test")
    if not image_count or finite_number(summary.map50.get("student")) is None:
        return ""
    text = f"Measured on {image_count:,} annotated test images that no training read."
    if not summary.map50_interval:
        return text
    return (
        f"{text} Intervals come from drawing the test images anew (bootstrap); they"
        " don't include chance in training: try further seeds."
    )
