"""The journal on an object store."""

from __future__ import annotations

import re
import threading
import time
import uuid
from collections.abc import Iterable, Iterator

from coin_ray import storage
from coin_ray.cloud.journal.base import Contents, Damage, Journal, Record
from coin_ray.cloud.journal.frames import (
    answer_head,
    digest,
    frame,
    parse,
    record_damage,
    record_of,
)
from coin_ray.cloud.journal.index import (
    MICRO,
    Answers,
    Ledger,
    calls_and_usd,
    contents_of,
)

ANSWER_NAME = re.compile(r"([^-]+)-([0-9a-f]{16})(?:-(\d+))?")
"""Key, digest of the body, and the time of writing; older versions left that out."""
SPENDING_NAME = re.compile(r"[^_]*_(-?\d+)_(-?\d+)(?:_(\d+)_([0-9a-f]*))?")
"""Calls, millionths of a USD, the time and the account; older versions left out the
last two."""


class ObjectJournal(Journal):
    """Journal on an object store: one object per answer, and empty objects whose names
    say what was spent.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._lock = threading.Lock()
        self._answers = Answers()
        self._spendings: set[str] = set()
        self.refresh()

    def get(self, key: str) -> Record | None:
        with self._lock:
            place = self._answers.place(key)
        parsed = parse(storage.read_bytes(place.path), 0) if place else None
        return record_of(*parsed[:2]) if parsed else None

    def put(self, key: str, record: Record) -> None:
        body = digest(record.body)
        place = storage.join(
            self._uri, "answers", f"{key}-{body}-{time.time_ns():020d}"
        )
        storage.write_bytes(place, frame(answer_head(key, record), record.body))
        with self._lock:
            self._answers.learn(key, body, place)

    def attempt(
        self, key: str, usd: float, account: str = "", moment: float = 0.0
    ) -> None:
        self._spend(key, 1, usd, account, moment)

    def refund(self, key: str, usd: float, account: str = "") -> None:
        self._spend(key, -1, -usd, account, 0.0)

    def quarantine(self, key: str, body: bytes, reason: str) -> None:
        head = {
            "kind": "quarantine",
            "key": key,
            "digest": digest(body),
            "reason": reason,
        }
        storage.write_bytes(
            storage.join(self._uri, "quarantine", f"{key}-{digest(body)}"),
            frame(head, body),
        )
        with self._lock:
            self._answers.rejected.add((key, digest(body)))

    def spent(self, account: str | None = None) -> tuple[int, float]:
        with self._lock:
            return calls_and_usd(_ledger(self._spendings).total(account))

    def starts(self, account: str, since: float) -> list[float]:
        with self._lock:
            return _ledger(self._spendings).starts(account, since)

    def keys(self) -> list[str]:
        with self._lock:
            return self._answers.keys()

    def contents(self) -> Contents:
        """Without services and models: those are inside the objects."""
        with self._lock:
            return contents_of(
                self._answers,
                _ledger(self._spendings).total(),
                sum(storage.file_sizes(self._uri).values()),
                {},
            )

    def verify(self) -> Iterator[Damage]:
        for folder in ("answers", "quarantine"):
            for place in storage.list_files(storage.join(self._uri, folder)):
                reason = _object_damage(place, folder)
                if reason:
                    yield Damage(place, 0, reason)
        for place in storage.list_files(storage.join(self._uri, "spent")):
            if not SPENDING_NAME.fullmatch(_name(place)):
                yield Damage(place, 0, "the name says nothing of calls and USD")

    def refresh(self) -> None:
        rejected = {(name[1], name[2]) for name, _ in self._named("quarantine")}
        answers = sorted(self._named("answers"), key=lambda found: found[0][3] or "")
        spendings = {
            _name(place)
            for place in storage.list_files(storage.join(self._uri, "spent"))
        }
        with self._lock:
            self._answers = Answers()
            self._answers.rejected = rejected
            for name, place in answers:
                self._answers.learn(name[1], name[2], place)
            self._spendings |= spendings

    def close(self) -> None:
        pass

    def _named(self, folder: str) -> list[tuple[re.Match[str], str]]:
        """Objects of a folder by name; those with other names are ``verify``'s
        business.
        """
        places = storage.list_files(storage.join(self._uri, folder))
        return [
            (name, place)
            for place in places
            if (name := ANSWER_NAME.fullmatch(_name(place)))
        ]

    def _spend(
        self, key: str, calls: int, usd: float, account: str, moment: float
    ) -> None:
        name = f"{key[:16]}{uuid.uuid4().hex}_{calls}_{round(usd * MICRO)}_{int(moment or time.time())}_{account}"
        storage.write_bytes(storage.join(self._uri, "spent", name), b"")
        with self._lock:
            self._spendings.add(name)


def _ledger(names: Iterable[str]) -> Ledger:
    """What the names of an object store's spendings say."""
    ledger = Ledger()
    for match in map(SPENDING_NAME.fullmatch, names):
        if match:
            calls = int(match[1])
            newer = {"time": int(match[3]), "account": match[4]} if match[3] else {}
            ledger.record(
                {
                    "kind": "attempt" if calls > 0 else "refund",
                    "calls": calls,
                    "micro_usd": int(match[2]),
                    **newer,
                }
            )
    return ledger


def _name(place: str) -> str:
    return place.rpartition("/")[2]


def _object_damage(place: str, folder: str) -> str:
    """Why the object is not what its name says; empty if it is."""
    data = storage.read_bytes(place)
    parsed = parse(data, 0)
    if parsed is None or parsed[2] != len(data):
        return "no whole record, or its checksum is wrong"
    name = ANSWER_NAME.fullmatch(_name(place))
    if (
        name is None
        or (parsed[0].get("key"), parsed[0].get("digest")) != name.groups()[:2]
    ):
        return f"the record belongs to another name in {folder}"
    return record_damage(parsed[0], parsed[1])
