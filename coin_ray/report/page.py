"""The report: one HTML file that holds everything it shows and opens from disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2

from coin_ray.report import teachers
from coin_ray.report.answers import answers, bounds, headline, interval_text
from coin_ray.report.charts import (
    CurveRow,
    Plot,
    class_bars,
    curves_by_run,
    precision_recall,
    stacked,
)
from coin_ray.report.gallery import GalleryImage, arranged
from coin_ray.report.methods import (
    Method,
    compared,
    difference,
    duration,
    money,
    number,
    points,
)

PER_CLASS = ("cloud", "clip_detector", "student", "oracle")
"""Methods with a bar per class."""
CURVES = ("cloud", "clip_detector", "pseudo_label", "student", "oracle")
"""Methods with a precision-recall curve."""


def build_page(
    summary: dict[str, Any],
    per_class: dict[str, list[float]],
    curves: Sequence[CurveRow],
    gallery: Sequence[GalleryImage],
    config_yaml: str,
    command: str,
    figures: Mapping[str, Any] | None = None,
) -> str:
    """The whole page as HTML.

    ``summary``: the contents of summary.json. ``per_class``: AP50 in 0..1 of each class
    by method key, NaN where a class has no truth. ``curves``: rows of (run, step,
    metric, value). ``figures``: ``precision_recall`` by method, ``class_curves`` by
    method and class, ``confusion`` [K+1, K+1] and ``reliability`` bins by teacher.
    Whatever is missing or empty leaves its section out.
    """
    shapes, classes = figures or {}, summary.get("classes") or ()
    losses, knowing = teachers.split_curves(curves)
    return template("page.html").render(
        summary=summary,
        headline=headline(summary),
        answers=answers(summary),
        with_clip="clip_labels" in (summary.get("map50") or {}),
        results=_results(summary),
        unknown=bool(summary.get("map50_unknown")),
        intervals=bool(summary.get("map50_interval")),
        fusion_wins=_fusion_wins(summary),
        asked=_asked(summary),
        stages=_stages(summary),
        separation=stacked(
            {
                kind: int((summary.get("separation") or {}).get(kind) or 0)
                for kind in teachers.KINDS
            }
        ),
        knowledge=summary.get("knowledge"),
        corrections=summary.get("corrections"),
        corrected=teachers.corrected_table(summary.get("corrections") or {}),
        class_bars=class_bars(
            classes,
            per_class,
            PER_CLASS,
            summary.get("truth_boxes") or (),
            summary.get("class_change_interval") or (),
        ),
        operating=_operating(summary),
        precision_recall=precision_recall(
            shapes.get("precision_recall") or {}, CURVES, "All classes"
        ),
        class_curves=_class_curves(classes, shapes.get("class_curves") or {}),
        confusion=teachers.confusion_table(shapes.get("confusion") or [], classes),
        calibration=teachers.calibration(
            shapes.get("reliability") or {}, summary.get("calibration_error") or {}
        ),
        sides=teachers.sides_table(summary.get("ckg_sides") or {}),
        knowing=knowing,
        curves=curves_by_run(losses),
        gallery=arranged(gallery, classes),
        machine=_machine(summary),
        config_yaml=config_yaml,
        command=command,
    )


@dataclass(frozen=True, slots=True)
class _Result:
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
class _Stage:
    name: str
    time: str
    width: float


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def template(name: str) -> jinja2.Template:
    """A template beside this file; everything put into it is escaped."""
    return _environment().get_template(name)


def _results(summary: dict[str, Any]) -> list[_Result]:
    scores, unknown = summary.get("map50") or {}, summary.get("map50_unknown") or {}
    rows = []
    for m in compared(summary):
        change = (
            "" if m.key == "cloud" else difference(scores[m.key], scores.get("cloud"))
        )
        own = bounds((summary.get("map50_interval") or {}).get(m.key))
        against = bounds((summary.get("vs_cloud_interval") or {}).get(m.key))
        low, high = (
            (None, None) if own is None else (_percent(own[0]), _percent(own[1]))
        )
        texts = interval_text(own, signed=False), interval_text(against)
        rows.append(
            _Result(
                m,
                points(scores[m.key]),
                _percent(scores[m.key]),
                change,
                points(unknown.get(m.key)),
                *texts,
                low,
                high,
            )
        )
    return rows


def _percent(share: object) -> float:
    return 100 * min(max(number(share) or 0.0, 0.0), 1.0)


def _fusion_wins(summary: dict[str, Any]) -> bool:
    scores = summary.get("map50") or {}
    fused, student = number(scores.get("static_fusion")), number(scores.get("student"))
    return fused is not None and student is not None and fused > student


def _asked(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What was asked, paid and kept, as rows of a table."""
    images, calls, kept = (
        summary.get(name) or {} for name in ("images", "calls", "kept")
    )
    rows = [(f"Images: {split}", count) for split, count in images.items()] + [
        ("Images that could not be read", summary.get("rejected"))
    ]
    rows += [
        ("Calls made", calls.get("made")),
        ("Answered from the journal", calls.get("cached")),
        ("Failed", calls.get("failed")),
    ]
    told = [(name, f"{count:,}") for name, count in rows if number(count) is not None]
    told += [("Cost", money(calls["cost_usd"]))] if "cost_usd" in calls else []
    boxes = {
        "Boxes on training images": kept.get("boxes"),
        "of these above the threshold, used": kept.get("used"),
    }
    return told + [
        (name, f"{count:,}")
        for name, count in boxes.items()
        if number(count) is not None
    ]


