"""Geometry of the page's charts: numbers in, percentages and SVG path data out. The
templates draw them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coin_ray.report.methods import METHODS, MINUS, Method, difference, number, points

CurveRow = tuple[str, int, str, float]
"""(run, step, metric, value)"""

MOST_POINTS = 240
"""A longer curve is averaged into this many bins."""
RUNS = ("propagate", "distill")
"""Order of the runs on the page; others follow by name."""


@dataclass(frozen=True, slots=True)
class Bar:
    """``width``: percent of the track; None where there is no value."""

    method: Method
    width: float | None
    text: str


@dataclass(frozen=True, slots=True)
class ClassBars:
    """``change``: the student against the cloud, signed points, and ``interval`` its 95
    %; ``sure``: better, worse or empty.
    """

    name: str
    bars: tuple[Bar, ...]
    objects: int | None = None
    change: str = ""
    interval: str = ""
    sure: str = ""


@dataclass(frozen=True, slots=True)
class Segment:
    """One part of a stacked bar; ``start`` and ``width`` in percent of the whole."""

    name: str
    count: int
    start: float
    width: float


@dataclass(frozen=True, slots=True)
class Line:
    """One curve of a plot of 100 x 100 with y downwards: SVG path data; ``area`` may be
    empty, ``dots`` are (x, y, size).
    """

    name: str
    hue: str
    path: str
    area: str = ""
    dots: tuple[tuple[float, float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Plot:
    """Lines in one box; the texts label the axes, ``final`` stands beside the title.
    ``diagonal``: from the lower left to the upper right.
    """

    title: str
    lines: tuple[Line, ...]
    top: str
    bottom: str
    first: str
    last: str
    final: str = ""
    diagonal: bool = False
    note: str = ""


@dataclass(frozen=True, slots=True)
class RunCurves:
    name: str
    panels: tuple[Plot, ...]


def class_bars(
    classes: Sequence[str],
    per_class: Mapping[str, Sequence[float]],
    keys: Sequence[str],
    objects: Sequence[int] = (),
    intervals: Sequence[Sequence[float | None]] = (),
) -> tuple[ClassBars, ...]:
    """Bars of each class for those of ``keys`` that have values, the student's worst
    change against the cloud first.

    ``per_class``: shares in 0..1, NaN where undefined; ``objects``: truth boxes and
    ``intervals``: low and high of the change, by class.
    """
    methods = [m for m in METHODS if m.key in keys and m.key in per_class]
    if not methods:
        return ()
    rows = []
    for i, name in enumerate(classes):
        ours, theirs = (_at(per_class.get(key, ()), i) for key in ("student", "cloud"))
        low, high = intervals[i] if i < len(intervals) else (None, None)
        bars = tuple(_bar(m, per_class[m.key], i) for m in methods)
        span = (
            "" if low is None or high is None else f"{_signed(low)} to {_signed(high)}"
        )
        row = ClassBars(
            name,
            bars,
            objects[i] if i < len(objects) else None,
            difference(ours, theirs),
            span,
            sure(low, high),
        )
        rows.append(
            (math.inf if ours is None or theirs is None else ours - theirs, row)
        )
    return tuple(row for _, row in sorted(rows, key=lambda pair: pair[0]))


def sure(low: float | None, high: float | None) -> str:
    """``better`` or ``worse`` if the interval of a change holds only such values, else
    empty.
    """
    if low is None or high is None or low <= 0 <= high:
        return ""
    return "better" if low > 0 else "worse"


def stacked(counts: dict[str, int]) -> tuple[Segment, ...]:
    """The parts of a stacked bar, in the order given; empty if there is nothing to
    show.
    """
    total = sum(counts.values())
    if total <= 0:
        return ()
    segments, start = [], 0.0
    for name, count in counts.items():
        width = 100 * count / total
        segments.append(Segment(name, count, start, width))
        start += width
    return tuple(segments)


def curves_by_run(rows: Sequence[CurveRow]) -> tuple[RunCurves, ...]:
    """One panel per run and metric; values that aren't finite are left out, and so are
    panels of a single point.
    """
    series = by_run(rows)
    order = sorted(
        series, key=lambda run: (RUNS.index(run) if run in RUNS else len(RUNS), run)
    )
    runs = (
        RunCurves(
            run,
            tuple(
                panel(m, sorted(p), hue(run))
                for m, p in series[run].items()
                if len(p) > 1
            ),
        )
        for run in order
    )
    return tuple(run for run in runs if run.panels)


def by_run(rows: Sequence[CurveRow]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Finite points (step, value) by run and metric."""
    series: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for run, step, metric, value in rows:
        if number(value) is not None:
            series[run][metric].append((step, value))
    return series


def hue(run: str) -> str:
    return {"propagate": "clip", "distill": "student"}.get(run, "neutral")


def panel(metric: str, raw: list[tuple[int, float]], colour: str) -> Plot:
    """One curve over steps, from zero where it is positive."""
    curve = binned(raw)
    low, high = _limits([value for _, value in curve])
    first, last = raw[0][0], raw[-1][0]
    span = max(last - first, 1)
    places = [
        (100 * (step - first) / span, 100 * (high - value) / (high - low))
        for step, value in curve
    ]
    area = f"{path(places)}L{places[-1][0]:.2f} 100L{places[0][0]:.2f} 100Z"
    line = Line(metric, colour, path(places), area)
    return Plot(
        metric,
        (line,),
        short(high),
        short(low),
        f"{first:,}",
        f"step {last:,}",
        short(curve[-1][1]),
    )


