"""What a search found: the order of its trials, what each setting was worth, and the
files and lines that say so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import rankdata, spearmanr  # type: ignore[import-untyped]

from coin_ray.search.lineage import Look, said
from coin_ray.search.plan import FULL
from coin_ray.search.space import Choice, Space

FEWEST = 3
"""Trials below which no correlation is told."""


@dataclass(frozen=True, slots=True)
class Record:
    """One trial that has ended. ``ninths`` of its training were made; ``figures`` hold
    its score then; ``failure``: why, or empty.

    ``line``: of a member of a population, what its student has come through;
    ``settings`` are then those it began with.
    """

    number: int
    settings: dict[str, Any]
    figures: dict[str, float]
    ninths: int
    seconds: float
    failure: str = ""
    line: tuple[Look, ...] = ()

    @property
    def state(self) -> str:
        if self.failure:
            return "failed"
        return "finished" if self.ninths == FULL else f"stopped at {self.ninths}/{FULL}"

    @property
    def is_preset(self) -> bool:
        """Whether it had the preset's own settings throughout: a member's change only
        when it is replaced.
        """
        return self.number == 0 and all(look.member == 0 for look in self.line)

    @property
    def rank_key(self) -> tuple[int, float]:
        """Later trials are better than those stopped earlier; failed ones come last."""
        return (
            (-1, 0.0)
            if self.failure or "score" not in self.figures
            else (self.ninths, self.figures["score"])
        )


def ordered(records: Sequence[Record]) -> list[Record]:
    """Best first: finished ones by score, then those stopped, latest first, then failed
    ones.
    """
    return sorted(records, key=lambda r: r.rank_key, reverse=True)


def best(records: Sequence[Record]) -> Record | None:
    """The finished trial with the highest score; None if none finished."""
    finished = [r for r in records if r.state == "finished"]
    return max(finished, key=lambda r: r.figures["score"]) if finished else None


def importance(records: Sequence[Record], space: Space) -> dict[str, float]:
    """By setting, the share in 0..1 of the variance of the trials' ranks that it
    explains alone; empty for fewer than three trials.

    A number: Spearman's correlation squared. A choice: between-group variance of ranks.
    With few trials much of it is chance.
    """
    known = [r for r in records if not r.failure and "score" in r.figures]
    if len(known) < FEWEST:
        return {}
    ranks = _ranks(known)
    return {
        name: _explained(
            [r.settings[name] for r in known], ranks, isinstance(domain, Choice)
        )
        for name, domain in space.items()
    }


def truth_correlation(records: Sequence[Record]) -> tuple[float, int] | None:
    """Spearman's correlation of label-free scores with validation mAP50, and over how
    many finished trials; None for fewer than three.
    """
    pairs = [
        (r.figures["score"], r.figures["validation"])
        for r in records
        if r.state == "finished" and "validation" in r.figures
    ]
    if len(pairs) < FEWEST:
        return None
    found = float(spearmanr(*zip(*pairs, strict=True)).statistic)
    return (0.0 if found != found else found), len(pairs)


def as_plain(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Without lines, which ``schedule.json`` holds."""
    plain = [
        dataclasses.asdict(dataclasses.replace(r, line=())) | {"state": r.state}
        for r in records
    ]
    return [
        {name: value for name, value in row.items() if name != "line"} for row in plain
    ]


def line(record: Record) -> str:
    """One trial in words, for the log."""
    came = f", its student came through {said(record.line)}" if record.line else ""
    return (
        f"trial {record.number}: {_said(record)}, {record.seconds:.0f} s"
        f" ({_listed({n: setting(record, n) for n in record.settings})}){came}"
    )


def look_line(look: Look) -> str:
    """One look at a member of a population in words, for the log."""
    copied = f", a copy of {look.copied}" if look.copied != look.member else ""
    told = (
        f"failed, {look.failure}"
        if look.failure
        else f"score {100 * look.figures['score']:.1f}"
    )
    return (
        f"member {look.member} after {look.ninths}/{FULL}: {told}{copied}"
        f" ({_listed({n: shown(v) for n, v in look.settings.items()})})"
    )


def setting(record: Record, name: str) -> str:
    """As a trial had it; if it changed on the way, first and last."""
    first, last = (
        shown(record.settings[name]),
        shown(record.line[-1].settings[name] if record.line else record.settings[name]),
    )
    return first if first == last else f"{first} → {last}"


def print_trials(title: str, records: Sequence[Record]) -> None:
    """All trials, best first; scores in points."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    names = list(records[0].settings) if records else []
    for column in (
        "trial",
        "score",
        "state",
        *(name.rsplit(".", 1)[-1] for name in names),
    ):
        table.add_column(
            column, justify="left" if column == "state" else "right", header_style="dim"
        )
    for record in ordered(records):
        score = (
            ""
            if record.failure or "score" not in record.figures
            else f"{100 * record.figures['score']:.1f}"
        )
        name = f"{record.number} (preset)" if record.is_preset else str(record.number)
        table.add_row(name, score, record.state, *(setting(record, n) for n in names))
    Console(width=max(120, 40 + 16 * len(names))).print(table)


def shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _listed(settings: dict[str, str]) -> str:
    return ", ".join(
        f"{name.rsplit('.', 1)[-1]} {value}" for name, value in settings.items()
    )


def _said(record: Record) -> str:
    if record.failure:
        return f"failed, {record.failure}"
    return f"score {100 * record.figures['score']:.1f}, {record.state}"


def _ranks(records: Sequence[Record]) -> NDArray[np.float64]:
    """1 for the worst."""
    keys = sorted({r.rank_key for r in records})
    return np.asarray(rankdata([keys.index(r.rank_key) for r in records]), np.float64)


def _explained(
    values: Sequence[Any], ranks: NDArray[np.float64], choice: bool
) -> float:
    total = float(((ranks - ranks.mean()) ** 2).sum())
    if total == 0 or len(set(values)) < 2:
        return 0.0
    if not choice:
        return float(spearmanr(values, ranks).statistic) ** 2
    groups = [ranks[[v == name for v in values]] for name in set(values)]
    return float(sum(len(g) * (g.mean() - ranks.mean()) ** 2 for g in groups)) / total