def _stages(summary: dict[str, Any]) -> list[_Stage]:
    """Stages as they ran, and last the total; bars show the share of the total."""
    seconds = {
        name: number(value) or 0.0
        for name, value in (summary.get("seconds") or {}).items()
    }
    total = seconds.pop("total", sum(seconds.values()))
    if not seconds:
        return []
    whole = max(total, sum(seconds.values()), 1e-9)
    stages = [
        _Stage(name, duration(value), 100 * value / whole)
        for name, value in seconds.items()
        if value
    ]
    return [*stages, _Stage("total", duration(total), 0)]


def _operating(summary: dict[str, Any]) -> list[tuple[Method, list[str]]]:
    """Per method: threshold, precision, recall and F1 at the threshold of the best F1."""
    found = summary.get("operating") or {}
    rows = [(m, found[m.key]) for m in compared(summary) if m.key in found]
    return [
        (
            m,
            [
                f"{p['score']:.2f}",
                *(points(p[key]) for key in ("precision", "recall", "f1")),
            ],
        )
        for m, p in rows
    ]


def _class_curves(
    classes: Sequence[str], found: Mapping[str, Sequence[Sequence[float]]]
) -> list[Plot]:
    plots = [
        precision_recall({key: rows[i] for key, rows in found.items()}, PER_CLASS, name)
        for i, name in enumerate(classes)
    ]
    return [plot for plot in plots if plot]


def _machine(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Hardware, seed, model and versions as rows of a table."""
    hardware, model = summary.get("hardware") or {}, summary.get("model") or {}
    rows = [("Seed", summary.get("seed"))]
    if hardware:
        rows += [
            ("System", hardware["system"]),
            ("Processors", hardware["cpus"]),
            ("Memory", f"{hardware['memory_gib']} GiB"),
            ("GPU", hardware["gpu"] or "none"),
        ]
    if {"parameters", "bytes"} <= set(model):
        rows.append(
            (
                "Student",
                (
                    f"{model['parameters'] / 1e6:.1f} M parameters,"
                    f" {model['bytes'] / 1e6:.1f} MB"
                ),
            )
        )
    return [
        (name, str(value))
        for name, value in [*rows, *(summary.get("versions") or {}).items()]
        if value is not None
    ]
