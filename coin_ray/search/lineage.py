"""Who copied whom in a population, and when: what each member was after each part of
its training, and the schedule this makes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from coin_ray import storage
from coin_ray.config import Change, PipelineConfig
from coin_ray.search.space import apply

SCHEDULE = "schedule.json"


@dataclass(frozen=True, slots=True)
class Look:
    """A member after ``ninths`` of its training, the last of them under ``settings``.

    ``copied``: whose state it went on from, of a ninth before; its own number unless it
    was replaced. ``failure``: why it has no state.
    """

    member: int
    ninths: int
    copied: int
    settings: dict[str, Any]
    figures: dict[str, float]
    seconds: float
    failure: str = ""


Looks = Mapping[tuple[int, int], Look]
"""By member and ninths."""


def place(folder: str, member: int, ninths: int, suffix: str) -> str:
    """Where a look (``.json``) or its state (``.pt``) lies below a search's folder."""
    return storage.join(folder, "population", str(member), f"{ninths}{suffix}")


def read_look(folder: str, member: int, ninths: int) -> Look | None:
    uri = place(folder, member, ninths, ".json")
    return Look(**storage.read_json(uri)) if storage.exists(uri) else None


def read_looks(folder: str, members: int, parts: int) -> dict[tuple[int, int], Look]:
    """All looks below a search's folder."""
    found = (
        read_look(folder, member, ninths)
        for member in range(members)
        for ninths in range(1, parts + 1)
    )
    return by_place(look for look in found if look is not None)


def by_place(looks: Iterable[Look]) -> dict[tuple[int, int], Look]:
    return {(look.member, look.ninths): look for look in looks}


def seen_of_all(looks: Looks, members: int) -> int:
    """The last ninth at which every member was looked at: what a killed population goes
    on from.
    """
    return min(
        max((n for m, n in looks if m == member), default=0)
        for member in range(members)
    )


def line_of(looks: Looks, member: int, ninths: int) -> tuple[Look, ...]:
    """The looks that a member's state has come through, whoever's they were, first to
    last.
    """
    line = [looks[member, ninths]]
    while line[0].ninths > 1:
        line.insert(0, looks[line[0].copied, line[0].ninths - 1])
    return tuple(line)


def scheduled(
    config: PipelineConfig, line: Sequence[Look], parts: int
) -> PipelineConfig:
    """The config whose one training does what the line's segments did one after the
    other; without a line the config itself.
    """
    if not line:
        return config
    every = max(1, config.distill.fit.steps // parts)
    first = apply(config, line[0].settings)
    changes = [
        _change((look.ninths - 1) * every, apply(config, look.settings))
        for before, look in pairwise(line)
        if look.settings != before.settings
    ]
    return replace(first, distill=replace(first.distill, schedule=tuple(changes)))


def said(line: Sequence[Look]) -> str:
    """Whose state it was, as ``0, 3 from ninth 5``."""
    turns = [
        f"{after.member} from ninth {after.ninths}"
        for before, after in pairwise(line)
        if after.member != before.member
    ]
    return ", ".join([str(line[0].member), *turns])


def copies(looks: Looks) -> list[Look]:
    """Looks of members that had just been replaced, in order of time."""
    return sorted(
        (look for look in looks.values() if look.copied != look.member),
        key=lambda look: (look.ninths, look.member),
    )


def as_schedule(
    looks: Looks, winner: int, line: Sequence[Look], config: PipelineConfig
) -> dict[str, Any]:
    """What ``schedule.json`` holds: all looks, the winner, and its settings by step of
    ``config``, which is as long as the trials were.
    """
    every = max(1, config.distill.fit.steps // line[-1].ninths)
    steps = [
        {
            "from_step": (look.ninths - 1) * every,
            "member": look.member,
            "settings": look.settings,
        }
        for look in line
    ]
    return {
        "looks": [dataclasses.asdict(look) for look in looks.values()],
        "winner": winner,
        "schedule": steps,
    }


def _change(start: int, config: PipelineConfig) -> Change:
    weights = config.distill
    return Change(start, weights.alignment, weights.inconsistent, weights.private)
