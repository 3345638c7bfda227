"""Every paid answer, raw, on durable storage before anything looks at it; and every attempt before it is made.

A run that is killed anywhere finds its answers and what it has spent again. On a local disk each writer appends to a
segment file of its own; elsewhere each answer is one object. Request images and secrets are never stored.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import threading
import time
import uuid
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from coin_ray import storage
from coin_ray.cloud.protocol import Query

MAGIC = b"\x93CRJ"
FRAME = struct.Struct("<4sIII")
"""Magic, length of the JSON head, length of the compressed body, CRC32 of both."""
MICRO = 1_000_000


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

    @staticmethod
    def open(uri: str) -> Journal:
        """The journal below a URI; an absent one is made. Reads what all writers have left there."""
        uri = storage.absolute(uri)
        return ObjectJournal(uri) if "://" in uri and not uri.startswith("file://") else SegmentJournal(uri.removeprefix("file://"))

    @abstractmethod
    def get(self, key: str) -> Record | None:
        """The answer, or None if there is none or it was quarantined."""

    @abstractmethod
    def put(self, key: str, record: Record) -> None:
        """Returns when the answer is durable."""

    @abstractmethod
    def attempt(self, key: str, usd: float) -> None:
        """Called before each request is sent: from here on it counts as spent, even if this process dies."""

    @abstractmethod
    def refund(self, key: str, usd: float) -> None:
        """The last attempt was surely not billed."""

    @abstractmethod
    def quarantine(self, key: str, body: bytes, reason: str) -> None:
        """Keep the body for inspection, and never return it as an answer again."""

    @abstractmethod
    def spent(self) -> tuple[int, float]:
        """Calls and USD that were billed or may have been, of all writers known so far."""

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


class SegmentJournal(Journal):
    """Journal on a local (or mounted) disk: checksummed records in append-only files, one file per writer.

    A torn record, at the end or in the middle, is skipped. Memory holds places, not bodies.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._places: dict[str, _Place] = {}
        self._rejected: set[tuple[str, str]] = set()
        self._read_up_to: dict[str, int] = {}
        self._calls, self._micro_usd = 0, 0
        self._segment = os.path.join(folder, f"{uuid.uuid4().hex}.segment")
        self._file: int | None = None
        os.makedirs(folder, exist_ok=True)
        self.refresh()

    def get(self, key: str) -> Record | None:
        with self._lock:
            place = self._places.get(key)
        if place is None or (key, place.digest) in self._rejected:
            return None
        with open(place.path, "rb") as stream:
            stream.seek(place.offset)
            start = stream.read(FRAME.size)
            data = start + stream.read(_frame_length(start) - FRAME.size)
        parsed = _parse(data, 0)
        return _record(*parsed[:2]) if parsed else None

    def put(self, key: str, record: Record) -> None:
        self._append(_answer_head(key, record), record.body, durable=True)

    def attempt(self, key: str, usd: float) -> None:
        self._append({"kind": "attempt", "key": key, "calls": 1, "micro_usd": round(usd * MICRO)})

    def refund(self, key: str, usd: float) -> None:
        self._append({"kind": "refund", "key": key, "calls": -1, "micro_usd": -round(usd * MICRO)})

    def quarantine(self, key: str, body: bytes, reason: str) -> None:
        head = {"kind": "quarantine", "key": key, "digest": _digest(body), "reason": reason}
        self._append(head, body, durable=True)

    def spent(self) -> tuple[int, float]:
        with self._lock:
            return self._calls, self._micro_usd / MICRO

    def refresh(self) -> None:
        with self._lock:
            for name in sorted(os.listdir(self._folder)):
                if name.endswith(".segment"):
                    self._read(os.path.join(self._folder, name))

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def _append(self, head: dict[str, Any], body: bytes = b"", *, durable: bool = False) -> None:
        """One ``write`` per record: a killed process leaves a whole record or a torn last one. ``durable`` also survives a power cut."""
        data = _frame(head, body)
        with self._lock:
            file = self._writable()
            offset = os.lseek(file, 0, os.SEEK_END)
            _write_all(file, data)
            if durable:
                os.fsync(file)
            self._learn(head, self._segment, offset)
            self._read_up_to[self._segment] = offset + len(data)

    def _writable(self) -> int:
        if self._file is None:
            self._file = os.open(self._segment, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
            _sync_folder(self._folder)
        return self._file

    def _read(self, path: str) -> None:
        start = self._read_up_to.get(path, 0)
        if os.path.getsize(path) <= start:
            return
        with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for head, offset, end in _heads(data, start):
                self._learn(head, path, offset)
                self._read_up_to[path] = end

    def _learn(self, head: dict[str, Any], path: str, offset: int) -> None:
        if head["kind"] == "answer":
            place = _Place(path, offset, head["digest"])
            if (head["key"], place.digest) not in self._rejected:
                self._places[head["key"]] = place
        elif head["kind"] == "quarantine":
            self._rejected.add((head["key"], head["digest"]))
        else:
            self._calls += head["calls"]
            self._micro_usd += head["micro_usd"]


class ObjectJournal(Journal):
    """Journal on an object store: one object per answer, and empty objects whose names say what was spent."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._lock = threading.Lock()
        self._answers: dict[str, str] = {}
        self._spendings: set[str] = set()
        self.refresh()

    def get(self, key: str) -> Record | None:
        with self._lock:
            place = self._answers.get(key)
        parsed = _parse(storage.read_bytes(place), 0) if place else None
        return _record(*parsed[:2]) if parsed else None

    def put(self, key: str, record: Record) -> None:
        place = storage.join(self._uri, "answers", f"{key}-{_digest(record.body)}")
        storage.write_bytes(place, _frame(_answer_head(key, record), record.body))
        with self._lock:
            self._answers[key] = place

    def attempt(self, key: str, usd: float) -> None:
        self._spend(key, 1, usd)

    def refund(self, key: str, usd: float) -> None:
        self._spend(key, -1, -usd)

    def quarantine(self, key: str, body: bytes, reason: str) -> None:
        name = f"{key}-{_digest(body)}"
        head = {"kind": "quarantine", "key": key, "digest": _digest(body), "reason": reason}
        storage.write_bytes(storage.join(self._uri, "quarantine", name), _frame(head, body))
        with self._lock:
            if self._answers.get(key, "").endswith(name):
                del self._answers[key]

    def spent(self) -> tuple[int, float]:
        with self._lock:
            parts = [name.split("_") for name in self._spendings]
        return sum(int(p[1]) for p in parts), sum(int(p[2]) for p in parts) / MICRO

    def refresh(self) -> None:
        rejected = {_name(place) for place in storage.list_files(storage.join(self._uri, "quarantine"))}
        answers = [place for place in storage.list_files(storage.join(self._uri, "answers")) if _name(place) not in rejected]
        spendings = {_name(place) for place in storage.list_files(storage.join(self._uri, "spent"))}
        with self._lock:
            self._answers = {_name(place).split("-")[0]: place for place in answers}
            self._spendings |= spendings

    def close(self) -> None:
        pass

    def _spend(self, key: str, calls: int, usd: float) -> None:
        name = f"{key[:16]}{uuid.uuid4().hex}_{calls}_{round(usd * MICRO)}"
        storage.write_bytes(storage.join(self._uri, "spent", name), b"")
        with self._lock:
            self._spendings.add(name)


def _name(place: str) -> str:
    return place.rpartition("/")[2]


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:16]


def _answer_head(key: str, record: Record) -> dict[str, Any]:
    fields = asdict(record)
    del fields["body"]
    fields["time"] = fields["time"] or time.time()
    return {"kind": "answer", "key": key, "digest": _digest(record.body), **fields}


def _frame(head: dict[str, Any], body: bytes) -> bytes:
    name, packed = json.dumps(head, separators=(",", ":")).encode(), zlib.compress(body, 1)
    return FRAME.pack(MAGIC, len(name), len(packed), zlib.crc32(name + packed)) + name + packed


def _frame_length(start: bytes) -> int:
    _, head_length, body_length, _ = FRAME.unpack(start)
    return int(FRAME.size + head_length + body_length)


def _parse(data: bytes | mmap.mmap, offset: int) -> tuple[dict[str, Any], bytes, int] | None:
    """Head, packed body and end of the record at ``offset``; None if there is no whole, undamaged one."""
    if offset + FRAME.size > len(data):
        return None
    magic, head_length, body_length, checksum = FRAME.unpack_from(data, offset)
    start = offset + FRAME.size
    end = start + head_length + body_length
    if magic != MAGIC or end > len(data) or zlib.crc32(data[start:end]) != checksum:
        return None
    return json.loads(data[start : start + head_length]), data[start + head_length : end], end


def _heads(data: mmap.mmap, offset: int) -> Iterator[tuple[dict[str, Any], int, int]]:
    """Head, offset and end of each whole record from ``offset`` on; damaged stretches are skipped."""
    while offset >= 0:
        parsed = _parse(data, offset)
        if parsed is None:
            offset = data.find(MAGIC, offset + 1)
            continue
        yield parsed[0], offset, parsed[2]
        offset = parsed[2]


def _record(head: dict[str, Any], packed: bytes) -> Record:
    fields = {name: head[name] for name in ("content_type", "attempts", "latency_ms", "cost_usd", "time")}
    return Record(zlib.decompress(packed), **fields)


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
