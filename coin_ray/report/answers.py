"""What whoever paid for the run asks first, answered in a sentence each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coin_ray.report.charts import sure
from coin_ray.report.methods import MINUS, difference, duration, money, number, points

MOST_CLASSES = 6
"""So many classes are named before "and N more"."""


@dataclass(frozen=True, slots=True)
class Headline:
    """``text``: the verdict; figures in points; ``interval``: 95 % of the change; all
    but the text may be empty.
    """

    text: str
    student: str = ""
    cloud: str = ""
    change: str = ""
    interval: str = ""
    gap: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    question: str
    text: str


def headline(summary: Mapping[str, Any]) -> Headline:
    scores = summary.get("map50") or {}
    student, cloud = number(scores.get("student")), number(scores.get("cloud"))
    if student is None:
        return Headline(
            "No annotated test images were given, so nothing here was measured against"
            " truth."
        )
    if cloud is None:
        return Headline(
            "The student was evaluated; the cloud was not.", student=points(student)
        )
    change = difference(student, cloud)
    size = change.lstrip("+" + MINUS)
    verdict = {
        "+": f"scores {size} points above",
        MINUS: f"scores {size} points below",
    }.get(change[0], "scores the same as")
    text = (
        f"The student {verdict} the cloud detector it learned from, and needs no cloud"
        " call."
    )
    return Headline(
        text,
        points(student),
        points(cloud),
        change,
        interval_text(_interval(summary, "vs_cloud_interval")),
        _gap(summary),
    )


def answers(summary: Mapping[str, Any]) -> list[Answer]:
    """Those that this run can give."""
    asked = {
        "Is it better than the cloud?": _better(summary),
        "For which classes not?": _classes(summary),
        "What did it cost?": _cost(summary),
        "Can it be believed?": _belief(summary),
    }
    return [Answer(question, text) for question, text in asked.items() if text]


def interval_text(low_high: tuple[float, float] | None, signed: bool = True) -> str:
    """``+4.0 to +11.7``, or without signs; empty if unknown."""
    if low_high is None:
        return ""
    return " to ".join(difference(v, 0.0) if signed else points(v) for v in low_high)


def bounds(found: object) -> tuple[float, float] | None:
    """Low and high of ``{"low": ., "high": .}``."""
    if not isinstance(found, Mapping):
        return None
    low, high = number(found.get("low")), number(found.get("high"))
    return None if low is None or high is None else (low, high)


def _interval(
    summary: Mapping[str, Any], name: str, method: str = "student"
) -> tuple[float, float] | None:
    return bounds((summary.get(name) or {}).get(method))


def _gap(summary: Mapping[str, Any]) -> str:
    closed = number(summary.get("gap_closed"))
    return "" if closed is None else f"{closed * 100:.0f} %".replace("-", MINUS)


def _better(summary: Mapping[str, Any]) -> str:
    found = _interval(summary, "vs_cloud_interval")
    if found is None:
        return ""
    change = difference(
        *((summary.get("map50") or {}).get(k) for k in ("student", "cloud"))
    )
    figures = f"{change} points mAP50, 95 % interval {interval_text(found)}"
    verdict = {
        "better": f"Yes: {figures}.",
        "worse": f"No: {figures}.",
        "": (
            f"These test images can't tell: {figures}, which includes zero. More"
            " annotated test images would."
        ),
    }[sure(*found)]
    return f"{verdict}{_baseline(summary)}"


def _baseline(summary: Mapping[str, Any]) -> str:
    """Is it the method, or would plain pseudo-labels have done?"""
    scores = summary.get("map50") or {}
    plain = number(scores.get("pseudo_label"))
    if plain is None:
        return ""
    return (
        " Against the same student on plain cloud labels:"
        f" {difference(scores.get('student'), plain)} points."
    )


def _classes(summary: Mapping[str, Any]) -> str:
    per_class, names = summary.get("per_class") or {}, summary.get("classes") or ()
    if not {"student", "cloud"} <= set(per_class):
        return ""
    spans = summary.get("class_change_interval") or [(None, None)] * len(names)
    rows = [
        (o, c, n, s)
        for o, c, n, s in zip(
            per_class["student"], per_class["cloud"], names, spans, strict=True
        )
    ]
    lower = sorted(
        (o - c, n, s, difference(o, c))
        for o, c, n, s in rows
        if number(o) is not None and number(c) is not None and o < c
    )
    if not lower:
        return "On no class with test objects does the student score below the cloud."
    told = [
        f"{name} {change}{'' if sure(*span) else ' (may be chance)'}"
        for _, name, span, change in lower
    ]
    more = f" and {len(told) - MOST_CLASSES} more" if len(told) > MOST_CLASSES else ""
    return f"Below the cloud: {', '.join(told[:MOST_CLASSES])}{more}."


def _cost(summary: Mapping[str, Any]) -> str:
    calls, seconds = (
        summary.get("calls") or {},
        (summary.get("seconds") or {}).get("total"),
    )
    made, paid = number(calls.get("made")), number(calls.get("cost_usd"))
    if made is None:
        return ""
    took = f"{duration(seconds)} of work" if number(seconds) else ""
    spent = [
        f"{made:,.0f} cloud calls",
        *([money(paid)] if paid is not None else []),
        *([took] if took else []),
    ]
    per = (
        f" 1,000 further images would cost {money(1000 * paid / made)} at the cloud,"
        " and nothing with the student."
        if paid and made
        else ""
    )
    return f"{', '.join(spent)}.{per}"


def _belief(summary: Mapping[str, Any]) -> str:
    images = (summary.get("images") or {}).get("test")
    if not images or number((summary.get("map50") or {}).get("student")) is None:
        return ""
    chance = (
        " Intervals come from drawing the test images anew (bootstrap); they don't"
        " include chance in training: try further seeds."
    )
    return (
        f"Measured on {images:,} annotated test images that no training"
        f" read.{chance if summary.get('map50_interval') else ''}"
    )
