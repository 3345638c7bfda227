"""What a journal keeps in memory: where the answers are, and what was spent."""

from __future__ import annotations

import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from coin_ray.cloud.journal.base import CallAccount, JournalContents
from coin_ray.cloud.journal.keys import BATCH, TASK

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
        self._versions: dict[tuple[str, str], tuple[float, str]] = {}

    def note_version(self, head: Mapping[str, Any]) -> None:
        """Note the model version that the head of an answer names, if any."""
        if not head.get("version"):
            return
        answer_time, version = float(head.get("time", 0.0)), str(head["version"])
        name = (head.get("service", ""), head.get("model", ""))
        if answer_time >= self._versions.get(name, (0.0, ""))[0]:
            self._versions[name] = (answer_time, version)

    def latest_version(self, service: str, model: str) -> str:
        """Return the version of the latest answer that names one; empty if none does."""
        return self._versions.get((service, model), (0.0, ""))[1]

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


class CallIds:
    """The calls of one journal that wait for their answer, by the answer's key: an
    attempt, its answer and its refund name the same call.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, str] = {}

    def begin(self, key: str) -> str:
        """Return the id [12 hexadecimal digits] of a new call about the key."""
        call_id = uuid.uuid4().hex[:12]
        self._waiting[key] = call_id
        return call_id

    def end(self, key: str) -> str:
        """Return the id of the call that is answered or refunded; empty if this journal
        made none. A task that a service accepted is an answer to the call.
        """
        return self._waiting.pop(key.removesuffix(BATCH).removesuffix(TASK), "")


@dataclass(frozen=True, slots=True)
class UnansweredCall:
    """A call that counts as spent and has no answer on record."""

    run: str
    image_id: str


class Ledger:
    """What was spent, by account and by run, and the calls without an answer on record.
    Older versions recorded no account and no run.
    """

    def __init__(self) -> None:
        self.accounts: defaultdict[str, Spending] = defaultdict(Spending)
        self.runs: defaultdict[str, Spending] = defaultdict(Spending)
        self.unanswered: dict[str, UnansweredCall] = {}
        """By the id of the call."""

    def add_record(self, head: Mapping[str, Any]) -> None:
        """Add a record of kind ``attempt`` or ``refund``."""
        is_attempt = head["kind"] == "attempt"
        minutes = {}
        if is_attempt and "time" in head:
            minutes = {str(int(head["time"] // MINUTE)): 1}
        sums = {
            "attempts": int(is_attempt),
            "refunds": int(not is_attempt),
            "calls": head["calls"],
            "micro_usd": head["micro_usd"],
        }
        self.accounts[head.get("account", "")].add(sums | {"minutes": minutes})
        run, call_id = head.get("run", ""), head.get("call", "")
        if run:
            self.runs[run].add(sums)
        if not is_attempt:
            self.mark_answered(call_id)
        elif call_id:
            self.unanswered[call_id] = UnansweredCall(run, head.get("image", ""))

    def mark_answered(self, call_id: str) -> None:
        """Note that the call has an answer on record, or was refunded."""
        self.unanswered.pop(call_id, None)

    def add_compacted(self, head: Mapping[str, Any]) -> None:
        """Add the sums of a compacted segment; older versions kept one sum for all."""
        for account, sums in head.get("accounts", {"": head}).items():
            self.accounts[account].add(sums)
        for run, sums in head.get("runs", {}).items():
            self.runs[run].add(sums)
        for call_id, (run, image_id) in head.get("unanswered", {}).items():
            self.unanswered[call_id] = UnansweredCall(run, image_id)

    def account(self, run: str | None) -> CallAccount:
        """Return the calls of a run, or of all."""
        spending = self.total() if run is None else self.runs.get(run, Spending())
        calls, usd = calls_and_usd(spending)
        unanswered_images = sorted(
            call.image_id
            for call in self.unanswered.values()
            if run is None or call.run == run
        )
        return CallAccount(calls, usd, tuple(unanswered_images))

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
        runs = {name: asdict(spending) for name, spending in self.runs.items()}
        unanswered = {
            call_id: (call.run, call.image_id)
            for call_id, call in self.unanswered.items()
        }
        return {"accounts": accounts, "runs": runs, "unanswered": unanswered}


def calls_and_usd(spending: Spending) -> tuple[int, float]:
    """Return calls and USD."""
    return spending.calls, spending.micro_usd / MICRO_USD


def count_contents(
    answers: AnswerIndex,
    ledger: Ledger,
    size: int,
    services: Mapping[tuple[str, str], int],
) -> JournalContents:
    """Return the counts of a journal of ``size`` bytes."""
    keys = answers.keys()
    spending = ledger.total()
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
        unanswered=len(ledger.unanswered),
    )
