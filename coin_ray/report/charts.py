"""Geometry of the page's charts: percentages and SVG path data, drawn by templates."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coin_ray.report.methods import (
    METHODS,
    MINUS,
    Method,
    finite_number,
    format_change,
    format_points,
)

CurveRow = tuple[str, int, str, float]
"""(run, step, metric, value)"""
CurvePoints = list[tuple[int, float]]
"""(step, value)"""
LineStyles = Mapping[str, tuple[str, str]]
"""Name and hue of a line by metric."""

MAX_POINTS = 240
"""A longer curve is averaged into this many bins."""
RUNS = ("propagate", "distill")
"""Order of the runs on the page; others follow by name."""
RUN_HUES = {"propagate": "clip", "distill": "student"}


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of a method; ``width``: percent of the track, None without a value."""

    method: Method
    width: float | None
    text: str


@dataclass(frozen=True, slots=True)
class ClassBars:
    """The bars of a class.

    ``change``: the student against the cloud in signed points, with its 95 %
    ``interval``. ``sure``: "better", "worse", or "" if the interval includes zero.
    """

    name: str
    bars: tuple[Bar, ...]
    objects: int | None = None
    change: str = ""
    interval: str = ""
    sure: str = ""


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a stacked bar; ``start`` and ``width``: percent of the whole."""

    name: str
    count: int
    start: float
    width: float


@dataclass(frozen=True, slots=True)
class Line:
    """A curve of a plot as SVG path data.

    Coordinates are 0..100 with y downwards. ``area``: path below the line, may be empty.
    ``dots``: (x, y, size).
    """

    name: str
    hue: str
    path: str
    area: str = ""
    dots: tuple[tuple[float, float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Plot:
    """Lines in one box.

    ``top``, ``bottom``, ``first`` and ``last`` label the axes, ``final`` is beside the
    title. ``diagonal``: draw a line from the lower left to the upper right.
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
    """The plots of one training run."""

    name: str
    panels: tuple[Plot, ...]


def build_class_bars(
    classes: Sequence[str],
    per_class: Mapping[str, Sequence[float | None]],
    keys: Sequence[str],
    objects: Sequence[int] = (),
    intervals: Sequence[Sequence[float | None]] = (),
) -> tuple[ClassBars, ...]:
    """Return the bars of each class for those methods of ``keys`` that have values.

    The class with the student's worst change against the cloud comes first.
    ``per_class``: AP in 0..1 by method, None or NaN where undefined. ``objects``: truth boxes,
    ``intervals``: low and high of the change, by class.
    """
    methods = [m for m in METHODS if m.key in keys and m.key in per_class]
    if not methods:
        return ()
    student_aps, cloud_aps = (per_class.get(key, ()) for key in ("student", "cloud"))
    rows = []
    for index, name in enumerate(classes):
        student, cloud = _number_at(student_aps, index), _number_at(cloud_aps, index)
        low, high = intervals[index] if index < len(intervals) else (None, None)
        interval = ""
        if low is not None and high is not None:
            interval = f"{format_change(low, 0.0)} to {format_change(high, 0.0)}"
        class_bars = ClassBars(
            name,
            tuple(_class_bar(m, per_class[m.key], index) for m in methods),
            objects=objects[index] if index < len(objects) else None,
            change=format_change(student, cloud),
            interval=interval,
            sure=change_verdict(low, high),
        )
        change = math.inf if student is None or cloud is None else student - cloud
        rows.append((change, class_bars))
    return tuple(bars for _, bars in sorted(rows, key=lambda row: row[0]))


def change_verdict(low: float | None, high: float | None) -> str:
    """Return "better" or "worse" if an interval leaves out zero, else ""."""
    if low is None or high is None or low <= 0 <= high:
        return ""
    return "better" if low > 0 else "worse"


