"""What a grid measured, as rows with mean and standard deviation over seeds: in the
terminal, in Markdown and as a figure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from statistics import fmean, stdev

from rich.console import Console
from rich.table import Table

from coin_ray.experiments.grid import TrialResult
from coin_ray.report.methods import (
    DASH,
    METHODS,
    finite_number,
    format_change,
    format_points,
)

GAP_ROW = "Gap closed"
"""A row that is no mAP50: a share of the way from the cloud to the oracle."""
PERCENT = 5.2
"""Width of one percent in the figure, in pixels; the other measures are pixels too."""
LABEL_WIDTH, ROW_HEIGHT, BAR_HEIGHT = 250, 26, 16


@dataclass(frozen=True, slots=True)
class StudyRow:
    """One line of a table. ``by_seed``: shares in 0..1, one per seed; ``note``: a last
    column, in words.
    """

    name: str
    group: str
    by_seed: tuple[float, ...]
    note: str = ""

    @property
    def mean(self) -> float | None:
        return fmean(self.by_seed) if self.by_seed else None

    @property
    def std(self) -> float | None:
        """The standard deviation of the sample (n - 1); None for fewer than two seeds."""
        return stdev(self.by_seed) if len(self.by_seed) > 1 else None

    @property
    def text(self) -> str:
        spread = "" if self.std is None else f" ± {format_points(self.std)}"
        return f"{format_points(self.mean)}{spread}"


def variant_rows(
    results: Sequence[TrialResult],
    notes: Mapping[tuple[str, str], str] | None = None,
) -> list[StudyRow]:
    """Return the student's mAP50 by variant and group, in the order of the results."""
    map50_by_variant: dict[tuple[str, str], list[float]] = {}
    for trial_result in results:
        variant = trial_result["variant"], trial_result["group"]
        by_seed = map50_by_variant.setdefault(variant, [])
        map50 = finite_number(trial_result["map50"].get("student"))
        if map50 is not None:
            by_seed.append(map50)
    return [
        StudyRow(name, group, tuple(by_seed), (notes or {}).get((name, group), ""))
        for (name, group), by_seed in map50_by_variant.items()
    ]


def method_rows(results: Sequence[TrialResult]) -> list[StudyRow]:
    """Return mAP50 of every method of the same run, teachers and baselines, and last
    the share of the gap closed.
    """
    rows = []
    for method in METHODS:
        by_seed = _finite_numbers(r["map50"].get(method.key) for r in results)
        if by_seed:
            row = StudyRow(method.name, "", by_seed, method.needs)
            rows.append(replace(row, by_seed=_drop_repetitions(by_seed)))
    gaps = _finite_numbers(trial_result["gap_closed"] for trial_result in results)
    if gaps:
        formula = "(student - cloud) / (oracle - cloud)"
        rows.append(StudyRow(GAP_ROW, "", gaps, formula))
    return rows


def _finite_numbers(figures: Iterable[object]) -> tuple[float, ...]:
    numbers = (finite_number(figure) for figure in figures)
    return tuple(figure for figure in numbers if figure is not None)


def _drop_repetitions(by_seed: tuple[float, ...]) -> tuple[float, ...]:
    """Return one figure where no seed changes it, as the cloud's own."""
    return by_seed[:1] if len(set(by_seed)) == 1 else by_seed


