"""The compared methods, in the order and with the names of every table; number formats.

Imports nothing heavy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from coin_ray.report.run_summary import RunSummary

DASH = "\u2013"
MINUS = "\u2212"


@dataclass(frozen=True, slots=True)
class Method:
    """A method that the evaluation compares.

    ``key``: name in summary.json. ``hue``: its colour class in every chart. ``needs``:
    what it takes to use the method on a new image.
    """

    key: str
    name: str
    hue: str
    needs: str


METHODS = (
    Method("cloud", "Cloud detector", "cloud", "the cloud"),
    Method("clip_labels", "Cloud boxes, CLIP labels", "clip", "the cloud and CLIP"),
    Method(
        "static_fusion", "Cloud boxes, averaged labels", "neutral", "the cloud and CLIP"
    ),
    Method("clip_detector", "CLIP detector", "clip", "the local model"),
    Method(
        "pseudo_label", "Student on cloud labels alone", "neutral", "the local model"
    ),
    Method("coin", "Student by COIN", "neutral", "the local model"),
    Method("student", "Student", "student", "the local model"),
    Method("oracle", "Student on true labels", "truth", "the local model"),
)


def evaluated_methods(summary: RunSummary) -> tuple[Method, ...]:
    """Return the methods that the run evaluated, or tried to evaluate.

    There are none if the run had no annotated test images.
    """
    scores = summary.map50
    if all(finite_number(scores.get(method.key)) is None for method in METHODS):
        return ()
    return tuple(method for method in METHODS if method.key in scores)


def finite_number(value: object) -> float | None:
    """Return a finite number as float, and None for None, NaN and anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def format_points(share: object) -> str:
    """Format a share as points of 100 with one decimal; a dash if unknown."""
    number = finite_number(share)
    return DASH if number is None else f"{number * 100:.1f}"


def format_change(share: object, reference: object) -> str:
    """Format ``share - reference`` in signed points; empty if either is unknown."""
    new, old = finite_number(share), finite_number(reference)
    if new is None or old is None:
        return ""
    change = round(new * 100, 1) - round(old * 100, 1)
    return f"{change:+.1f}".replace("-", MINUS) if abs(change) > 0.04 else "0.0"


def format_percent(share: object) -> str:
    """Format a share as whole percent; empty if unknown."""
    number = finite_number(share)
    return "" if number is None else f"{100 * number:.0f} %"


def format_duration(seconds: object) -> str:
    """Format seconds as ``42 s``, ``3 min 07 s`` or ``2 h 05 min``; a dash if unknown."""
    number = finite_number(seconds)
    if number is None:
        return DASH
    if number < 10:
        return f"{number:.1f} s"
    whole = round(number)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_usd(amount: object) -> str:
    """Format an amount in US dollars; a dash if unknown."""
    number = finite_number(amount)
    return DASH if number is None else f"${number:,.2f}"
