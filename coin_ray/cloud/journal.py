"""Every paid answer, raw, on durable storage before anything looks at it; and every attempt before it is made.

A run that is killed anywhere finds its answers and what it has spent again. On a local disk each writer appends to a
segment file of its own; elsewhere each answer is one object. Request images and secrets are never stored.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import mmap
import os
import re
import struct
import threading
import time
import uuid
import zlib
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO

from coin_ray import storage
from coin_ray.cloud.protocol import Query
from coin_ray.errors import InputError

MAGIC = b"\x93CRJ"
FRAME = struct.Struct("<4sIII")
"""Magic, length of the JSON head, length of the compressed body, CRC32 of both."""
MICRO = 1_000_000
SEGMENT = ".segment"
COMPACTED = f"-compacted{SEGMENT}"
TASK = ".task"
"""Ending of the keys under which a task's number is kept until its answer is there."""
READ_AHEAD = 8192
OPEN_FILES = 64
ANSWER_NAME = re.compile(r"([^-]+)-([0-9a-f]{16})(?:-(\d+))?")
"""Key, digest of the body, and the time of writing; older versions left that out."""
SPENDING_NAME = re.compile(r"[^_]*_(-?\d+)_(-?\d+)(?:_(\d+)_([0-9a-f]*))?")
"""Calls, millionths of a USD, the time and the account; older versions left out the last two."""
MINUTE, DAY = 60.0, 86_400.0


@dataclass(frozen=True, slots=True)
class Record:
    """One raw answer. ``content_type`` and ``body`` are what the service sent, the rest is for the tables."""

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
    """What a journal holds. ``answers``: live ones; ``tasks``: images that services took on and that may have no answer yet."""

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