def stack_segments(counts: Mapping[str, int]) -> tuple[Segment, ...]:
    """Return the segments of a stacked bar in the given order; empty if all are zero."""
    total = sum(counts.values())
    if total <= 0:
        return ()
    segments = []
    start = 0.0
    for name, count in counts.items():
        width = 100 * count / total
        segments.append(Segment(name, count, start, width))
        start += width
    return tuple(segments)


def plot_training_curves(rows: Sequence[CurveRow]) -> tuple[RunCurves, ...]:
    """Return one plot per run and metric.

    Values that are not finite are left out, and so are curves of a single point.
    """
    curves_by_run = group_curves(rows)
    known_runs = [run for run in RUNS if run in curves_by_run]
    other_runs = sorted(curves_by_run.keys() - set(RUNS))
    run_curves = []
    for run in (*known_runs, *other_runs):
        plots = tuple(
            plot_curve(metric, sorted(curve), RUN_HUES.get(run, "neutral"))
            for metric, curve in curves_by_run[run].items()
            if len(curve) > 1
        )
        if plots:
            run_curves.append(RunCurves(run, plots))
    return tuple(run_curves)


def group_curves(rows: Sequence[CurveRow]) -> dict[str, dict[str, CurvePoints]]:
    """Return the finite points (step, value) by run and metric."""
    curves: dict[str, dict[str, CurvePoints]] = defaultdict(lambda: defaultdict(list))
    for run, step, metric, value in rows:
        if finite_number(value) is not None:
            curves[run][metric].append((step, value))
    return curves


def plot_curve(metric: str, curve: CurvePoints, hue: str) -> Plot:
    """Plot one curve over steps; the axis starts at zero if all values are positive."""
    averaged = average_bins(curve)
    low, high = _axis_limits([value for _, value in averaged])
    first, last = curve[0][0], curve[-1][0]
    steps = max(last - first, 1)
    points = [
        (100 * (step - first) / steps, 100 * (high - value) / (high - low))
        for step, value in averaged
    ]
    line_path = svg_path(points)
    left, right = points[0][0], points[-1][0]
    area = f"{line_path}L{right:.2f} 100L{left:.2f} 100Z"
    return Plot(
        metric,
        (Line(metric, hue, line_path, area),),
        top=_format_short(high),
        bottom=_format_short(low),
        first=f"{first:,}",
        last=f"step {last:,}",
        final=_format_short(averaged[-1][1]),
    )


def plot_shares(
    curves: Mapping[str, CurvePoints], styles: LineStyles, title: str, note: str
) -> Plot | None:
    """Plot lines of shares in 0..1 over steps.

    Returns None if a metric of ``styles`` has fewer than two points.
    """
    if any(len(curves.get(metric, ())) < 2 for metric in styles):
        return None
    steps = [step for metric in styles for step, _ in curves[metric]]
    first, last = min(steps), max(steps)
    width = max(last - first, 1)
    lines = []
    for metric, (name, hue) in styles.items():
        points = [
            (100 * (step - first) / width, 100 - 100 * share)
            for step, share in average_bins(sorted(curves[metric]))
        ]
        lines.append(Line(name, hue, svg_path(points)))
    return _percent_plot(title, lines, first, last, note)


def plot_stacked_shares(
    curves: Mapping[str, CurvePoints], styles: LineStyles, title: str, note: str
) -> Plot | None:
    """Plot counts as shares of their sum over steps, stacked in the order of ``styles``.

    Returns None if there are fewer than two steps at which all counts are known and some
    are positive.
    """
    counts = [dict(curves.get(metric, ())) for metric in styles]
    common_steps = set(counts[0]).intersection(*counts[1:])
    totals = {step: sum(c[step] for c in counts) for step in common_steps}
    steps = sorted(step for step, total in totals.items() if total > 0)
    if len(steps) < 2:
        return None
    first, last = steps[0], steps[-1]
    edges = []
    for layer in range(len(counts) + 1):
        shares = [
            (step, sum(c[step] for c in counts[:layer]) / totals[step])
            for step in steps
        ]
        edge = [
            (100 * (step - first) / (last - first), 100 - 100 * share)
            for step, share in average_bins(shares)
        ]
        edges.append(edge)
    lines = []
    for layer, (name, hue) in enumerate(styles.values()):
        lower_edge = "L".join(f"{x:.2f} {y:.2f}" for x, y in reversed(edges[layer]))
        upper_edge = svg_path(edges[layer + 1])
        lines.append(Line(name, hue, upper_edge, f"{upper_edge}L{lower_edge}Z"))
    return _percent_plot(title, lines, first, last, note)