def print_rows(title: str, rows: Sequence[StudyRow]) -> None:
    """Print the rows as a table in the terminal."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    header, *lines = _format_cells(rows)
    for column in header:
        is_text = column in ("", "group", "note")
        justify = "left" if is_text else "right"
        table.add_column(column, justify=justify, header_style="dim")  # type: ignore[arg-type]
    for line in lines:
        table.add_row(*line)
    Console(width=120).print(table)


def format_markdown(rows: Sequence[StudyRow]) -> str:
    """Return the rows as a Markdown table."""
    header, *lines = _format_cells(rows)
    all_lines = (header, ["---"] * len(header), *lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in all_lines)


def _format_cells(rows: Sequence[StudyRow]) -> list[list[str]]:
    """Return the header and the lines; a column of groups only where there are any."""
    grouped = any(row.group for row in rows)
    group_header = ["group"] if grouped else []
    reference = f"vs {rows[0].name}" if rows else ""
    lines = [["", *group_header, "mAP50", reference, "by seed", "note"]]
    for row in rows:
        group = [row.group or DASH] if grouped else []
        lines.append([row.name, *group, *_format_figures(row, rows[0]), row.note])
    return lines


def _format_figures(row: StudyRow, reference: StudyRow) -> list[str]:
    mean = f"{row.text} %" if row.name == GAP_ROW else row.text
    change = format_change(row.mean, reference.mean)
    if row is reference or row.name == GAP_ROW:
        change = ""
    by_seed = " / ".join(format_points(share) for share in row.by_seed)
    return [mean, change, by_seed]


def draw_rows(title: str, rows: Sequence[StudyRow]) -> str:
    """Return an SVG: a bar for each mean, a whisker of one standard deviation to both
    sides, a dot for each seed; the axis is in points.
    """
    drawn_rows = [row for row in rows if row.mean is not None]
    largest = max((_largest_share(row) for row in drawn_rows), default=0.0)
    # The axis ends at the next multiple of ten points, at least at ten.
    limit = max(10, -(-int(1000 * largest) // 100) * 10)
    width = LABEL_WIDTH + limit * PERCENT + 90
    height = 60 + ROW_HEIGHT * len(drawn_rows)
    parts = [
        f'<text x="10" y="22" font-weight="600">{escape(title)}</text>',
        *_draw_axis(limit, height),
    ]
    for index, row in enumerate(drawn_rows):
        parts += _draw_bar(row, 40 + ROW_HEIGHT * index)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}"'
        f' viewBox="0 0 {width:.0f} {height}" font-family="system-ui, sans-serif"'
        ' font-size="13"><rect width="100%" height="100%"'
        f' fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _largest_share(row: StudyRow) -> float:
    return max(*row.by_seed, (row.mean or 0) + (row.std or 0))


def _draw_axis(limit: int, height: int) -> list[str]:
    parts = []
    for tick in range(0, limit + 1, 10):
        x = LABEL_WIDTH + tick * PERCENT
        parts.append(f'<path d="M{x:.1f} 36V{height - 22}" stroke="#ddd"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{height - 8}" text-anchor="middle" fill="#777"'
            f' font-size="11">{tick}</text>'
        )
    return parts


def _x_position(share: float) -> float:
    return LABEL_WIDTH + 100 * max(share, 0.0) * PERCENT


def _draw_bar(row: StudyRow, top: int) -> list[str]:
    mean, spread = row.mean or 0.0, row.std or 0.0
    middle = top + BAR_HEIGHT / 2
    label = ", ".join(part for part in (row.name, row.group) if part)
    dot_positions = [_x_position(share) for share in row.by_seed]
    dots = [
        f'<circle cx="{x:.1f}" cy="{middle}" r="2.5" fill="#123"/>'
        for x in dot_positions
    ]
    low, high = _x_position(mean - spread), _x_position(mean + spread)
    bar_width = _x_position(mean) - LABEL_WIDTH
    text_position = max(high, *dot_positions) + 8
    return [
        (
            f'<text x="{LABEL_WIDTH - 8}" y="{top + 13}"'
            f' text-anchor="end">{escape(label)}</text>'
        ),
        (
            f'<rect x="{LABEL_WIDTH}" y="{top}" width="{bar_width:.1f}"'
            f' height="{BAR_HEIGHT}" fill="#8fb3d9"/>'
        ),
        (
            f'<path d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {top + 4}v8M{high:.1f}'
            f' {top + 4}v8" stroke="#123" fill="none"/>'
        ),
        *dots,
        (
            f'<text x="{text_position:.1f}" y="{top + 13}"'
            f' fill="#333">{escape(row.text)}</text>'
        ),
    ]
