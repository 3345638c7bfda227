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

from coin_ray.search.lineage import Looks
from coin_ray.search.outcome import Record, ordered, shown
from coin_ray.search.space import Choice, Real, Space

COLOURS = colormaps["viridis"]


def parallel_coordinates(title: str, records: Sequence[Record], space: Space) -> str:
    """One axis per setting, logarithmic where it was drawn so, one for the score;
    bright: better. Stopped trials are dashed, failed left out.
    """
    chosen = [
        r for r in reversed(ordered(records)) if not r.failure and "score" in r.figures
    ]
    names = [*space, "score"]
    scores = [100 * r.figures["score"] for r in chosen] or [0.0]
    ends: dict[str, Real | Choice] = {**space, "score": Real(min(scores), max(scores))}
    figure = Figure(figsize=(2.0 + 1.6 * len(names), 4.5), layout="constrained")
    axes: Axes = figure.subplots()
    for n, record in enumerate(chosen):
        values = {**record.settings, "score": 100 * record.figures["score"]}
        heights = [height(ends[name], values[name]) for name in names]
        style = "-" if record.state == "finished" else "--"
        axes.plot(
            range(len(names)),
            heights,
            style,
            color=COLOURS(n / max(len(chosen) - 1, 1)),
            linewidth=1.6,
            gid=f"trial-{record.number}",
        )
    for place, name in enumerate(names):
        _scale(axes, place, name, ends[name])
    axes.set_xlim(-0.3, len(names) - 0.4)
    axes.set_ylim(-0.12, 1.12)
    axes.axis("off")
    axes.set_title(title)
    return _svg(figure)


def importance_bars(title: str, shares: Mapping[str, float]) -> str:
    """One bar per setting, longest first."""
    rows = sorted(shares.items(), key=lambda row: row[1])
    figure = Figure(figsize=(7, 1.2 + 0.35 * max(len(rows), 1)), layout="constrained")
    axes: Axes = figure.subplots()
    axes.barh(
        [name for name, _ in rows], [100 * share for _, share in rows], color="#8fb3d9"
    )
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the variance of the trials' ranks that it explains alone")
    axes.set_title(title)
    return _svg(figure)


def lines(title: str, looks: Looks) -> str:
    """Each member's score over its training; a dashed line leads from the state that a
    replaced member went on from.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes: Axes = figure.subplots()
    for look in sorted(
        (look for look in looks.values() if not look.failure),
        key=lambda look: (look.member, look.ninths),
    ):
        before = looks.get((look.copied, look.ninths - 1))
        colour = COLOURS(look.member / max((member for member, _ in looks), default=1))
        ends = [look] if before is None or before.failure else [before, look]
        axes.plot(
            [end.ninths for end in ends],
            [100 * end.figures["score"] for end in ends],
            "-" if look.copied == look.member else "--",
            marker="o",
            markersize=3,
            color=colour,
            gid=f"member-{look.member}-{look.ninths}",
            label=f"{look.member}" if look.ninths == 1 else None,
        )
    axes.set_xlabel("ninths of the training")
    axes.set_ylabel("score")
    axes.legend(title="member", fontsize=7)
    axes.set_title(title)
    return _svg(figure)


def height(domain: Real | Choice, value: object) -> float:
    """Where on its axis a value lies, 0..1."""
    if isinstance(domain, Choice):
        return domain.values.index(str(value)) / max(len(domain.values) - 1, 1)
    low, high, at = (
        math.log(v) if domain.log else v
        for v in (domain.low, domain.high, float(str(value)))
    )
    return (at - low) / (high - low) if high > low else 0.5


def _scale(axes: Axes, place: int, name: str, domain: Real | Choice) -> None:
    axes.axvline(place, 0.1, 0.9, color="#999", linewidth=0.8)
    axes.text(
        place,
        1.06,
        name.removeprefix("distill.").removeprefix("fit."),
        ha="center",
        fontsize=9,
    )
    marks = domain.values if isinstance(domain, Choice) else (domain.low, domain.high)
    for mark in marks:
        axes.text(
            place + 0.03,
            height(domain, mark),
            shown(mark),
            fontsize=7,
            color="#555",
            va="center",
        )


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
