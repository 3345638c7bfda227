"""Compare finished runs on one page: figures, cost, and the settings that differ."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import yaml

from coin_ray import storage
from coin_ray.config.dotted_names import flatten
from coin_ray.errors import InputError
from coin_ray.report.answers import format_interval, interval_bounds
from coin_ray.report.methods import (
    DASH,
    finite_number,
    format_change,
    format_duration,
    format_points,
    format_usd,
)
from coin_ray.report.page import get_template
from coin_ray.report.run_summary import RunSummary, read_summary

COMPARISON_PAGE = "comparison.html"
REPORT_DEPTH = 3
"""A report's path relative to its root has so many parts: steps/report-*/report.html."""


@dataclass(frozen=True, slots=True)
class ComparedRun:
    """A finished run.

    ``name``: its root, shortened to the last folder if that is unique. ``settings``: by
    dotted name. ``link``: its report relative to the page, or "".
    """

    name: str
    summary: RunSummary
    settings: Mapping[str, str]
    link: str = ""


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of the main table.

    ``width``, ``low``, ``high``: the student's mAP50 and its interval in percent of the
    track.
    """

    run: ComparedRun
    student: str
    interval: str
    change: str
    change_interval: str
    cells: tuple[str, ...]
    width: float
    low: float | None
    high: float | None


def write_comparison(roots: Sequence[str], out: str) -> str:
    """Write the page of the runs below ``roots`` to ``out``; return its path.

    Raises InputError for a folder without a finished run.
    """
    page = storage.absolute_uri(out)
    names = _display_names(roots)
    runs = [
        _read_run(storage.absolute_uri(root), name, page)
        for root, name in zip(roots, names, strict=True)
    ]
    storage.write_bytes(page, render_comparison(runs).encode())
    return page


def render_comparison(runs: Sequence[ComparedRun]) -> str:
    """Return the page as HTML."""
    return get_template("compare.html").render(
        runs=runs,
        rows=[_build_row(run) for run in runs],
        spread=_format_spread(runs),
        classes=_class_rows(runs),
        settings=_differing_settings(runs),
    )


def _build_row(run: ComparedRun) -> _Row:
    summary = run.summary
    scores = summary.map50
    student = scores.get("student")
    interval = interval_bounds((summary.map50_interval or {}).get("student"))
    change_interval = interval_bounds((summary.vs_cloud_interval or {}).get("student"))
    gap_closed = finite_number(summary.gap_closed)
    cells = (
        format_points(scores.get("cloud")),
        format_points(scores.get("pseudo_label")),
        format_points(scores.get("oracle")),
        DASH if gap_closed is None else f"{100 * gap_closed:.0f} %",
        format_usd(summary.calls.cost_usd),
        format_duration(summary.seconds.get("total")),
    )
    return _Row(
        run,
        student=format_points(student),
        interval=format_interval(interval, signed=False),
        change=format_change(student, scores.get("cloud")),
        change_interval=format_interval(change_interval),
        cells=cells,
        width=100 * (finite_number(student) or 0.0),
        low=None if interval is None else 100 * interval[0],
        high=None if interval is None else 100 * interval[1],
    )


def _format_spread(runs: Sequence[ComparedRun]) -> str:
    """Format the student's mean and standard deviation over seeds.

    Empty if the runs differ in more than the seed, or fewer than two have a score.
    """
    scores = [finite_number(run.summary.map50.get("student")) for run in runs]
    known_scores = [score for score in scores if score is not None]
    differing_names = {name for name, _ in _differing_settings(runs)}
    seeds = {run.summary.seed for run in runs}
    if len(known_scores) < 2 or differing_names - {"seed"} or len(seeds) < len(runs):
        return ""
    mean, deviation = fmean(known_scores), stdev(known_scores)
    return f"{format_points(mean)} ± {format_points(deviation)}"


def _class_rows(
    runs: Sequence[ComparedRun],
) -> list[tuple[str, list[tuple[str, bool]]]]:
    """Return the student's AP50 by class and run, and whether it is the best of the runs.

    Empty if the runs have different classes, or one was not evaluated.
    """
    classes = runs[0].summary.classes
    if any(run.summary.classes != classes for run in runs):
        return []
    student_aps = [(run.summary.per_class or {}).get("student") for run in runs]
    if not all(student_aps):
        return []
    rows = []
    for index, name in enumerate(classes):
        aps = [finite_number(run_aps[index]) for run_aps in student_aps if run_aps]
        best = max((ap for ap in aps if ap is not None), default=None)
        cells = [(format_points(ap), ap is not None and ap == best) for ap in aps]
        rows.append((name, cells))
    return rows


def _differing_settings(runs: Sequence[ComparedRun]) -> list[tuple[str, list[str]]]:
    """Return the settings that are not the same in all runs, with each run's."""
    names = sorted({name for run in runs for name in run.settings})
    rows = [(name, [run.settings.get(name, DASH) for run in runs]) for name in names]
    return [(name, texts) for name, texts in rows if len(set(texts)) > 1]


def _read_run(root: str, name: str, page: str) -> ComparedRun:
    summary = read_summary(root)
    if summary is None:
        raise InputError(
            f"a comparison needs finished runs: {root} has no summary.json; run"
            f" coin-ray adapt PRESET --root {root} first"
        )
    config_file = storage.join(root, "config.yaml")
    settings: dict[str, str] = {}
    if storage.exists(config_file):
        config = yaml.safe_load(storage.read_bytes(config_file)) or {}
        settings = {name: str(setting) for name, setting in flatten(config).items()}
    return ComparedRun(name, summary, settings, _link_to_report(root, summary, page))


def _link_to_report(root: str, summary: RunSummary, page: str) -> str:
    """Return the link from ``page`` to the run's report, or "" if it does not exist.

    The root may have been moved since the report was written.
    """
    if not summary.page:
        return ""
    report = storage.join(root, *summary.page.split("/")[-REPORT_DEPTH:])
    if not storage.exists(report):
        return ""
    if "://" in page + report:
        return report
    return os.path.relpath(report, os.path.dirname(page))


def _display_names(roots: Sequence[str]) -> list[str]:
    """Return the last folder of each root, or the roots where two have the same."""
    folders = [root.rstrip("/").rsplit("/", 1)[-1] for root in roots]
    return folders if len(set(folders)) == len(folders) else list(roots)
