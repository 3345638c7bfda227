"""What the page says of the teachers: whom they confuse, how far their confidence can
be trusted, whom the fusion follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coin_ray.report.charts import (
    CurveRow,
    Plot,
    by_run,
    layered,
    panel,
    reliability,
    shares,
)
from coin_ray.report.methods import METHODS, Method, number

KINDS = ("consistent", "inconsistent", "private")
COUNTS = {
    "count_consistent": "consistent",
    "count_inconsistent": "inconsistent",
    "count_private": "private",
}
FOLLOWS = {
    "ckg_cloud": ("the cloud", "cloud"),
    "ckg_clip": ("CLIP", "clip"),
    "ckg_neither": ("neither", "neutral"),
}
SEES = {
    "ckg_passing": "Share of disputed regions sure enough to teach",
    "ckg_spread": (
        "Spread of CKG's weights over regions (0: it has learned nothing yet)"
    ),
    "gradient_angle": (
        "Angle between the gradients of agreed and disputed regions, degrees"
    ),
}
DIAGNOSTICS = {*COUNTS, *FOLLOWS, *SEES}
"""What distillation logs beside its losses."""
TEACHERS = {
    "cloud": ("Cloud", "cloud"),
    "clip": ("CLIP", "clip"),
    "ckg": ("CKG, the fusion of both", "student"),
}
MATRIX = 20
"""Up to so many classes the confusion is a matrix, beyond that a list."""
LISTED = 20


@dataclass(frozen=True, slots=True)
class Cell:
    """``share`` of its row in percent, for the shade; ``same``: both teachers give one
    name.
    """

    count: int
    share: float
    same: bool


@dataclass(frozen=True, slots=True)
class Confusion:
    """Either a matrix (``names`` and ``rows``) or the most frequent exchanges: (cloud's
    name, CLIP's name, boxes).
    """

    names: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    listed: tuple[tuple[str, str, int], ...]
    agreed: str


def split_curves(rows: Sequence[CurveRow]) -> tuple[list[CurveRow], list[Plot]]:
    """The losses; and plots of the diagnostics of the distillation, those that were
    logged.
    """
    losses = [row for row in rows if row[2] not in DIAGNOSTICS]
    logged = by_run([row for row in rows if row[2] in DIAGNOSTICS]).get("distill", {})
    plots = [
        layered(
            logged,
            {key: (kind, kind) for key, kind in COUNTS.items()},
            "How the kinds moved",
            "Shares of each kind of region in a batch.",
        ),
        shares(
            logged,
            FOLLOWS,
            "Whom CKG follows",
            "Where the teachers differ: whose name the fusion puts first.",
        ),
        *(
            panel(title, sorted(logged[key]), "student")
            for key, title in SEES.items()
            if len(logged.get(key, ())) > 1
        ),
    ]
    return losses, [plot for plot in plots if plot]


def calibration(
    bins: Mapping[str, Sequence[Mapping[str, float]]], errors: Mapping[str, float]
) -> list[Plot]:
    plots = [
        reliability(bins.get(key) or (), name, hue, errors.get(key))
        for key, (name, hue) in TEACHERS.items()
    ]
    return [plot for plot in plots if plot]


def sides_table(
    found: Mapping[str, Mapping[str, Any]],
) -> list[tuple[str, str, str, str]]:
    """(side, hue, share of the disputed boxes, share right there) of CKG at the end of
    training.
    """
    names = {
        "cloud": ("the cloud", "cloud"),
        "clip": ("CLIP", "clip"),
        "neither": ("neither", "neutral"),
    }
    rows = [(*names[key], found[key]) for key in names if key in found]
    return [
        (name, hue, _percent(side.get("share")), _percent(side.get("right")))
        for name, hue, side in rows
    ]


def corrected_table(found: Mapping[str, Any]) -> list[tuple[Method, list[str]]]:
    """By teacher: boxes on the reviewed images, how many are wrong, objects it missed,
    and images with a mistake; each with its share.
    """
    rows = []
    for method in (m for m in METHODS if m.key in (found.get("teachers") or {})):
        said = found["teachers"][method.key]
        shares = (
            (said["wrong"], said["boxes"]),
            (said["missed"], found["boxes"]),
            (said["images"], found["images"]),
        )
        rows.append(
            (
                method,
                [
                    f"{said['boxes']:,}",
                    *(
                        f"{part:,} ({_percent(part / whole) if whole else 'none'})"
                        for part, whole in shares
                    ),
                ],
            )
        )
    return rows


def confusion_table(
    counts: Sequence[Sequence[int]], classes: Sequence[str]
) -> Confusion | None:
    """None if the teachers share no box. Background counts as a name only where it
    occurs.
    """
    total = sum(map(sum, counts))
    if not total:
        return None
    names = (*classes, "background")
    agreed = f"{100 * sum(row[i] for i, row in enumerate(counts)) / total:.0f} %"
    used = [
        i
        for i in range(len(names))
        if i < len(classes) or any(counts[i]) or any(row[i] for row in counts)
    ]
    if len(classes) > MATRIX:
        pairs = sorted(
            (
                (counts[i][j], i, j)
                for i in used
                for j in used
                if i != j and counts[i][j]
            ),
            key=lambda p: (-p[0], p[1], p[2]),
        )
        return Confusion(
            (),
            (),
            tuple((names[i], names[j], count) for count, i, j in pairs[:LISTED]),
            agreed,
        )
    rows = []
    for i in used:
        whole = max(sum(counts[i]), 1)
        rows.append(
            (
                names[i],
                tuple(
                    Cell(counts[i][j], 100 * counts[i][j] / whole, i == j) for j in used
                ),
            )
        )
    return Confusion(tuple(names[i] for i in used), tuple(rows), (), agreed)


def _percent(share: object) -> str:
    known = number(share)
    return "" if known is None else f"{100 * known:.0f} %"
