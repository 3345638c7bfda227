"""Geometry of the page's charts: numbers in, percentages and SVG path data out. The template draws them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from coin_ray.report.methods import METHODS, MINUS, Method, number, points

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
    name: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True, slots=True)
class Segment:
    """One part of a stacked bar; ``start`` and ``width`` in percent of the whole."""

    name: str
    count: int
    start: float
    width: float


@dataclass(frozen=True, slots=True)
class Panel:
    """One curve in a box of 100 x 100 with y downwards: ``path`` and ``area`` are SVG path data; the texts label the axes."""

    metric: str
    path: str
    area: str
    top: str
    bottom: str
    first: str
    last: str
    final: str


@dataclass(frozen=True, slots=True)
class RunCurves:
    name: str
    panels: tuple[Panel, ...]


def class_bars(classes: Sequence[str], per_class: dict[str, list[float]], keys: Sequence[str]) -> tuple[ClassBars, ...]:
    """Bars of each class for those of ``keys`` that have values; ``per_class`` holds shares in 0..1, NaN where undefined."""
    methods = [m for m in METHODS if m.key in keys and m.key in per_class]
    if not methods:
        return ()
    return tuple(ClassBars(name, tuple(_bar(m, per_class[m.key], i) for m in methods)) for i, name in enumerate(classes))


def stacked(counts: dict[str, int]) -> tuple[Segment, ...]:
    """The parts of a stacked bar, in the order given; empty if there is nothing to show."""
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
    """One panel per run and metric; values that aren't finite are left out, and so are panels of a single point."""
    series: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for run, step, metric, value in rows:
        if number(value) is not None:
            series[run][metric].append((step, value))
    order = sorted(series, key=lambda run: (RUNS.index(run) if run in RUNS else len(RUNS), run))
    runs = (RunCurves(run, tuple(_panel(m, sorted(p)) for m, p in series[run].items() if len(p) > 1)) for run in order)
    return tuple(run for run in runs if run.panels)


def _bar(method: Method, values: Sequence[float], index: int) -> Bar:
    value = number(values[index]) if index < len(values) else None
    return Bar(method, None if value is None else 100 * min(max(value, 0.0), 1.0), points(value))


def _panel(metric: str, raw: list[tuple[int, float]]) -> Panel:
    curve = _binned(raw)
    low, high = _limits([value for _, value in curve])
    first, last = raw[0][0], raw[-1][0]
    span = max(last - first, 1)
    places = [(100 * (step - first) / span, 100 * (high - value) / (high - low)) for step, value in curve]
    path = "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in places)
    area = f"{path}L{places[-1][0]:.2f} 100L{places[0][0]:.2f} 100Z"
    return Panel(metric, path, area, _short(high), _short(low), f"{first:,}", f"{last:,}", _short(curve[-1][1]))


def _binned(raw: list[tuple[int, float]]) -> list[tuple[float, float]]:
    size = math.ceil(len(raw) / MOST_POINTS)
    bins = [raw[i : i + size] for i in range(0, len(raw), size)]
    return [(sum(s for s, _ in b) / len(b), sum(v for _, v in b) / len(b)) for b in bins]


def _limits(values: list[float]) -> tuple[float, float]:
    """Axis limits: from zero for positive values, so that heights compare; never empty."""
    low, high = min(0.0, *values), max(0.0, *values)
    return (low, high) if high > low else (low, low + 1)


def _short(value: float) -> str:
    return f"{value:.3g}".replace("-", MINUS) if abs(value) < 1000 else f"{value:,.0f}"
