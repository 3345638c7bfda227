"""Figures of the teachers: what they confuse, how well they are calibrated, and which of
them the fusion follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coin_ray.report.charts import (
    CurveRow,
    Plot,
    group_curves,
    plot_curve,
    plot_reliability,
    plot_shares,
    plot_stacked_shares,
)
from coin_ray.report.methods import METHODS, Method, format_percent
from coin_ray.report.run_summary import CkgSide, CorrectionCounts

SEPARATION_KINDS = ("consistent", "inconsistent", "private")
KIND_OF_METRIC = {
    "count_consistent": "consistent",
    "count_inconsistent": "inconsistent",
    "count_private": "private",
}
"""Kind by the metric that counts its regions."""
CKG_AGREEMENT = {
    "ckg_cloud": ("the cloud", "cloud"),
    "ckg_clip": ("CLIP", "clip"),
    "ckg_neither": ("neither", "neutral"),
}
"""Name and colour of the side that CKG agrees with, by metric."""
CKG_METRICS = {
    "ckg_passing": "Share of inconsistent regions confident enough to teach",
    "ckg_spread": (
        "Spread of CKG's weights over regions (0: it has learned nothing yet)"
    ),
    "gradient_angle": (
        "Angle between the gradients of consistent and inconsistent regions, degrees"
    ),
}
DIAGNOSTICS = {*KIND_OF_METRIC, *CKG_AGREEMENT, *CKG_METRICS}
"""Metrics that distillation logs and that are no losses."""
TEACHERS = {
    "cloud": ("Cloud", "cloud"),
    "clip": ("CLIP", "clip"),
    "ckg": ("CKG, the fusion of both", "student"),
}
SIDES = {
    "cloud": ("the cloud", "cloud"),
    "clip": ("CLIP", "clip"),
    "neither": ("neither", "neutral"),
}
MAX_MATRIX_CLASSES = 20
"""With more classes the confusion is a list instead of a matrix."""
MAX_LISTED = 20
"""Confused pairs that the list shows."""


@dataclass(frozen=True, slots=True)
class Cell:
    """Boxes of a pair of classes.

    ``share``: percent of the row, for the shade. ``same``: both teachers agree.
    """

    count: int
    share: float
    same: bool


@dataclass(frozen=True, slots=True)
class Confusion:
    """Classes that cloud and CLIP give the same boxes.

    Either a matrix (``names`` and ``rows``), or the most frequent disagreements as
    (cloud's class, CLIP's class, boxes). ``agreed``: share of boxes with one class.
    """

    names: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    listed: tuple[tuple[str, str, int], ...]
    agreed: str


def split_curves(rows: Sequence[CurveRow]) -> tuple[list[CurveRow], list[Plot]]:
    """Return the rows of the losses, and plots of the distillation's other metrics."""
    losses = [row for row in rows if row[2] not in DIAGNOSTICS]
    diagnostics = [row for row in rows if row[2] in DIAGNOSTICS]
    curves = group_curves(diagnostics).get("distill", {})
    plots = [
        plot_stacked_shares(
            curves,
            {metric: (kind, kind) for metric, kind in KIND_OF_METRIC.items()},
            "Regions by kind",
            "Shares of each kind of region in a batch.",
        ),
        plot_shares(
            curves,
            CKG_AGREEMENT,
            "Which teacher CKG agrees with",
            "Where the teachers differ: whose class has the highest fused probability.",
        ),
    ]
    for metric, title in CKG_METRICS.items():
        points = curves.get(metric, [])
        if len(points) > 1:
            plots.append(plot_curve(title, sorted(points), "student"))
    return losses, [plot for plot in plots if plot is not None]


def plot_calibration(
    bins: Mapping[str, Sequence[Mapping[str, float]]],
    errors: Mapping[str, float | None],
) -> list[Plot]:
    """Plot accuracy over confidence of each teacher that has bins."""
    plots = [
        plot_reliability(bins.get(key, ()), name, hue, errors.get(key))
        for key, (name, hue) in TEACHERS.items()
    ]
    return [plot for plot in plots if plot is not None]


def ckg_sides_table(sides: Mapping[str, CkgSide]) -> list[tuple[str, str, str, str]]:
    """Return rows of (side, hue, share of the disagreements, share right there)."""
    rows = []
    for key, (name, hue) in SIDES.items():
        side = sides.get(key)
        if side is not None:
            share, right = format_percent(side.share), format_percent(side.right)
            rows.append((name, hue, share, right))
    return rows


def mistakes_table(corrections: CorrectionCounts) -> list[tuple[Method, list[str]]]:
    """Return each teacher's boxes on the corrected images, and its mistakes with shares.

    The mistakes are wrong boxes, missed objects and images with either.
    """
    rows = []
    for method in METHODS:
        mistakes = corrections.teachers.get(method.key)
        if mistakes is None:
            continue
        cells = [
            f"{mistakes.boxes:,}",
            _format_part(mistakes.wrong, mistakes.boxes),
            _format_part(mistakes.missed, corrections.boxes),
            _format_part(mistakes.images, corrections.images),
        ]
        rows.append((method, cells))
    return rows


def _format_part(part: int, whole: int) -> str:
    share = format_percent(part / whole) if whole else "none"
    return f"{part:,} ({share})"


def confusion_table(
    counts: Sequence[Sequence[int]], classes: Sequence[str]
) -> Confusion | None:
    """Return the classes that the teachers give the same boxes.

    ``counts``: [K+1, K+1] by the cloud's class and CLIP's, background last; it counts as
    a class only where it occurs. Returns None if the teachers share no box.
    """
    total = sum(map(sum, counts))
    if not total:
        return None
    names = (*classes, "background")
    agreed = sum(row[index] for index, row in enumerate(counts))
    agreed_text = f"{100 * agreed / total:.0f} %"
    background = len(classes)
    indices = list(range(background))
    if any(counts[background]) or any(row[background] for row in counts):
        indices.append(background)
    if len(classes) > MAX_MATRIX_CLASSES:
        disagreements = _list_disagreements(counts, indices, names)
        return Confusion((), (), disagreements, agreed_text)
    rows = []
    for row in indices:
        row_total = max(sum(counts[row]), 1)
        cells = tuple(
            Cell(
                counts[row][column],
                100 * counts[row][column] / row_total,
                row == column,
            )
            for column in indices
        )
        rows.append((names[row], cells))
    used_names = tuple(names[index] for index in indices)
    return Confusion(used_names, tuple(rows), (), agreed_text)


def _list_disagreements(
    counts: Sequence[Sequence[int]], indices: Sequence[int], names: Sequence[str]
) -> tuple[tuple[str, str, int], ...]:
    """Return the most frequent pairs of different classes: (cloud's, CLIP's, boxes)."""
    pairs = [
        (counts[row][column], row, column)
        for row in indices
        for column in indices
        if row != column and counts[row][column]
    ]
    pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
    return tuple(
        (names[row], names[column], count) for count, row, column in pairs[:MAX_LISTED]
    )
