"""What a journal is, and what it holds."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from coin_ray import storage
from coin_ray.cloud.protocol import Query

TASK = ".task"
"""Ending of the keys under which a task's number is kept until its answer is there."""


@dataclass(frozen=True, slots=True)
class Record:
    """One raw answer. ``content_type`` and ``body`` are what the service sent, the rest
    is for the tables.
    """

    body: bytes
    content_type: str = "application/json"
    attempts: int = 1
    latency_ms: float = 0.0
    cost_usd: float = 0.0
    time: float = 0.0
    """Seconds since 1970 at which the answer came."""
    service: str = ""
    model: str = ""


@dataclass(frozen=True, slots=True)
class Contents:
    """What a journal holds. ``answers``: live ones; ``tasks``: images that services
    took on and that may have no answer yet.
    """

    answers: int
    tasks: int
    quarantined: int
    attempts: int
    refunds: int
    calls: int
    usd: float
    size: int
    """Bytes on the disk or in the store."""
    services: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """Live answers by (service, model); empty names where a record does not say."""


@dataclass(frozen=True, slots=True)
class Damage:
    """A place that holds no whole, undamaged record."""

    place: str
    offset: int
    reason: str


def answer_key(
    adapter: str, endpoint: str, query: Query, max_side: int, sent: bytes
) -> str:
    """Identity of an answer: whatever could change it. ``endpoint``: host and path, or
    the name of a local server.
    """
    return answer_key_of(
        adapter, endpoint, query, max_side, hashlib.sha256(sent).hexdigest()
    )


def answer_key_of(
    adapter: str, endpoint: str, query: Query, max_side: int, digest: str
) -> str:
    """The same by the hexadecimal sha256 of what was sent."""
    identity = {
        "adapter": adapter,
        "endpoint": endpoint,
        "model": query.model,
        "classes": list(query.classes),
        "threshold": query.score_min,
        "max_side": max_side,
        "image": digest,
    }
    return hashlib.sha256(
        json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


class Journal(ABC):
    """Answers by key, and what was spent. Safe with many writers at once; each process
    opens its own.
    """

    prompt = False
    """Whether ``attempt`` and ``refund`` return at once; otherwise an event loop must
    not wait for them."""

    @staticmethod
    def open(uri: str) -> Journal:
        """The journal below a URI; an absent one is made. Reads what all writers have
        left there.
        """
        from coin_ray.cloud.journal.journal import SegmentJournal
        from coin_ray.cloud.journal.object_store import ObjectJournal

        uri = storage.absolute(uri)
        return (
            ObjectJournal(uri)
            if "://" in uri and not uri.startswith("file://")
            else SegmentJournal(uri.removeprefix("file://"))
        )

    @abstractmethod
    def get(self, key: str) -> Record | None:
        """The latest answer that was not quarantined, or None."""

    @abstractmethod
    def put(self, key: str, record: Record) -> None:
        """Returns when the answer is durable."""

    @abstractmethod
    def attempt(
        self, key: str, usd: float, account: str = "", moment: float = 0.0
    ) -> None:
        """Called before each request is sent: from here on it counts as spent, even if
        this process dies.

        ``account``: hexadecimal name of who bills it; ``moment``: seconds since 1970, 0
        for now.
        """

    @abstractmethod
    def refund(self, key: str, usd: float, account: str = "") -> None:
        """The last attempt was surely not billed."""

    @abstractmethod
    def quarantine(self, key: str, body: bytes, reason: str) -> None:
        """Keep the body for inspection, and never return it as an answer again."""

    @abstractmethod
    def spent(self, account: str | None = None) -> tuple[int, float]:
        """Calls and USD that were billed or may have been, of all writers known so far.

        ``account``: only this one's, and those of older versions, which named none.
        """

    @abstractmethod
    def starts(self, account: str, since: float) -> list[float]:
        """When an account's calls after ``since`` began, oldest first, in seconds since
        1970: the end of the minute, or now.

        Calls of older versions, which kept no time, are not among them.
        """

    @abstractmethod
    def keys(self) -> list[str]:
        """Of all answers that ``get`` would return, tasks included."""

    @abstractmethod
    def contents(self) -> Contents:
        """Counts, as far as they are known without reading what is dear to read."""

    @abstractmethod
    def verify(self) -> Iterator[Damage]:
        """Read every record again and tell which are damaged."""

    @abstractmethod
    def refresh(self) -> None:
        """Read what other writers have added."""

    @abstractmethod
    def close(self) -> None: ...
