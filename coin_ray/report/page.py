"""The report: one HTML file that holds everything it shows and opens from disk."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2

from coin_ray.report.charts import CurveRow, class_bars, curves_by_run, stacked
from coin_ray.report.methods import MINUS, Method, compared, difference, duration, money, number, points

PER_CLASS = ("cloud", "clip_detector", "student", "oracle")
"""Methods with a bar per class."""
KINDS = ("consistent", "inconsistent", "private")
LAYER_NAMES = {"truth": "Truth", "cloud": "Cloud", "clip_labels": "CLIP labels", "clip_detector": "CLIP detector", "student": "Student"}
LETTER = 0.78
"""Width of a letter as a share of the font size, about; small screens show text larger."""
SHOWN_FIRST = ("truth", "student")
"""Layers that are on when the page opens; the first layer there is if it has neither."""


@dataclass(frozen=True, slots=True)
class Box:
    """``xyxy``: pixels of the gallery image. ``score``: None for truth. ``kind``: consistent, inconsistent, private or empty."""

    xyxy: tuple[float, float, float, float]
    label: str
    score: float | None = None
    kind: str = ""


@dataclass(frozen=True, slots=True)
class GalleryImage:
    """A JPEG of ``width`` x ``height`` pixels and its boxes by layer: truth, cloud, clip_labels, clip_detector, student, separation.

    A box with a ``kind`` is switched by its kind, whatever its layer.
    """

    jpeg: bytes
    width: int
    height: int
    name: str
    layers: dict[str, list[Box]] = field(default_factory=dict)


def build_page(
    summary: dict[str, Any],
    per_class: dict[str, list[float]],
    curves: Sequence[CurveRow],
    gallery: Sequence[GalleryImage],
    config_yaml: str,
    command: str,
) -> str:
    """The whole page as HTML.

    ``summary``: the contents of summary.json. ``per_class``: AP50 in 0..1 of each class by method key, NaN where a class
    has no truth. ``curves``: rows of (run, step, metric, value). Whatever is missing or empty leaves its section out.
    """
    return _template().render(
        summary=summary,
        headline=_headline(summary),
        with_clip="clip_labels" in (summary.get("map50") or {}),
        results=_results(summary),
        unknown=bool(summary.get("map50_unknown")),
        fusion_wins=_fusion_wins(summary),
        collected=_collected(summary),
        stages=_stages(summary),
        separation=stacked({kind: int((summary.get("separation") or {}).get(kind) or 0) for kind in KINDS}),
        knowledge=summary.get("knowledge"),
        class_bars=class_bars(summary.get("classes") or (), per_class, PER_CLASS),
        curves=curves_by_run(curves),
        gallery=[_frame(image) for image in gallery],
        toggles=_toggles(gallery),
        gallery_classes=_gallery_classes(summary, gallery),
        config_yaml=config_yaml,
        command=command,
    )


@dataclass(frozen=True, slots=True)
class _Headline:
    text: str
    student: str = ""
    cloud: str = ""
    change: str = ""
    gap: str = ""


@dataclass(frozen=True, slots=True)
class _Result:
    """A row of the main table; ``width``: percent."""

    method: Method
    map50: str
    width: float
    change: str
    unknown: str


@dataclass(frozen=True, slots=True)
class _Stage:
    name: str
    time: str
    width: float


@dataclass(frozen=True, slots=True)
class _Mark:
    """A box as drawn, in pixels of its image; ``toggle`` switches it, ``text_y`` and ``anchor`` place its name."""

    toggle: str
    label: str
    text: str
    x: float
    y: float
    width: float
    height: float
    text_x: float
    text_y: float
    anchor: str


@dataclass(frozen=True, slots=True)
class _Frame:
    source: str
    name: str
    width: int
    height: int
    font: float
    marks: tuple[_Mark, ...]


@dataclass(frozen=True, slots=True)
class _Toggle:
    key: str
    name: str
    on: bool


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))


def _headline(summary: dict[str, Any]) -> _Headline:
    scores = summary.get("map50") or {}
    student, cloud = number(scores.get("student")), number(scores.get("cloud"))
    if student is None:
        return _Headline("No annotated test images were given, so nothing here was measured against truth.")
    if cloud is None:
        return _Headline("The student was evaluated; the cloud was not.", student=points(student))
    change = difference(student, cloud)
    size = change.lstrip("+" + MINUS)
    verdict = {"+": f"scores {size} points above", MINUS: f"scores {size} points below"}.get(change[0], "scores the same as")
    text = f"The student {verdict} the cloud detector it learned from, and needs no cloud call."
    return _Headline(text, points(student), points(cloud), change, _gap(summary))


def _gap(summary: dict[str, Any]) -> str:
    closed = number(summary.get("gap_closed"))
    return "" if closed is None else f"{closed * 100:.0f} %".replace("-", MINUS)


def _results(summary: dict[str, Any]) -> list[_Result]:
    scores, unknown = summary.get("map50") or {}, summary.get("map50_unknown") or {}
    return [
        _Result(m, points(scores[m.key]), _percent(scores[m.key]), _change(m, scores), points(unknown.get(m.key)))
        for m in compared(summary)
    ]


def _change(method: Method, scores: dict[str, Any]) -> str:
    return "" if method.key == "cloud" else difference(scores[method.key], scores.get("cloud"))


def _percent(share: object) -> float:
    return 100 * min(max(number(share) or 0.0, 0.0), 1.0)


def _fusion_wins(summary: dict[str, Any]) -> bool:
    scores = summary.get("map50") or {}
    fused, student = number(scores.get("static_fusion")), number(scores.get("student"))
    return fused is not None and student is not None and fused > student


def _collected(summary: dict[str, Any]) -> list[tuple[str, str]]:
    calls = summary.get("calls") or {}
    names = {"made": "Calls made", "cached": "Answered from the journal", "failed": "Failed"}
    rows = [(name, f"{calls[key]:,}") for key, name in names.items() if number(calls.get(key)) is not None]
    return [*rows, ("Cost", money(calls["cost_usd"]))] if "cost_usd" in calls else rows


def _stages(summary: dict[str, Any]) -> list[_Stage]:
    """Stages as they ran, and last the total; bars show the share of the total."""
    seconds = {name: number(value) or 0.0 for name, value in (summary.get("seconds") or {}).items()}
    total = seconds.pop("total", sum(seconds.values()))
    if not seconds:
        return []
    whole = max(total, sum(seconds.values()), 1e-9)
    stages = [_Stage(name, duration(value), 100 * value / whole) for name, value in seconds.items()]
    return [*stages, _Stage("total", duration(total), 0)]


def _gallery_classes(summary: dict[str, Any], gallery: Sequence[GalleryImage]) -> list[str]:
    """Classes that some box of the gallery has, in the order of the run."""
    present = {box.label for image in gallery for boxes in image.layers.values() for box in boxes}
    known = [name for name in summary.get("classes") or () if name in present]
    return known + sorted(present - set(known))


def _toggles(gallery: Sequence[GalleryImage]) -> list[_Toggle]:
    present = {_toggle_key(layer, box) for image in gallery for layer, boxes in image.layers.items() for box in boxes}
    present |= {layer for image in gallery for layer in image.layers if layer in LAYER_NAMES}
    keys = [key for key in (*LAYER_NAMES, *KINDS) if key in present]
    shown = [key for key in SHOWN_FIRST if key in keys] or keys[:1]
    return [_Toggle(key, LAYER_NAMES.get(key, key.capitalize()), key in shown) for key in keys]


def _toggle_key(layer: str, box: Box) -> str:
    return box.kind if box.kind in KINDS else layer


def _frame(image: GalleryImage) -> _Frame:
    """Text is sized to the image's width, because every frame of the gallery is equally wide."""
    font = image.width / 23
    marks = tuple(_mark(_toggle_key(layer, box), box, image, font) for layer, boxes in image.layers.items() for box in boxes)
    source = "data:image/jpeg;base64," + base64.b64encode(image.jpeg).decode("ascii")
    return _Frame(source, image.name, image.width, image.height, font, marks)


def _mark(toggle: str, box: Box, image: GalleryImage, font: float) -> _Mark:
    left, top, right, bottom = box.xyxy
    text = box.label if box.score is None else box.label + f" {box.score:.2f}".replace(" 0.", " .")
    text_x, text_y, anchor = _text_place(toggle, box, image, font, len(text) * LETTER * font)
    return _Mark(toggle, box.label, text, left, top, max(right - left, 0), max(bottom - top, 0), text_x, text_y, anchor)


def _text_place(toggle: str, box: Box, image: GalleryImage, font: float, length: float) -> tuple[float, float, str]:
    """x, y and anchor. Each layer writes at a corner of its own, so that layers shown together stay legible; never outside."""
    left, top, right, bottom = box.xyxy
    below = toggle in ("student", "clip_detector", "inconsistent", "private")
    at_right = toggle in ("cloud", "clip_detector", "private")
    text_y = min(bottom + font, image.height - font / 4) if below else max(top - font / 4, font)
    if at_right:
        return min(max(right, length), image.width), text_y, "end"
    return max(min(left, image.width - length), 0), text_y, "start"
