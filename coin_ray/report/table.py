"""The run's result in the terminal. Imports neither torch nor jinja2: it is shown
before and after everything else.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from coin_ray.report.methods import (
    compared,
    difference,
    duration,
    money,
    number,
    points,
)


def print_summary(summary: dict[str, Any], page: str | None = None) -> None:
    """Print mAP50 by method, what separation found, calls and cost, seconds per stage,
    and where the page is.

    ``summary``: the contents of summary.json; parts that are missing are left out.
    """
    console = Console()
    for part in (
        _results(summary),
        _separation(summary),
        _calls(summary),
        _stages(summary),
    ):
        if part is not None:
            console.print(part)
    if page:
        console.print(f"[bold]report[/]  {escape(page)}", soft_wrap=True)


def _results(summary: dict[str, Any]) -> Table | str:
    scores, unknown = summary.get("map50") or {}, summary.get("map50_unknown") or {}
    methods = compared(summary)
    if not methods:
        return (
            "No annotated test images, so no mAP50: give --data.test a COCO folder to"
            " evaluate."
        )
    table = _table(
        "mAP50",
        "",
        "mAP50",
        "vs cloud",
        *(["new to both teachers"] if unknown else []),
        "needs",
    )
    table.columns[-1].justify = "left"
    for method in methods:
        change = (
            ""
            if method.key == "cloud"
            else difference(scores[method.key], scores.get("cloud"))
        )
        novel = [points(unknown.get(method.key))] if unknown else []
        style = "bold" if method.key == "student" else None
        table.add_row(
            method.name,
            points(scores[method.key]),
            change,
            *novel,
            method.needs,
            style=style,
        )
    return table


def _separation(summary: dict[str, Any]) -> Table | None:
    counts = summary.get("separation") or {}
    total = sum(counts.values())
    if not total:
        return None
    knowledge = summary.get("knowledge") or {}
    table = _table(
        "Separation", "", "boxes", "share", *(["right"] if knowledge else [])
    )
    for kind, count in counts.items():
        right = (
            [
                ", ".join(
                    _right(share, who) for who, share in knowledge.get(kind, {}).items()
                )
            ]
            if knowledge
            else []
        )
        table.add_row(escape(kind), f"{count:,}", f"{count / total:.0%}", *right)
    return table


def _right(share: float, who: str) -> str:
    return f"{share:.0%}" if who == "right" else f"{who} {share:.0%}"


def _calls(summary: dict[str, Any]) -> Table | None:
    calls = summary.get("calls") or {}
    if not calls:
        return None
    table = _table(
        "Cloud calls",
        *(
            key
            for key in ("made", "cached", "failed", "cost")
            if key in calls or key == "cost"
        ),
    )
    table.columns[0].justify = "right"
    counts = (f"{calls[key]:,}" for key in ("made", "cached", "failed") if key in calls)
    table.add_row(*counts, money(calls.get("cost_usd")))
    return table


def _stages(summary: dict[str, Any]) -> Table | None:
    seconds = summary.get("seconds") or {}
    if not seconds:
        return None
    table = _table("Time", "", "wall")
    for stage in sorted(seconds, key=lambda name: name == "total"):
        table.add_row(
            escape(stage),
            duration(number(seconds[stage])),
            style="bold" if stage == "total" else None,
        )
    return table


def _table(title: str, *columns: str) -> Table:
    """Left-aligned first column, right-aligned numbers."""
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
