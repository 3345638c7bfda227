"""What a grid found, as rows with mean and standard deviation over seeds: in the
terminal, in Markdown and as a figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from coin_ray.report.methods import DASH, METHODS, difference, number, points

GAP = "Gap closed"
"""A row that is no mAP50: a share of the way from the cloud to the oracle."""
PERCENT = 5.2
"""Width of one percent in the figure, in pixels; the other measures are pixels too."""
LABELS, HEIGHT, BAR = 250, 26, 16


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table. ``values``: shares in 0..1, one per seed; ``note``: a last
    column, in words.
    """

    name: str
    group: str
    values: tuple[float, ...]
    note: str = ""

    @property
    def mean(self) -> float | None:
        return fmean(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        """Of the sample (n - 1); None for fewer than two seeds."""
        return stdev(self.values) if len(self.values) > 1 else None

    @property
    def text(self) -> str:
        spread = "" if self.std is None else f" ± {points(self.std)}"
        return f"{points(self.mean)}{spread}"


def variant_rows(
    records: Sequence[Mapping[str, Any]],
    notes: Mapping[tuple[str, str], str] | None = None,
) -> list[Row]:
    """The student's mAP50 by variant and group, in the order of the records."""
    found: dict[tuple[str, str], list[float]] = {}
    for record in records:
        values = found.setdefault((record["variant"], record["group"]), [])
        if (value := number(record["map50"].get("student"))) is not None:
            values.append(value)
    return [
        Row(name, group, tuple(values), (notes or {}).get((name, group), ""))
        for (name, group), values in found.items()
    ]


def method_rows(records: Sequence[Mapping[str, Any]]) -> list[Row]:
    """mAP50 of every method of the same run, teachers and baselines, and last the share
    of the gap closed.
    """
    rows = [
        Row(m.name, "", _numbers(r["map50"].get(m.key) for r in records), m.needs)
        for m in METHODS
    ]
    gap = Row(
        GAP,
        "",
        _numbers(r["gap_closed"] for r in records),
        "(student - cloud) / (oracle - cloud)",
    )
    return [replace(row, values=_once(row.values)) for row in rows if row.values] + (
        [gap] if gap.values else []
    )


def _numbers(values: Any) -> tuple[float, ...]:
    return tuple(known for value in values if (known := number(value)) is not None)


def _once(values: tuple[float, ...]) -> tuple[float, ...]:
    """What no seed changes, as the cloud's own figure, was measured once."""
    return values[:1] if len(set(values)) == 1 else values


def print_rows(title: str, rows: Sequence[Row]) -> None:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    header, *lines = _cells(rows)
    for column in header:
        table.add_column(
            column,
            justify="left" if column in ("", "group", "note") else "right",
            header_style="dim",
        )
    for line in lines:
        table.add_row(*line)
    Console(width=120).print(table)


def markdown(rows: Sequence[Row]) -> str:
    header, *lines = _cells(rows)
    return (
        "\n".join(
            "| " + " | ".join(line) + " |"
            for line in (header, ["---"] * len(header), *lines)
        )
        + "\n"
    )


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    """Header and lines; a column of groups only where there are any."""
    grouped = any(row.group for row in rows)
    header = [
        "",
        *(["group"] if grouped else []),
        "mAP50",
        f"vs {rows[0].name}" if rows else "",
        "by seed",
        "note",
    ]
    return [
        header,
        *(
            [
                row.name,
                *([row.group or DASH] if grouped else []),
                *_figures(row, rows[0]),
                row.note,
            ]
            for row in rows
        ),
    ]


def _figures(row: Row, first: Row) -> list[str]:
    compared = (
        "" if row is first or row.name == GAP else difference(row.mean, first.mean)
    )
    return [
        f"{row.text} %" if row.name == GAP else row.text,
        compared,
        " / ".join(points(value) for value in row.values),
    ]


def figure(title: str, rows: Sequence[Row]) -> str:
    """SVG: a bar for each mean, a whisker of one standard deviation to both sides, a
    dot for each seed; the axis is in points.
    """
    known = [row for row in rows if row.mean is not None]
    most = max(
        (
            value
            for row in known
            for value in (*row.values, (row.mean or 0) + (row.std or 0))
        ),
        default=0.0,
    )
    limit = max(10, -(-int(1000 * most) // 100) * 10)
    width, height = LABELS + limit * PERCENT + 90, 60 + HEIGHT * len(known)
    parts = [
        f'<text x="10" y="22" font-weight="600">{escape(title)}</text>',
        *_axis(limit, height),
    ]
    for index, row in enumerate(known):
        parts += _bar(row, 40 + HEIGHT * index)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}"'
        f' viewBox="0 0 {width:.0f} {height}" font-family="system-ui, sans-serif"'
        ' font-size="13"><rect width="100%" height="100%"'
        f' fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _axis(limit: int, height: int) -> list[str]:
    parts = []
    for tick in range(0, limit + 1, 10):
        x = LABELS + tick * PERCENT
        parts.append(f'<path d="M{x:.1f} 36V{height - 22}" stroke="#ddd"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{height - 8}" text-anchor="middle" fill="#777"'
            f' font-size="11">{tick}</text>'
        )
    return parts


def _bar(row: Row, top: int) -> list[str]:
    def place(value: float) -> float:
        return LABELS + 100 * max(value, 0.0) * PERCENT

    mean, spread, middle = row.mean or 0.0, row.std or 0.0, top + BAR / 2
    label = ", ".join(part for part in (row.name, row.group) if part)
    dots = [
        f'<circle cx="{place(value):.1f}" cy="{middle}" r="2.5" fill="#123"/>'
        for value in row.values
    ]
    low, high = place(mean - spread), place(mean + spread)
    return [
        (
            f'<text x="{LABELS - 8}" y="{top + 13}"'
            f' text-anchor="end">{escape(label)}</text>'
        ),
        (
            f'<rect x="{LABELS}" y="{top}" width="{place(mean) - LABELS:.1f}"'
            f' height="{BAR}" fill="#8fb3d9"/>'
        ),
        (
            f'<path d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {top + 4}v8M{high:.1f}'
            f' {top + 4}v8" stroke="#123" fill="none"/>'
        ),
        *dots,
        (
            f'<text x="{max(high, *(place(v) for v in row.values)) + 8:.1f}"'
            f' y="{top + 13}" fill="#333">{escape(row.text)}</text>'
        ),
    ]
