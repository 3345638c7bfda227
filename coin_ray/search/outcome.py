"""What a search found: the order of its trials, what each setting explains, and the
lines of text about them.
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

from coin_ray.search.plan import PARTS
from coin_ray.search.space import Choice, Space

MIN_TRIALS = 3
"""Fewer trials give no correlation."""


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """One trial that has ended. ``ninths`` of its training were made; ``figures`` hold
    its score then; ``failure``: why it failed, or empty.
    """

    number: int
    settings: dict[str, Any]
    figures: dict[str, float]
    ninths: int
    seconds: float
    failure: str = ""

    @property
    def state(self) -> str:
        if self.failure:
            return "failed"
        if self.ninths == PARTS:
            return "finished"
        return f"stopped at {self.ninths}/{PARTS}"

    @property
    def has_score(self) -> bool:
        return not self.failure and "score" in self.figures

    @property
    def is_preset(self) -> bool:
        """Whether the trial has the preset's own settings."""
        return self.number == 0

    @property
    def rank_key(self) -> tuple[int, float]:
        """A sort key: trials that trained longer are better; failed ones come last."""
        if not self.has_score:
            return -1, 0.0
        return self.ninths, self.figures["score"]


def sort_trials(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Return the trials best first: finished ones by score, then those stopped, latest
    first, then failed ones.
    """
    return sorted(records, key=lambda record: record.rank_key, reverse=True)


def best_trial(records: Sequence[TrialRecord]) -> TrialRecord | None:
    """Return the finished trial with the highest score; None if none finished."""
    finished_trials = [record for record in records if record.state == "finished"]
    if not finished_trials:
        return None
    return max(finished_trials, key=lambda record: record.figures["score"])


def setting_importance(
    records: Sequence[TrialRecord], space: Space
) -> dict[str, float]:
    """Return by setting the share in 0..1 of the variance of the trials' ranks that it
    explains alone; empty for fewer than three trials.

    A number: Spearman's correlation squared. A choice: between-group variance of ranks.
    With few trials much of it is chance.
    """
    scored_trials = [record for record in records if record.has_score]
    if len(scored_trials) < MIN_TRIALS:
        return {}
    ranks = _rank_trials(scored_trials)
    return {
        name: _explained_variance(
            [record.settings[name] for record in scored_trials],
            ranks,
            isinstance(domain, Choice),
        )
        for name, domain in space.items()
    }


def truth_correlation(records: Sequence[TrialRecord]) -> tuple[float, int] | None:
    """Return Spearman's correlation of label-free scores with validation mAP50, and
    over how many finished trials; None for fewer than three.
    """
    pairs = [
        (record.figures["score"], record.figures["validation"])
        for record in records
        if record.state == "finished" and "validation" in record.figures
    ]
    if len(pairs) < MIN_TRIALS:
        return None
    correlation = float(spearmanr(*zip(*pairs, strict=True)).statistic)
    if np.isnan(correlation):
        correlation = 0.0
    return correlation, len(pairs)


def to_json_rows(records: Sequence[TrialRecord]) -> list[dict[str, Any]]:
    """Return the trials as rows of ``search.json``."""
    return [dataclasses.asdict(record) | {"state": record.state} for record in records]


def format_trial(record: TrialRecord) -> str:
    """Return one trial as a line of the log."""
    settings = ", ".join(
        f"{name.rsplit('.', 1)[-1]} {format_setting(setting)}"
        for name, setting in record.settings.items()
    )
    score = f"score {format_score(record)}, {record.state}"
    if record.failure:
        score = f"failed, {record.failure}"
    return f"trial {record.number}: {score}, {record.seconds:.0f} s ({settings})"


def print_trials(title: str, records: Sequence[TrialRecord]) -> None:
    """Print all trials, best first; scores in points."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    names = list(records[0].settings) if records else []
    short_names = [name.rsplit(".", 1)[-1] for name in names]
    for column in ("trial", "score", "state", *short_names):
        justify = "left" if column == "state" else "right"
        table.add_column(column, justify=justify, header_style="dim")  # type: ignore[arg-type]
    for record in sort_trials(records):
        settings = [format_setting(record.settings[name]) for name in names]
        table.add_row(
            format_trial_number(record), format_score(record), record.state, *settings
        )
    Console(width=max(120, 40 + 16 * len(names))).print(table)


def format_trial_number(record: TrialRecord) -> str:
    return f"{record.number} (preset)" if record.is_preset else str(record.number)


def format_score(record: TrialRecord) -> str:
    """Return the score in points, or an empty text for a trial without one."""
    return f"{100 * record.figures['score']:.1f}" if record.has_score else ""


def format_setting(setting: Any) -> str:
    return f"{setting:.3g}" if isinstance(setting, float) else str(setting)


def _rank_trials(records: Sequence[TrialRecord]) -> NDArray[np.float64]:
    """Return the rank of each trial, 1 for the worst."""
    keys = sorted({record.rank_key for record in records})
    positions = [keys.index(record.rank_key) for record in records]
    return np.asarray(rankdata(positions), np.float64)


def _explained_variance(
    settings: Sequence[Any], ranks: NDArray[np.float64], categorical: bool
) -> float:
    total = float(((ranks - ranks.mean()) ** 2).sum())
    choices = set(settings)
    if total == 0 or len(choices) < 2:
        return 0.0
    if not categorical:
        return float(spearmanr(settings, ranks).statistic) ** 2
    between_groups = 0.0
    for choice in choices:
        group = ranks[[setting == choice for setting in settings]]
        between_groups += len(group) * float(group.mean() - ranks.mean()) ** 2
    return between_groups / total