def answer_key(adapter: str, endpoint: str, query: Query, max_side: int, sent: bytes) -> str:
    """Identity of an answer: whatever could change it. ``endpoint``: host and path, or the name of a local server."""
    identity = {
        "adapter": adapter,
        "endpoint": endpoint,
        "model": query.model,
        "classes": list(query.classes),
        "threshold": query.score_min,
        "max_side": max_side,
        "image": hashlib.sha256(sent).hexdigest(),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Journal(ABC):
    """Answers by key, and what was spent. Safe with many writers at once; each process opens its own."""

    prompt = False
    """Whether ``attempt`` and ``refund`` return at once; otherwise an event loop must not wait for them."""

    @staticmethod
    def open(uri: str) -> Journal:
        """The journal below a URI; an absent one is made. Reads what all writers have left there."""
        uri = storage.absolute(uri)
        return ObjectJournal(uri) if "://" in uri and not uri.startswith("file://") else SegmentJournal(uri.removeprefix("file://"))

    @abstractmethod
    def get(self, key: str) -> Record | None:
        """The latest answer that was not quarantined, or None."""

    @abstractmethod
    def put(self, key: str, record: Record) -> None:
        """Returns when the answer is durable."""

    @abstractmethod
    def attempt(self, key: str, usd: float, account: str = "", moment: float = 0.0) -> None:
        """Called before each request is sent: from here on it counts as spent, even if this process dies.

        ``account``: hexadecimal name of who bills it; ``moment``: seconds since 1970, 0 for now.
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
        """When an account's calls after ``since`` began, oldest first, in seconds since 1970: the end of the minute, or now.

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


@dataclass(frozen=True, slots=True)
class _Place:
    path: str
    offset: int
    digest: str
    older: _Place | None
    """The answer before this one, in case this one is quarantined."""


class _Answers:
    """Where the answers are, and which were quarantined. Memory holds places, not bodies."""

    def __init__(self) -> None:
        self.latest: dict[str, _Place] = {}
        self.rejected: set[tuple[str, str]] = set()

    def learn(self, key: str, digest: str, path: str, offset: int = 0) -> None:
        older = self.latest.get(key)
        if older is not None and older.digest == digest:
            older = older.older
        self.latest[key] = _Place(path, offset, digest, older)

    def place(self, key: str) -> _Place | None:
        place = self.latest.get(key)
        while place is not None and (key, place.digest) in self.rejected:
            place = place.older
        return place

    def keys(self) -> list[str]:
        return [key for key in self.latest if self.place(key) is not None]


@dataclass(slots=True)
class _Spent:
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


class _Ledger:
    """What was spent, by account; older versions named none."""

    def __init__(self) -> None:
        self.accounts: defaultdict[str, _Spent] = defaultdict(_Spent)

    def record(self, head: Mapping[str, Any]) -> None:
        """An attempt or a refund."""
        attempt = head["kind"] == "attempt"
        sums = {"attempts": int(attempt), "refunds": int(not attempt), "calls": head["calls"], "micro_usd": head["micro_usd"]}
        minutes = {str(int(head["time"] // MINUTE)): 1} if attempt and "time" in head else {}
        self.accounts[head.get("account", "")].add(sums | {"minutes": minutes})

    def compacted(self, head: Mapping[str, Any]) -> None:
        for account, sums in head.get("accounts", {"": head}).items():
            self.accounts[account].add(sums)

    def total(self, account: str | None = None) -> _Spent:
        total = _Spent()
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
            sums["minutes"] = {minute: count for minute, count in sums["minutes"].items() if int(minute) >= first}
        return {"accounts": kept}


class SegmentJournal(Journal):
    """Journal on a local (or mounted) disk: checksummed records in append-only files, one file per writer.

    A torn record, at the end or in the middle, is skipped. Every open journal shares a lock on the folder, so that ``compact``
    notices that others use it. A compacted segment names the ones it replaces; whoever sees it no longer reads those.
    """

    prompt = True

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._file: int | None = None
        self._readers: dict[str, io.FileIO] = {}
        self._segment = ""
        os.makedirs(folder, exist_ok=True)
        self._guard = _shared_guard(folder)
        self._forget()
        self.refresh()

    def get(self, key: str) -> Record | None:
        try:
            return self._get(key)
        except FileNotFoundError:  # compacted meanwhile, on a disk without locks
            self.refresh()
            return self._get(key)

    def put(self, key: str, record: Record) -> None:
        self._append(_answer_head(key, record), record.body, durable=True)

    def attempt(self, key: str, usd: float, account: str = "", moment: float = 0.0) -> None:
        head = {"kind": "attempt", "key": key, "calls": 1, "micro_usd": round(usd * MICRO)}
        self._append(head | {"time": round(moment or time.time(), 3), "account": account})

    def refund(self, key: str, usd: float, account: str = "") -> None:
        self._append({"kind": "refund", "key": key, "calls": -1, "micro_usd": -round(usd * MICRO), "account": account})

    def quarantine(self, key: str, body: bytes, reason: str) -> None:
        head = {"kind": "quarantine", "key": key, "digest": _digest(body), "reason": reason}
        self._append(head, body, durable=True)

    def spent(self, account: str | None = None) -> tuple[int, float]:
        with self._lock:
            return _calls_and_usd(self._spent.total(account))

    def starts(self, account: str, since: float) -> list[float]:
        with self._lock:
            return self._spent.starts(account, since)

    def keys(self) -> list[str]:
        with self._lock:
            return self._answers.keys()

    def contents(self) -> Contents:
        with self._lock:
            services: Counter[tuple[str, str]] = Counter()
            for head, _ in self._live():
                if head["kind"] == "answer" and not head["key"].endswith(TASK):
                    services[head.get("service", ""), head.get("model", "")] += 1
            size = sum(os.path.getsize(os.path.join(self._folder, name)) for name in self._segments())
            return _contents(self._answers, self._spent.total(), size, services)

    def verify(self) -> Iterator[Damage]:
        with self._lock:
            names = [name for name in self._segments() if name not in self._replaced]
        for name in names:
            yield from _damages(os.path.join(self._folder, name))

    def compact(self) -> tuple[int, int]:
        """Rewrite the live answers, the quarantine and the sums of what was spent as one segment; bytes before and after.

        The new segment appears whole, by one rename, and names those it replaces: killed anywhere, nothing is lost or counted
        twice. Raises InputError if another process, or another open journal of this one, uses the folder.
        """
        with self._lock, self._alone():
            self._forget()
            self._refresh()
            old = {name: os.path.getsize(os.path.join(self._folder, name)) for name in self._segments()}
            name = self._new_segment(COMPACTED)
            self._write_compacted(name, old)
            for leftover in [*old, *(n for n in os.listdir(self._folder) if n.endswith(".tmp"))]:
                os.remove(os.path.join(self._folder, leftover))
            _sync_folder(self._folder)
            self._forget()
            self._refresh()
            return sum(old.values()), os.path.getsize(os.path.join(self._folder, name))

    def refresh(self) -> None:
        with self._lock:
            self._refresh()

    def close(self) -> None:
        with self._lock:
            self._close_segment()
            self._readers = {}
            if self._guard is not None:
                self._guard.close()
                self._guard = None

    def _forget(self) -> None:
        self._answers, self._spent = _Answers(), _Ledger()
        self._read_up_to: dict[str, int] = {}
        self._replaced: set[str] = set()
        self._counted: set[str] = set()
        self._readers = {}

    def _segments(self) -> list[str]:
        """In the order in which they were begun."""
        return sorted(name for name in os.listdir(self._folder) if name.endswith(SEGMENT))

    def _new_segment(self, ending: str = SEGMENT) -> str:
        return f"t{time.time_ns():020d}-{uuid.uuid4().hex[:8]}{ending}"

    def _get(self, key: str) -> Record | None:
        with self._lock:
            place = self._answers.place(key)
            reader = self._reader(place.path) if place is not None else None
        if place is None or reader is None:
            return None
        data = os.pread(reader.fileno(), READ_AHEAD, place.offset)
        missing = _frame_length(data) - len(data)
        if missing > 0:
            data += os.pread(reader.fileno(), missing, place.offset + len(data))
        parsed = _parse(data, 0)
        return _record(*parsed[:2]) if parsed else None

    def _reader(self, path: str) -> io.FileIO:
        if path not in self._readers:
            if len(self._readers) >= OPEN_FILES:
                self._readers = {}
            self._readers[path] = io.FileIO(path)
        return self._readers[path]

    def _append(self, head: dict[str, Any], body: bytes = b"", *, durable: bool = False) -> None:
        """One ``write`` per record: a killed process leaves a whole record or a torn last one. ``durable`` also survives a power cut."""
        data = _frame(head, body)
        with self._lock:
            file = self._writable()
            offset = os.lseek(file, 0, os.SEEK_END)
            _write_all(file, data)
            self._learn(head, os.path.join(self._folder, self._segment), offset)
            self._read_up_to[self._segment] = offset + len(data)
            waiting = os.dup(file) if durable else None
        if waiting is not None:  # outside the lock, so that one wait for the disk serves all who wait
            try:
                os.fsync(waiting)
            finally:
                os.close(waiting)

    def _writable(self) -> int:
        if self._guard is None:
            self._guard = _shared_guard(self._folder)
        if self._file is None:
            self._segment = self._new_segment()
            self._file = os.open(os.path.join(self._folder, self._segment), os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
            _sync_folder(self._folder)
        return self._file

    def _close_segment(self) -> None:
        """The next record begins another segment: this one may be compacted meanwhile."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _refresh(self) -> None:
        names = self._segments()
        for name in names:
            if name.endswith(COMPACTED) and name not in self._read_up_to and name not in self._replaced:
                self._replaced.update(_replaced_by(os.path.join(self._folder, name)))
        if self._replaced & self._read_up_to.keys():
            self._forget()
            return self._refresh()
        for name in names:
            if name not in self._replaced:
                self._read(name)
        return None

    def _read(self, name: str) -> None:
        path = os.path.join(self._folder, name)
        start = self._read_up_to.get(name, 0)
        if os.path.getsize(path) <= start:
            return
        with _mapped(path) as data:
            for head, offset, end in _heads(data, start):
                self._learn(head, path, offset)
                self._read_up_to[name] = end

    def _learn(self, head: dict[str, Any], path: str, offset: int) -> None:
        if head["kind"] == "answer":
            self._answers.learn(head["key"], head["digest"], path, offset)
        elif head["kind"] == "quarantine":
            self._answers.rejected.add((head["key"], head["digest"]))
        elif head["kind"] in ("attempt", "refund"):
            self._spent.record(head)
        elif head["kind"] == "compacted" and head["id"] not in self._counted:
            self._counted.add(head["id"])
            self._spent.compacted(head)

    def _live(self) -> Iterator[tuple[dict[str, Any], bytes]]:
        """Head and whole frame of each answer that ``get`` returns, and of each quarantined body once."""
        seen: set[tuple[str, str]] = set()
        for name in self._segments():
            path = os.path.join(self._folder, name)
            if name in self._replaced or not os.path.getsize(path):
                continue
            with _mapped(path) as data:
                for head, offset, end in _heads(data, 0):
                    if head["kind"] == "quarantine" and (head["key"], head["digest"]) not in seen:
                        seen.add((head["key"], head["digest"]))
                        yield head, data[offset:end]
                    elif head["kind"] == "answer":
                        place = self._answers.place(head["key"])
                        if place is not None and (place.path, place.offset) == (path, offset):
                            yield head, data[offset:end]

    def _write_compacted(self, name: str, old: Mapping[str, int]) -> None:
        """The sums stand at both ends of the file, so that one damaged record doesn't lose them; they count once."""
        sums = _frame({"kind": "compacted", "id": name, "replaces": sorted(old), **self._spent.sums()}, b"")
        path = os.path.join(self._folder, name)
        try:
            with open(f"{path}.tmp", "wb") as stream:
                stream.write(sums)
                for _, data in self._live():
                    stream.write(data)
                stream.write(sums)
                stream.flush()
                os.fsync(stream.fileno())
            if {n: os.path.getsize(os.path.join(self._folder, n)) for n in self._segments()} != old:
                raise InputError(f"the journal {self._folder} was written to while it was compacted; stop the run and try again")
            os.replace(f"{path}.tmp", path)
        finally:
            if os.path.exists(f"{path}.tmp"):
                os.remove(f"{path}.tmp")
        _sync_folder(self._folder)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self._close_segment()
        if self._guard is None:
            self._guard = _shared_guard(self._folder)
        if self._guard is None:
            raise InputError(
                f"the disk of the journal {self._folder} keeps no locks, so that a running writer could go unnoticed: not compacted"
            )
        try:
            fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"the journal {self._folder} is in use; stop the run that uses it and try again") from None
        else:
            yield
        finally:
            fcntl.flock(self._guard, fcntl.LOCK_SH)


class ObjectJournal(Journal):
    """Journal on an object store: one object per answer, and empty objects whose names say what was spent."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._lock = threading.Lock()
        self._answers = _Answers()
        self._spendings: set[str] = set()
        self.refresh()

    def get(self, key: str) -> Record | None:
        with self._lock:
            place = self._answers.place(key)
        parsed = _parse(storage.read_bytes(place.path), 0) if place else None
        return _record(*parsed[:2]) if parsed else None

    def put(self, key: str, record: Record) -> None:
        digest = _digest(record.body)
        place = storage.join(self._uri, "answers", f"{key}-{digest}-{time.time_ns():020d}")
        storage.write_bytes(place, _frame(_answer_head(key, record), record.body))
        with self._lock:
            self._answers.learn(key, digest, place)

    def attempt(self, key: str, usd: float, account: str = "", moment: float = 0.0) -> None:
        self._spend(key, 1, usd, account, moment)

    def refund(self, key: str, usd: float, account: str = "") -> None:
        self._spend(key, -1, -usd, account, 0.0)

    def quarantine(self, key: str, body: bytes, reason: str) -> None:
        head = {"kind": "quarantine", "key": key, "digest": _digest(body), "reason": reason}
        storage.write_bytes(storage.join(self._uri, "quarantine", f"{key}-{_digest(body)}"), _frame(head, body))
        with self._lock:
            self._answers.rejected.add((key, _digest(body)))

    def spent(self, account: str | None = None) -> tuple[int, float]:
        with self._lock:
            return _calls_and_usd(_ledger(self._spendings).total(account))

    def starts(self, account: str, since: float) -> list[float]:
        with self._lock:
            return _ledger(self._spendings).starts(account, since)

    def keys(self) -> list[str]:
        with self._lock:
            return self._answers.keys()

    def contents(self) -> Contents:
        """Without services and models: those are inside the objects."""
        with self._lock:
            return _contents(self._answers, _ledger(self._spendings).total(), sum(storage.file_sizes(self._uri).values()), {})

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
        spendings = {_name(place) for place in storage.list_files(storage.join(self._uri, "spent"))}
        with self._lock:
            self._answers = _Answers()
            self._answers.rejected = rejected
            for name, place in answers:
                self._answers.learn(name[1], name[2], place)
            self._spendings |= spendings

    def close(self) -> None:
        pass

    def _named(self, folder: str) -> list[tuple[re.Match[str], str]]:
        """Objects of a folder by name; those with other names are ``verify``'s business."""
        places = storage.list_files(storage.join(self._uri, folder))
        return [(name, place) for place in places if (name := ANSWER_NAME.fullmatch(_name(place)))]

    def _spend(self, key: str, calls: int, usd: float, account: str, moment: float) -> None:
        name = f"{key[:16]}{uuid.uuid4().hex}_{calls}_{round(usd * MICRO)}_{int(moment or time.time())}_{account}"
        storage.write_bytes(storage.join(self._uri, "spent", name), b"")
        with self._lock:
            self._spendings.add(name)


def _ledger(names: Iterable[str]) -> _Ledger:
    """What the names of an object store's spendings say."""
    ledger = _Ledger()
    for match in map(SPENDING_NAME.fullmatch, names):
        if match:
            calls = int(match[1])
            newer = {"time": int(match[3]), "account": match[4]} if match[3] else {}
            ledger.record({"kind": "attempt" if calls > 0 else "refund", "calls": calls, "micro_usd": int(match[2]), **newer})
    return ledger


def _shared_guard(folder: str) -> BinaryIO | None:
    """The folder's lock, shared with all who have the journal open; None where the disk has no locks or can't be written."""
    try:
        guard = open(os.path.join(folder, "lock"), "ab")  # noqa: SIM115
        fcntl.flock(guard, fcntl.LOCK_SH)
    except OSError:
        return None
    return guard


def _calls_and_usd(spent: _Spent) -> tuple[int, float]:
    return spent.calls, spent.micro_usd / MICRO


def _contents(answers: _Answers, spent: _Spent, size: int, services: Mapping[tuple[str, str], int]) -> Contents:
    keys = answers.keys()
    tasks = sum(key.endswith(TASK) for key in keys)
    usd = spent.micro_usd / MICRO
    return Contents(len(keys) - tasks, tasks, len(answers.rejected), spent.attempts, spent.refunds, spent.calls, usd, size, services)


def _name(place: str) -> str:
    return place.rpartition("/")[2]


def _object_damage(place: str, folder: str) -> str:
    """Why the object is not what its name says; empty if it is."""
    data = storage.read_bytes(place)
    parsed = _parse(data, 0)
    if parsed is None or parsed[2] != len(data):
        return "no whole record, or its checksum is wrong"
    name = ANSWER_NAME.fullmatch(_name(place))
    if name is None or (parsed[0].get("key"), parsed[0].get("digest")) != name.groups()[:2]:
        return f"the record belongs to another name in {folder}"
    return _record_damage(parsed[0], parsed[1])


def _damages(path: str) -> Iterator[Damage]:
    """Each stretch of a segment without a whole record, and each record that is whole but wrong."""
    if not os.path.getsize(path):
        return
    with _mapped(path) as data:
        expected = 0
        for head, offset, end in _heads(data, 0):
            if offset > expected:
                yield Damage(path, expected, f"{offset - expected} bytes without a whole record")
            expected = end
            reason = _record_damage(head, _parse(data, offset, body=True)[1])  # type: ignore[index]
            if reason:
                yield Damage(path, offset, reason)
        if expected < len(data):
            yield Damage(path, expected, f"the last {len(data) - expected} bytes are no whole record: a writer was killed, or is writing")


def _record_damage(head: Mapping[str, Any], packed: bytes) -> str:
    kind = head.get("kind")
    if kind not in ("answer", "quarantine", "attempt", "refund", "compacted"):
        return f"unknown kind of record {str(kind)[:40]!r}"
    if kind not in ("answer", "quarantine"):
        return ""
    try:
        body = zlib.decompress(packed)
    except zlib.error:
        return "the body can't be unpacked"
    return "" if _digest(body) == head.get("digest") else "the body is not the one that was received"


def _replaced_by(path: str) -> list[str]:
    if not os.path.getsize(path):
        return []
    with _mapped(path) as data:
        return next((head["replaces"] for head, _, _ in _heads(data, 0) if head["kind"] == "compacted"), [])


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:16]


def _answer_head(key: str, record: Record) -> dict[str, Any]:
    fields = {name: value for name, value in asdict(record).items() if name != "body" and value != ""}
    fields["time"] = fields["time"] or time.time()
    return {"kind": "answer", "key": key, "digest": _digest(record.body), **fields}


def _frame(head: dict[str, Any], body: bytes) -> bytes:
    name, packed = json.dumps(head, separators=(",", ":")).encode(), zlib.compress(body, 1)
    return FRAME.pack(MAGIC, len(name), len(packed), zlib.crc32(name + packed)) + name + packed


def _frame_length(start: bytes) -> int:
    _, head_length, body_length, _ = FRAME.unpack_from(start)
    return int(FRAME.size + head_length + body_length)


@contextmanager
def _mapped(path: str) -> Iterator[mmap.mmap]:
    with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def _parse(data: bytes | mmap.mmap, offset: int, *, body: bool = True) -> tuple[dict[str, Any], bytes, int] | None:
    """Head, packed body (if wanted) and end of the record at ``offset``; None if there is no whole, undamaged one."""
    if offset + FRAME.size > len(data):
        return None
    magic, head_length, body_length, checksum = FRAME.unpack_from(data, offset)
    start = offset + FRAME.size
    end = start + head_length + body_length
    if magic != MAGIC or end > len(data):
        return None
    whole = data[start:end]
    if zlib.crc32(whole) != checksum:
        return None
    return json.loads(whole[:head_length]), whole[head_length:] if body else b"", end


def _heads(data: mmap.mmap, offset: int) -> Iterator[tuple[dict[str, Any], int, int]]:
    """Head, offset and end of each whole record from ``offset`` on; damaged stretches are skipped."""
    while offset >= 0:
        parsed = _parse(data, offset, body=False)
        if parsed is None:
            offset = data.find(MAGIC, offset + 1)
            continue
        yield parsed[0], offset, parsed[2]
        offset = parsed[2]


def _record(head: dict[str, Any], packed: bytes) -> Record:
    names = ("content_type", "attempts", "latency_ms", "cost_usd", "time", "service", "model")
    return Record(zlib.decompress(packed), **{name: head[name] for name in names if name in head})


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _sync_folder(folder: str) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