def _percent_plot(
    title: str, lines: Sequence[Line], first: int, last: int, note: str
) -> Plot:
    return Plot(
        title,
        tuple(lines),
        top="100 %",
        bottom="0",
        first=f"{first:,}",
        last=f"step {last:,}",
        note=note,
    )


def plot_precision_recall(
    curves: Mapping[str, Sequence[float]], keys: Sequence[str], title: str
) -> Plot | None:
    """Plot precision over recall, both in 0..1, of those methods of ``keys`` with values.

    NaN is not drawn; returns None if nothing is.
    """
    lines = []
    for method in METHODS:
        if method.key not in keys or method.key not in curves:
            continue
        precisions = curves[method.key]
        last_index = len(precisions) - 1
        points = [
            (100 * index / last_index, 100 - 100 * precision)
            for index, precision in enumerate(precisions)
            if finite_number(precision) is not None
        ]
        if points:
            lines.append(Line(method.name, method.hue, svg_path(points)))
    return Plot(title, tuple(lines), "1", "0", "0", "recall 1") if lines else None


def plot_reliability(
    bins: Sequence[Mapping[str, float]], title: str, hue: str, error: float | None
) -> Plot | None:
    """Plot accuracy over confidence, with the diagonal of perfect calibration.

    Bins have ``confidence``, ``right`` (the share that is right) and ``count``, which the
    size of a dot shows. ``error``: the calibration error.
    """
    if not bins:
        return None
    max_count = max(b["count"] for b in bins)
    points = [(100 * b["confidence"], 100 - 100 * b["right"]) for b in bins]
    sizes = [4 + 8 * math.sqrt(b["count"] / max_count) for b in bins]
    dots = tuple((x, y, size) for (x, y), size in zip(points, sizes, strict=True))
    return Plot(
        title,
        (Line(title, hue, svg_path(points), dots=dots),),
        top="100 %",
        bottom="0",
        first="0",
        last="confidence 100 %",
        final=format_points(error),
        diagonal=True,
    )


def svg_path(points: Sequence[tuple[float, float]]) -> str:
    """Return SVG path data of a line through the points (x, y)."""
    return "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in points)


def average_bins(curve: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """Average neighbours of a long curve, so that MAX_POINTS or fewer are left."""
    size = math.ceil(len(curve) / MAX_POINTS)
    averages = []
    for start in range(0, len(curve), size):
        neighbours = curve[start : start + size]
        step = sum(s for s, _ in neighbours) / len(neighbours)
        value = sum(v for _, v in neighbours) / len(neighbours)
        averages.append((step, value))
    return averages


def _format_short(number: float) -> str:
    if abs(number) < 1000:
        return f"{number:.3g}".replace("-", MINUS)
    return f"{number:,.0f}"


def _number_at(numbers: Sequence[float | None], index: int) -> float | None:
    return finite_number(numbers[index]) if index < len(numbers) else None


def _class_bar(method: Method, aps: Sequence[float | None], index: int) -> Bar:
    ap = _number_at(aps, index)
    width = None if ap is None else 100 * min(max(ap, 0.0), 1.0)
    return Bar(method, width, format_points(ap))


def _axis_limits(numbers: list[float]) -> tuple[float, float]:
    """Return limits that include zero, so that heights compare, and are not equal."""
    low, high = min(0.0, *numbers), max(0.0, *numbers)
    return (low, high) if high > low else (low, low + 1)