def shares(
    rows: Mapping[str, list[tuple[int, float]]],
    lines: Mapping[str, tuple[str, str]],
    title: str,
    note: str,
) -> Plot | None:
    """Lines of shares 0..1 over steps: ``lines`` gives name and hue by metric; None if
    one of them is missing or has one point.
    """
    if any(len(rows.get(metric, ())) < 2 for metric in lines):
        return None
    steps = [step for metric in lines for step, _ in rows[metric]]
    first, last = min(steps), max(steps)
    drawn = [
        Line(
            name,
            colour,
            path(
                [
                    (100 * (s - first) / max(last - first, 1), 100 - 100 * v)
                    for s, v in binned(sorted(rows[metric]))
                ]
            ),
        )
        for metric, (name, colour) in lines.items()
    ]
    return Plot(
        title, tuple(drawn), "100 %", "0", f"{first:,}", f"step {last:,}", note=note
    )


def layered(
    rows: Mapping[str, list[tuple[int, float]]],
    lines: Mapping[str, tuple[str, str]],
    title: str,
    note: str,
) -> Plot | None:
    """Counts as shares of their sum over steps, stacked upwards in the order of
    ``lines``; None if there is nothing to show.
    """
    known = [dict(rows.get(metric, ())) for metric in lines]
    steps = sorted(
        s
        for s in set(known[0]).intersection(*known[1:])
        if sum(k[s] for k in known) > 0
    )
    if len(steps) < 2:
        return None
    at = [
        [(s, sum(k[s] for k in known[:upto]) / sum(k[s] for k in known)) for s in steps]
        for upto in range(len(known) + 1)
    ]
    edges = [
        [
            (100 * (s - steps[0]) / (steps[-1] - steps[0]), 100 - 100 * v)
            for s, v in binned(edge)
        ]
        for edge in at
    ]
    drawn = []
    for below, above, (name, colour) in zip(
        edges, edges[1:], lines.values(), strict=False
    ):
        around = "L".join(f"{x:.2f} {y:.2f}" for x, y in reversed(below))
        drawn.append(Line(name, colour, path(above), f"{path(above)}L{around}Z"))
    return Plot(
        title,
        tuple(drawn),
        "100 %",
        "0",
        f"{steps[0]:,}",
        f"step {steps[-1]:,}",
        note=note,
    )


def precision_recall(
    curves: Mapping[str, Sequence[float]], keys: Sequence[str], title: str
) -> Plot | None:
    """Precision over recall, both 0..1, of the methods that have values; NaN is not
    drawn.
    """
    drawn = []
    for method in (m for m in METHODS if m.key in keys and m.key in curves):
        values = curves[method.key]
        places = [
            (100 * i / (len(values) - 1), 100 - 100 * v)
            for i, v in enumerate(values)
            if number(v) is not None
        ]
        if places:
            drawn.append(Line(method.name, method.hue, path(places)))
    return Plot(title, tuple(drawn), "1", "0", "0", "recall 1") if drawn else None


def reliability(
    bins: Sequence[Mapping[str, float]], title: str, colour: str, error: object
) -> Plot | None:
    """Share right over confidence, with the diagonal of perfect calibration; dots grow
    with the cases of their bin.
    """
    if not bins:
        return None
    most = max(b["count"] for b in bins)
    places = [(100 * b["confidence"], 100 - 100 * b["right"]) for b in bins]
    dots = tuple(
        (x, y, 4 + 8 * math.sqrt(b["count"] / most))
        for (x, y), b in zip(places, bins, strict=True)
    )
    line = Line(title, colour, path(places), dots=dots)
    return Plot(
        title,
        (line,),
        "100 %",
        "0",
        "0",
        "confidence 100 %",
        points(error),
        diagonal=True,
    )


def path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in places)


def binned(raw: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS means of neighbours."""
    size = math.ceil(len(raw) / MOST_POINTS)
    bins = [raw[i : i + size] for i in range(0, len(raw), size)]
    return [
        (sum(s for s, _ in b) / len(b), sum(v for _, v in b) / len(b)) for b in bins
    ]


def short(value: float) -> str:
    return f"{value:.3g}".replace("-", MINUS) if abs(value) < 1000 else f"{value:,.0f}"


def _at(values: Sequence[float], index: int) -> float | None:
    return number(values[index]) if index < len(values) else None


def _signed(share: float) -> str:
    return difference(share, 0.0)


def _bar(method: Method, values: Sequence[float], index: int) -> Bar:
    value = _at(values, index)
    return Bar(
        method,
        None if value is None else 100 * min(max(value, 0.0), 1.0),
        points(value),
    )


def _limits(values: list[float]) -> tuple[float, float]:
    """Axis limits: from zero for positive values, so that heights compare; never empty."""
    low, high = min(0.0, *values), max(0.0, *values)
    return (low, high) if high > low else (low, low + 1)
