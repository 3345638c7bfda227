"""Print a run's figures in the terminal.

Imports neither torch nor jinja2: the table is printed before and after everything else.
"""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from coin_ray.report.methods import (
    evaluated_methods,
    format_change,
    format_duration,
    format_points,
    format_usd,
)
from coin_ray.report.run_summary import RunSummary


def print_summary(summary: RunSummary) -> None:
    """Print mAP50 by method, boxes by kind, calls and cost, time per step, and the report.

    Parts that the run does not have are left out.
    """
    console = Console()
    tables = (
        _results_table(summary),
        _separation_table(summary),
        _calls_table(summary),
        _time_table(summary),
    )
    for table in tables:
        if table is not None:
            console.print(table)
    if summary.page:
        console.print(f"[bold]report[/]  {escape(summary.page)}", soft_wrap=True)


def _results_table(summary: RunSummary) -> Table | str:
    methods = evaluated_methods(summary)
    if not methods:
        return (
            "No annotated test images, so no mAP50: give --data.test a labelled folder"
            " to evaluate."
        )
    scores = summary.map50
    unknown_scores = summary.map50_unknown or {}
    unknown_column = ["new to both teachers"] if unknown_scores else []
    table = _new_table("mAP50", "", "mAP50", "vs cloud", *unknown_column, "needs")
    table.columns[-1].justify = "left"
    for method in methods:
        cells = [method.name, format_points(scores[method.key])]
        if method.key == "cloud":
            cells.append("")
        else:
            cells.append(format_change(scores[method.key], scores.get("cloud")))
        if unknown_scores:
            cells.append(format_points(unknown_scores.get(method.key)))
        cells.append(method.needs)
        table.add_row(*cells, style="bold" if method.key == "student" else None)
    return table


def _separation_table(summary: RunSummary) -> Table | None:
    total = sum(summary.separation.values())
    if not total:
        return None
    knowledge = summary.knowledge or {}
    accuracy_column = ["right"] if knowledge else []
    table = _new_table("Separation", "", "boxes", "share", *accuracy_column)
    for kind, count in summary.separation.items():
        cells = [escape(kind), f"{count:,}", f"{count / total:.0%}"]
        if knowledge:
            cells.append(_format_accuracy(knowledge.get(kind, {})))
        table.add_row(*cells)
    return table


def _format_accuracy(accuracy: Mapping[str, float]) -> str:
    """Format how often a kind's class is right, or each teacher's where they differ."""
    texts = []
    for teacher, share in accuracy.items():
        prefix = "" if teacher == "right" else f"{teacher} "
        texts.append(f"{prefix}{share:.0%}")
    return ", ".join(texts)


def _calls_table(summary: RunSummary) -> Table | None:
    calls = summary.calls
    counts = {
        "made": calls.made,
        "cached": calls.cached,
        "failed": calls.failed,
        "maybe billed": calls.maybe_billed,
    }
    texts = {name: f"{count:,}" for name, count in counts.items() if count is not None}
    if not texts and calls.cost_usd is None:
        return None
    table = _new_table("Cloud calls", *texts, "cost")
    table.columns[0].justify = "right"
    table.add_row(*texts.values(), format_usd(calls.cost_usd))
    return table


def _time_table(summary: RunSummary) -> Table | None:
    if not summary.seconds:
        return None
    table = _new_table("Time", "", "wall")
    for name in sorted(summary.seconds, key=lambda name: name == "total"):
        duration = format_duration(summary.seconds[name])
        table.add_row(escape(name), duration, style="bold" if name == "total" else None)
    return table


def _new_table(title: str, *columns: str) -> Table:
    """Return an empty table whose first column is left-aligned, the others right."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for index, column in enumerate(columns):
        table.add_column(
            column, justify="right" if index else "left", header_style="dim"
        )
    return table
