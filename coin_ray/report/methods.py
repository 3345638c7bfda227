"""What is compared, in the order and with the names of every table. Imports nothing
heavy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

DASH = "\u2013"
MINUS = "\u2212"


@dataclass(frozen=True, slots=True)
class Method:
    """``key``: name in summary.json. ``hue``: the colour it has everywhere. ``needs``:
    what using it on a new image takes.
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
    Method("student", "Student", "student", "the local model"),
    Method("oracle", "Student on true labels", "truth", "the local model"),
)


def number(value: object) -> float | None:
    """A finite number, or None for null, NaN and anything else."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
    ):
        return None
    return float(value)


def points(value: object) -> str:
    """A share as points of 100 with one decimal, the way detection tables are read; a
    dash if unknown.
    """
    known = number(value)
    return DASH if known is None else f"{known * 100:.1f}"


def difference(value: object, reference: object) -> str:
    """``value - reference`` in signed points; empty if either is unknown."""
    ours, theirs = number(value), number(reference)
    if ours is None or theirs is None:
        return ""
    gap = round(ours * 100, 1) - round(theirs * 100, 1)
    return f"{gap:+.1f}".replace("-", MINUS) if abs(gap) > 0.04 else "0.0"


def duration(seconds: object) -> str:
    """Seconds as ``42 s``, ``3 min 07 s`` or ``2 h 05 min``; a dash if unknown."""
    known = number(seconds)
    if known is None:
        return DASH
    if known < 10:
        return f"{known:.1f} s"
    whole = round(known)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def money(usd: object) -> str:
    known = number(usd)
    return DASH if known is None else f"${known:,.2f}"


def compared(summary: dict[str, Any]) -> tuple[Method, ...]:
    """The methods this run evaluated, or tried to; none if it had no annotated images."""
    scores = summary.get("map50") or {}
    if all(number(scores.get(m.key)) is None for m in METHODS):
        return ()
    return tuple(m for m in METHODS if m.key in scores)
