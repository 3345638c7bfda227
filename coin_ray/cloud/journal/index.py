"""What a journal knows in memory: where answers are, and what was spent."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from coin_ray.cloud.journal.base import TASK, Contents

MICRO = 1_000_000
MINUTE, DAY = 60.0, 86_400.0


@dataclass(frozen=True, slots=True)
class Place:
    path: str
    offset: int
    digest: str
    older: Place | None
    """The answer before this one, in case this one is quarantined."""


class Answers:
    """Where the answers are, and which were quarantined. Memory holds places, not
    bodies.
    """

    def __init__(self) -> None:
        self.latest: dict[str, Place] = {}
        self.rejected: set[tuple[str, str]] = set()

    def learn(self, key: str, digest: str, path: str, offset: int = 0) -> None:
        older = self.latest.get(key)
        if older is not None and older.digest == digest:
            older = older.older
        self.latest[key] = Place(path, offset, digest, older)

    def place(self, key: str) -> Place | None:
        place = self.latest.get(key)
        while place is not None and (key, place.digest) in self.rejected:
            place = place.older
        return place

    def keys(self) -> list[str]:
        return [key for key in self.latest if self.place(key) is not None]


@dataclass(slots=True)
class Spent:
    attempts: int = 0
    refunds: int = 0
    calls: int = 0
    micro_usd: int = 0
    minutes: dict[str, int] = field(default_factory=dict)
    """Attempts by the minute since 1970, as far as their time is known."""

    def add(self, sums: Mapping[str, Any]) -> None:
        self.attempts += sums["attempts"]
        self.refunds += sums["refunds"]
        self.calls += sums["calls"]
        self.micro_usd += sums["micro_usd"]
        for minute, count in sums.get("minutes", {}).items():
            self.minutes[minute] = self.minutes.get(minute, 0) + count

    def starts(self, since: float) -> Iterator[float]:
        now = time.time()
        for minute, count in self.minutes.items():
            begin = int(minute) * MINUTE
            if begin + MINUTE > since:
                yield from [max(begin, min(begin + MINUTE, now))] * count


class Ledger:
    """What was spent, by account; older versions named none."""

    def __init__(self) -> None:
        self.accounts: defaultdict[str, Spent] = defaultdict(Spent)

    def record(self, head: Mapping[str, Any]) -> None:
        """An attempt or a refund."""
        attempt = head["kind"] == "attempt"
        sums = {
            "attempts": int(attempt),
            "refunds": int(not attempt),
            "calls": head["calls"],
            "micro_usd": head["micro_usd"],
        }
        minutes = (
            {str(int(head["time"] // MINUTE)): 1} if attempt and "time" in head else {}
        )
        self.accounts[head.get("account", "")].add(sums | {"minutes": minutes})

    def compacted(self, head: Mapping[str, Any]) -> None:
        for account, sums in head.get("accounts", {"": head}).items():
            self.accounts[account].add(sums)

    def total(self, account: str | None = None) -> Spent:
        total = Spent()
        for name, spent in self.accounts.items():
            if account is None or name in ("", account):
                total.add(asdict(spent))
        return total

    def starts(self, account: str, since: float) -> list[float]:
        spent = self.accounts.get(account)
        return sorted(spent.starts(since)) if spent else []

    def sums(self) -> dict[str, Any]:
        """As kept by ``compact``: of times only what a daily limit still needs."""
        first = (time.time() - DAY) // MINUTE
        kept = {name: asdict(spent) for name, spent in self.accounts.items()}
        for sums in kept.values():
            sums["minutes"] = {
                minute: count
                for minute, count in sums["minutes"].items()
                if int(minute) >= first
            }
        return {"accounts": kept}


def calls_and_usd(spent: Spent) -> tuple[int, float]:
    return spent.calls, spent.micro_usd / MICRO


def contents_of(
    answers: Answers, spent: Spent, size: int, services: Mapping[tuple[str, str], int]
) -> Contents:
    keys = answers.keys()
    tasks = sum(key.endswith(TASK) for key in keys)
    usd = spent.micro_usd / MICRO
    return Contents(
        len(keys) - tasks,
        tasks,
        len(answers.rejected),
        spent.attempts,
        spent.refunds,
        spent.calls,
        usd,
        size,
        services,
    )
