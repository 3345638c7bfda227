"""Two figures of a search, as SVG: every trial as a line through its settings, and what
each setting explains.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coin_ray.search.outcome import TrialRecord, format_setting, sort_trials
from coin_ray.search.space import Choice, Domain, Real, Space

COLOURS = colormaps["viridis"]


def parallel_coordinates(
    title: str, records: Sequence[TrialRecord], space: Space
) -> str:
    """Draw one axis per setting, logarithmic where it was drawn so, and one for the
    score; bright lines are better trials, dashed ones were stopped, failed ones are
    left out.
    """
    scored_trials = [r for r in reversed(sort_trials(records)) if r.has_score]
    names = [*space, "score"]
    scores = [100 * record.figures["score"] for record in scored_trials] or [0.0]
    domains: dict[str, Domain] = {**space, "score": Real(min(scores), max(scores))}
    figure = Figure(figsize=(2.0 + 1.6 * len(names), 4.5), layout="constrained")
    axes: Axes = figure.subplots()
    for rank, record in enumerate(scored_trials):
        coordinates = {**record.settings, "score": 100 * record.figures["score"]}
        heights = [axis_height(domains[name], coordinates[name]) for name in names]
        axes.plot(
            range(len(names)),
            heights,
            "-" if record.state == "finished" else "--",
            color=COLOURS(rank / max(len(scored_trials) - 1, 1)),
            linewidth=1.6,
            gid=f"trial-{record.number}",
        )
    for position, name in enumerate(names):
        _draw_scale(axes, position, name, domains[name])
    axes.set_xlim(-0.3, len(names) - 0.4)
    axes.set_ylim(-0.12, 1.12)
    axes.axis("off")
    axes.set_title(title)
    return _to_svg(figure)


def importance_bars(title: str, shares: Mapping[str, float]) -> str:
    """Draw one bar per setting, longest first."""
    rows = sorted(shares.items(), key=lambda row: row[1])
    names = [name for name, _ in rows]
    percentages = [100 * share for _, share in rows]
    figure = Figure(figsize=(7, 1.2 + 0.35 * max(len(rows), 1)), layout="constrained")
    axes: Axes = figure.subplots()
    axes.barh(names, percentages, color="#8fb3d9")
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the variance of the trials' ranks that it explains alone")
    axes.set_title(title)
    return _to_svg(figure)


def axis_height(domain: Domain, setting: object) -> float:
    """Return where a setting lies on its axis, in 0..1."""
    if isinstance(domain, Choice):
        return domain.values.index(str(setting)) / max(len(domain.values) - 1, 1)
    low, high, height = domain.low, domain.high, float(str(setting))
    if domain.log:
        low, high, height = math.log(low), math.log(high), math.log(height)
    return (height - low) / (high - low) if high > low else 0.5


def _draw_scale(axes: Axes, position: int, name: str, domain: Domain) -> None:
    short_name = name.removeprefix("distill.").removeprefix("fit.")
    axes.axvline(position, 0.1, 0.9, color="#999", linewidth=0.8)
    axes.text(position, 1.06, short_name, ha="center", fontsize=9)
    marks: Sequence[object] = (
        domain.values if isinstance(domain, Choice) else (domain.low, domain.high)
    )
    for mark in marks:
        axes.text(
            position + 0.03,
            axis_height(domain, mark),
            format_setting(mark),
            fontsize=7,
            color="#555",
            va="center",
        )


def _to_svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
