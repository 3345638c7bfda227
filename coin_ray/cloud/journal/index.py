"""What a journal keeps in memory: where the answers are, and what was spent."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from coin_ray.cloud.journal.base import JournalContents
from coin_ray.cloud.journal.keys import TASK

MICRO_USD = 1_000_000
"""Millionths of a USD in one: sums are kept as whole numbers of them."""
MINUTE, DAY = 60.0, 86_400.0


@dataclass(frozen=True, slots=True)
class AnswerLocation:
    """Where an answer is stored."""

    path: str
    offset: int
    digest: str
    previous: AnswerLocation | None
    """The answer before this one, in case this one is quarantined."""


class AnswerIndex:
    """Locations of the answers, and which answers were quarantined. Bodies stay on the
    disk.
    """

    def __init__(self) -> None:
        self.latest: dict[str, AnswerLocation] = {}
        self.quarantined: set[tuple[str, str]] = set()
        """Key and digest of the body."""

    def add(self, key: str, digest: str, path: str, offset: int = 0) -> None:
        """Note an answer that was written or read."""
        previous = self.latest.get(key)
        if previous is not None and previous.digest == digest:
            previous = previous.previous
        self.latest[key] = AnswerLocation(path, offset, digest, previous)

    def drop(self, key: str) -> None:
        """Forget all answers so far; an equal one that follows counts again."""
        self.latest.pop(key, None)
        self.quarantined = {pair for pair in self.quarantined if pair[0] != key}

    def locate(self, key: str) -> AnswerLocation | None:
        """Return the location of the latest answer that was not quarantined."""
        location = self.latest.get(key)
        while location is not None and (key, location.digest) in self.quarantined:
            location = location.previous
        return location

    def keys(self) -> list[str]:
        """Return the keys that have an answer."""
        return [key for key in self.latest if self.locate(key) is not None]


@dataclass(slots=True)
class Spending:
    """Sums of attempts and refunds."""

    attempts: int = 0
    refunds: int = 0
    calls: int = 0
    micro_usd: int = 0
    minutes: dict[str, int] = field(default_factory=dict)
    """Attempts by the minute since 1970, as far as their time is known."""

    def add(self, sums: Mapping[str, Any]) -> None:
        """Add other sums, by the names of these fields."""
        self.attempts += sums["attempts"]
        self.refunds += sums["refunds"]
        self.calls += sums["calls"]
        self.micro_usd += sums["micro_usd"]
        for minute, count in sums.get("minutes", {}).items():
            self.minutes[minute] = self.minutes.get(minute, 0) + count

    def call_starts(self, since: float) -> Iterator[float]:
        """Yield for each call after ``since`` the end of its minute, or now."""
        now = time.time()
        for minute, count in self.minutes.items():
            begin = int(minute) * MINUTE
            end = begin + MINUTE
            if end > since:
                yield from [max(begin, min(end, now))] * count


class Ledger:
    """What was spent, by account; older versions recorded no account."""

    def __init__(self) -> None:
        self.accounts: defaultdict[str, Spending] = defaultdict(Spending)

    def add_record(self, head: Mapping[str, Any]) -> None:
        """Add a record of kind ``attempt`` or ``refund``."""
        is_attempt = head["kind"] == "attempt"
        minutes = {}
        if is_attempt and "time" in head:
            minutes = {str(int(head["time"] // MINUTE)): 1}
        self.accounts[head.get("account", "")].add(
            {
                "attempts": int(is_attempt),
                "refunds": int(not is_attempt),
                "calls": head["calls"],
                "micro_usd": head["micro_usd"],
                "minutes": minutes,
            }
        )

    def add_compacted(self, head: Mapping[str, Any]) -> None:
        """Add the sums of a compacted segment; older versions kept one sum for all."""
        for account, sums in head.get("accounts", {"": head}).items():
            self.accounts[account].add(sums)

    def total(self, account: str | None = None) -> Spending:
        """Return the sums of one account and of unnamed ones; None: of all."""
        total = Spending()
        for name, spending in self.accounts.items():
            if account is None or name in ("", account):
                total.add(asdict(spending))
        return total

    def call_starts(self, account: str, since: float) -> list[float]:
        """Return when an account's calls after ``since`` began, oldest first."""
        spending = self.accounts.get(account)
        return sorted(spending.call_starts(since)) if spending else []

    def sums(self) -> dict[str, Any]:
        """Return what ``compact`` keeps: of the times only what a daily limit still
        needs.
        """
        first_minute = (time.time() - DAY) // MINUTE
        accounts = {name: asdict(spending) for name, spending in self.accounts.items()}
        for sums in accounts.values():
            sums["minutes"] = {
                minute: count
                for minute, count in sums["minutes"].items()
                if int(minute) >= first_minute
            }
        return {"accounts": accounts}


def calls_and_usd(spending: Spending) -> tuple[int, float]:
    """Return calls and USD."""
    return spending.calls, spending.micro_usd / MICRO_USD


def count_contents(
    answers: AnswerIndex,
    spending: Spending,
    size: int,
    services: Mapping[tuple[str, str], int],
) -> JournalContents:
    """Return the counts of a journal of ``size`` bytes."""
    keys = answers.keys()
    tasks = sum(key.endswith(TASK) for key in keys)
    return JournalContents(
        answers=len(keys) - tasks,
        tasks=tasks,
        quarantined=len(answers.quarantined),
        attempts=spending.attempts,
        refunds=spending.refunds,
        calls=spending.calls,
        usd=spending.micro_usd / MICRO_USD,
        size=size,
        services=services,
    )
