"""The report: one HTML file that opens from disk and needs no other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2

from coin_ray.report import teachers
from coin_ray.report.answers import (
    answer_questions,
    build_headline,
    format_interval,
    interval_bounds,
)
from coin_ray.report.charts import (
    CurveRow,
    Plot,
    build_class_bars,
    plot_precision_recall,
    plot_training_curves,
    stack_segments,
)
from coin_ray.report.gallery import GalleryImage, build_gallery
from coin_ray.report.methods import (
    Method,
    evaluated_methods,
    finite_number,
    format_change,
    format_duration,
    format_points,
    format_usd,
)
from coin_ray.report.run_summary import CorrectionCounts, DeepImages, RunSummary

PER_CLASS = ("cloud", "clip_detector", "student", "oracle")
"""Methods with a bar per class."""
CURVES = ("cloud", "clip_detector", "pseudo_label", "student", "oracle")
"""Methods with a precision-recall curve."""

Rows = list[tuple[str, str]]
"""Rows of a table of two columns."""


@dataclass(frozen=True)
class PageFigures:
    """Figures that the page draws and ``summary.json`` does not hold.

    What is empty leaves its section out.
    """

    precision_recall: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Mean precision over recall by method."""
    class_curves: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    """Precision over recall by method, for each class."""
    confusion: Sequence[Sequence[int]] = ()
    """[K+1, K+1] boxes by the cloud's class and CLIP's, "background" last."""
    reliability: Mapping[str, Sequence[Mapping[str, float]]] = field(
        default_factory=dict
    )
    """Bins with ``confidence``, ``right`` and ``count`` by teacher."""


def build_page(
    summary: RunSummary,
    curves: Sequence[CurveRow],
    gallery: Sequence[GalleryImage],
    config_yaml: str,
    command: str,
    figures: PageFigures | None = None,
) -> str:
    """Return the whole page as HTML.

    ``curves``: rows of (run, step, metric, value). Sections without figures are left
    out.
    """
    figures = figures or PageFigures()
    losses, diagnostic_plots = teachers.split_curves(curves)
    sections = (
        _result_section(summary)
        | _class_section(summary)
        | _cost_section(summary)
        | _precision_recall_section(summary, figures)
        | _teacher_section(summary, figures)
    )
    return get_template("page.html").render(
        summary=summary,
        **sections,
        diagnostic_plots=diagnostic_plots,
        training_curves=plot_training_curves(losses),
        gallery=build_gallery(gallery, summary.classes),
        machine=_machine_rows(summary),
        config_yaml=config_yaml,
        command=command,
    )


def get_template(name: str) -> jinja2.Template:
    """Return a template of this folder; it escapes everything that is put into it."""
    return _environment().get_template(name)


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@dataclass(frozen=True, slots=True)
class _ResultRow:
    """A row of the main table; ``width``, ``low`` and ``high``: percent of the track."""

    method: Method
    map50: str
    width: float
    change: str
    unknown: str
    interval: str
    change_interval: str
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class _StepTime:
    """The duration of a step; ``width``: percent of the whole run."""

    name: str
    time: str
    width: float


def _result_section(summary: RunSummary) -> dict[str, object]:
    return {
        "headline": build_headline(summary),
        "answers": answer_questions(summary),
        "with_clip": "clip_labels" in summary.map50,
        "results": [_result_row(summary, m) for m in evaluated_methods(summary)],
        "unknown": bool(summary.map50_unknown),
        "intervals": bool(summary.map50_interval),
        "fusion_wins": _fusion_wins(summary),
    }


def _result_row(summary: RunSummary, method: Method) -> _ResultRow:
    key = method.key
    score = summary.map50[key]
    change = ""
    if key != "cloud":
        change = format_change(score, summary.map50.get("cloud"))
    interval = interval_bounds((summary.map50_interval or {}).get(key))
    change_interval = interval_bounds((summary.vs_cloud_interval or {}).get(key))
    low, high = None, None
    if interval is not None:
        low, high = _track_percent(interval[0]), _track_percent(interval[1])
    return _ResultRow(
        method,
        map50=format_points(score),
        width=_track_percent(score),
        change=change,
        unknown=format_points((summary.map50_unknown or {}).get(key)),
        interval=format_interval(interval, signed=False),
        change_interval=format_interval(change_interval),
        low=low,
        high=high,
    )


def _track_percent(share: object) -> float:
    """Return a share as percent of a bar's track; 0 if unknown."""
    return 100 * min(max(finite_number(share) or 0.0, 0.0), 1.0)


def _fusion_wins(summary: RunSummary) -> bool:
    """Return whether averaging both teachers scores higher than the student."""
    fusion = finite_number(summary.map50.get("static_fusion"))
    student = finite_number(summary.map50.get("student"))
    return fusion is not None and student is not None and fusion > student


def _class_section(summary: RunSummary) -> dict[str, object]:
    bars = build_class_bars(
        summary.classes,
        summary.per_class or {},
        PER_CLASS,
        summary.truth_boxes or (),
        summary.class_change_interval or (),
    )
    return {"class_bars": bars}


