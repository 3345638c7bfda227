"""The interface of a journal, and the records it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

IMAGE_ID_DIGITS = 16
"""Digits of an image's id that identify it in the record of a call."""


@dataclass(frozen=True, slots=True)
class AnswerRecord:
    """One raw answer. ``content_type`` and ``body`` are what the service sent, the other
    fields are for the tables.
    """

    body: bytes
    content_type: str = "application/json"
    attempts: int = 1
    latency_ms: float = 0.0
    cost_usd: float = 0.0
    time: float = 0.0
    """Seconds since 1970 at which the answer arrived."""
    service: str = ""
    model: str = ""
    run: str = ""
    """The run that asked and paid, filled in by ``put``."""
    version: str = ""
    """The model or version that the service says has answered."""


@dataclass(frozen=True, slots=True)
class CallAccount:
    """The calls that were billed or may have been, of all processes that ever wrote to
    the journal.
    """

    calls: int = 0
    usd: float = 0.0
    unanswered_images: tuple[str, ...] = ()
    """For each call that was sent and has no answer on record, and so may be billed: the
    first ``IMAGE_ID_DIGITS`` digits of the image's id, or an empty text."""

    @property
    def unanswered(self) -> int:
        """Return the number of calls that may be billed without an answer on record."""
        return len(self.unanswered_images)

    @property
    def answered(self) -> int:
        """Return the number of calls with an answer on record."""
        return self.calls - self.unanswered


@dataclass(frozen=True, slots=True)
class JournalContents:
    """Counts of what a journal holds.

    ``answers``: those that ``get`` returns; ``tasks``: images that services accepted
    and that may have no answer yet.
    """

    answers: int
    tasks: int
    quarantined: int
    attempts: int
    refunds: int
    calls: int
    usd: float
    size: int
    """Bytes on the disk or in the object store."""
    services: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """Answers by (service, model); empty names where a record does not name them."""
    unanswered: int = 0
    """Calls that were sent and have no answer on record: they may be billed."""


@dataclass(frozen=True, slots=True)
class JournalDamage:
    """Bytes of a file or object that are no whole, undamaged record."""

    path: str
    offset: int
    reason: str


class Journal(ABC):
    """Answers by key, and what was spent. Safe with many writers at once; each process
    opens its own with ``open_journal``.
    """

    run = ""
    """The run whose calls this journal records."""
    notes_are_fast = False
    """Whether ``attempt`` and ``refund`` return at once; otherwise they must be called
    in a thread beside an event loop."""

    @abstractmethod
    def get(self, key: str) -> AnswerRecord | None:
        """Return the latest answer that was not quarantined, or None."""

    @abstractmethod
    def put(self, key: str, record: AnswerRecord) -> None:
        """Store an answer; return when it is durable."""

    def put_all(self, answers: Sequence[tuple[str, AnswerRecord]]) -> None:
        """Store answers by key; return when all are durable."""
        for key, record in answers:
            self.put(key, record)

    @abstractmethod
    def has(self, key: str) -> bool:
        """Return whether ``get`` would find an answer, from memory alone."""

    @abstractmethod
    def attempt(
        self,
        key: str,
        usd: float,
        account: str = "",
        moment: float = 0.0,
        image_id: str = "",
    ) -> None:
        """Record an attempt before its request is sent: from here on it counts as
        spent, even if this process dies. The next answer that this journal puts for the
        key is the attempt's.

        ``account``: hexadecimal name of the account that is billed; ``moment``: seconds
        since 1970, 0 for now; ``image_id``: sha256 of the image's file.
        """

    @abstractmethod
    def refund(self, key: str, usd: float, account: str = "") -> None:
        """Record that the last attempt was certainly not billed."""

    @abstractmethod
    def quarantine(self, key: str, body: bytes, reason: str) -> None:
        """Keep the body for inspection, and never return it as an answer again."""

    @abstractmethod
    def drop(self, key: str) -> None:
        """Never return the key's present answers again, so that it is asked again; a
        later answer counts, also an equal one. What was spent stays spent.
        """

    def drop_all(self, keys: Collection[str]) -> None:
        """Drop the answers of several keys."""
        for key in keys:
            self.drop(key)

    def has_other_users(self) -> bool:
        """Return whether another process has the journal open, as far as that can be
        told.
        """
        return False

    @abstractmethod
    def spent(self, account: str | None = None) -> tuple[int, float]:
        """Return calls and USD that were billed or may have been, of all writers known
        so far.

        ``account``: only this account's, and those of older versions, which recorded no
        account.
        """

    @abstractmethod
    def account(self, run: str | None = None) -> CallAccount:
        """Return the calls that were billed or may have been, and which of them have no
        answer on record; ``run``: only this run's. None: those of all runs.

        Older versions recorded neither runs nor which call an answer belongs to: their
        calls count as answered.
        """

    @abstractmethod
    def call_starts(self, account: str, since: float) -> list[float]:
        """Return when an account's calls after ``since`` began, oldest first, in
        seconds since 1970, rounded up to the end of the minute or to now.

        Calls of older versions, which recorded no time, are missing.
        """

    @abstractmethod
    def keys(self) -> list[str]:
        """Return the keys of all answers that ``get`` would return, tasks included."""

    def latest_version(self, service: str, model: str) -> str:
        """Return the model version of the latest answer of a service and model; empty if
        none is known without expensive reads.
        """
        return ""

    @abstractmethod
    def contents(self) -> JournalContents:
        """Return counts, as far as they are known without expensive reads."""

    @abstractmethod
    def verify(self) -> Iterator[JournalDamage]:
        """Read every record again and yield the damaged ones."""

    @abstractmethod
    def refresh(self) -> None:
        """Read what other writers have added."""

    @abstractmethod
    def close(self) -> None:
        """Close the files; the journal opens them again when it is used."""