def _cost_section(summary: RunSummary) -> dict[str, object]:
    box_counts = {
        kind: summary.separation.get(kind, 0) for kind in teachers.SEPARATION_KINDS
    }
    corrections = summary.corrections
    return {
        "asked": _cost_rows(summary),
        "stages": _step_times(summary),
        "separation": stack_segments(box_counts),
        "knowledge": summary.knowledge,
        "corrections": corrections,
        "corrected": teachers.mistakes_table(corrections or CorrectionCounts()),
    }


def _cost_rows(summary: RunSummary) -> Rows:
    """Return images, calls, cost and boxes as rows of a table; unknown ones left out."""
    calls, box_counts = summary.calls, summary.kept
    counts: list[tuple[str, int | None]] = [
        (f"Images: {split}", count) for split, count in summary.images.items()
    ]
    if summary.images or summary.rejected:
        counts.append(("Images that could not be read", summary.rejected))
    counts += [
        ("Calls made", calls.made),
        ("Answered from the journal", calls.cached),
        ("Failed", calls.failed),
        ("Sent without an answer on record, maybe billed", calls.maybe_billed),
    ]
    rows = [(name, f"{count:,}") for name, count in counts if count is not None]
    if summary.intensity is not None:
        rows += _intensity_rows(summary.intensity)
    if calls.cost_usd is not None:
        rows.append(("Cost", format_usd(calls.cost_usd)))
    if calls.root_calls is not None and calls.root_usd is not None:
        totals = f"{calls.root_calls:,} calls, {format_usd(calls.root_usd)}"
        rows.append(("All runs below this root", totals))
    if box_counts is not None and box_counts.boxes is not None:
        rows.append(("Boxes on training images", f"{box_counts.boxes:,}"))
    if box_counts is not None and box_counts.used is not None:
        rows.append(("of these above the threshold, used", f"{box_counts.used:,}"))
    return rows


def _intensity_rows(intensity: DeepImages) -> Rows:
    """Return how grey images with more than 8 bits were made visible."""
    stretch = "each image's own"
    if intensity.range is not None:
        low, high = intensity.range
        stretch = f"{low:g} .. {high:g}"
    rows = [
        ("Grey images with more than 8 bits", f"{intensity.images:,}"),
        ("their values from black to white", stretch),
    ]
    if intensity.outside:
        rows.append(("of these with no value in the range", f"{intensity.outside:,}"))
    return rows


def _step_times(summary: RunSummary) -> list[_StepTime]:
    """Return the steps in the order in which they ran, and last the total."""
    seconds = {
        name: finite_number(duration) or 0.0
        for name, duration in summary.seconds.items()
    }
    total = seconds.pop("total", sum(seconds.values()))
    if not seconds:
        return []
    whole = max(total, sum(seconds.values()), 1e-9)
    times = [
        _StepTime(name, format_duration(duration), 100 * duration / whole)
        for name, duration in seconds.items()
        if duration
    ]
    return [*times, _StepTime("total", format_duration(total), 0)]


def _precision_recall_section(
    summary: RunSummary, figures: PageFigures
) -> dict[str, object]:
    class_plots = []
    for index, name in enumerate(summary.classes):
        class_curves = {m: rows[index] for m, rows in figures.class_curves.items()}
        class_plots.append(plot_precision_recall(class_curves, PER_CLASS, name))
    return {
        "operating": _operating_rows(summary),
        "precision_recall": plot_precision_recall(
            figures.precision_recall, CURVES, "All classes"
        ),
        "class_curves": _drawn(class_plots),
    }


def _operating_rows(summary: RunSummary) -> list[tuple[Method, list[str]]]:
    """Return threshold, precision, recall and F1 by method, at the best F1."""
    points = summary.operating or {}
    rows = []
    for method in evaluated_methods(summary):
        point = points.get(method.key)
        if point is not None:
            shares = (point.precision, point.recall, point.f1)
            cells = [f"{point.score:.2f}", *(format_points(s) for s in shares)]
            rows.append((method, cells))
    return rows


def _teacher_section(summary: RunSummary, figures: PageFigures) -> dict[str, object]:
    return {
        "confusion": teachers.confusion_table(figures.confusion, summary.classes),
        "calibration": teachers.plot_calibration(
            figures.reliability, summary.calibration_error or {}
        ),
        "sides": teachers.ckg_sides_table(summary.ckg_sides or {}),
    }


def _drawn(plots: Sequence[Plot | None]) -> list[Plot]:
    return [plot for plot in plots if plot is not None]


def _machine_rows(summary: RunSummary) -> Rows:
    """Return seed, hardware, model size and versions as rows of a table."""
    rows: list[tuple[str, Any]] = []
    if summary.seed is not None:
        rows.append(("Seed", summary.seed))
    hardware = summary.hardware
    if hardware is not None:
        rows += [
            ("System", hardware.system),
            ("Processors", hardware.cpus),
            ("Memory", f"{hardware.memory_gib} GiB"),
            ("GPU", hardware.gpu or "none"),
        ]
    model = summary.model
    if model is not None and model.parameters is not None and model.bytes is not None:
        millions, megabytes = model.parameters / 1e6, model.bytes / 1e6
        rows.append(("Student", f"{millions:.1f} M parameters, {megabytes:.1f} MB"))
    rows += summary.versions.items()
    return [(name, str(text)) for name, text in rows]
