"""Every paid answer, raw, on durable storage before anything looks at it; and every
attempt before it is made.

A run that is killed anywhere finds its answers and what it has spent again. On a local
disk (here) each writer appends to a segment file of its own; elsewhere
(``journal_objects``) each answer is one object. Request images and secrets are never
stored.
"""

from __future__ import annotations

import fcntl
import io
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

from coin_ray.cloud.journal.base import (
    TASK,
    Contents,
    Damage,
    Journal,
    Record,
    answer_key,
)
from coin_ray.cloud.journal.frames import (
    FRAME,
    MAGIC,
    answer_head,
    damages,
    frame_length,
    heads,
    mapped,
    parse,
    record_of,
    replaced_by,
)
from coin_ray.cloud.journal.frames import digest as _digest
from coin_ray.cloud.journal.frames import frame as _frame
from coin_ray.cloud.journal.index import (
    MICRO,
    Answers,
    Ledger,
    calls_and_usd,
    contents_of,
)
from coin_ray.cloud.journal.object_store import ObjectJournal
from coin_ray.errors import InputError

__all__ = [
    "FRAME",
    "MAGIC",
    "TASK",
    "Contents",
    "Damage",
    "Journal",
    "ObjectJournal",
    "Record",
    "SegmentJournal",
    "_digest",
    "_frame",
    "answer_key",
]

SEGMENT = ".segment"
COMPACTED = f"-compacted{SEGMENT}"
READ_AHEAD = 8192
OPEN_FILES = 64


class SegmentJournal(Journal):
    """Journal on a local (or mounted) disk: checksummed records in append-only files,
    one file per writer.

    A torn record, at the end or in the middle, is skipped. Every open journal shares a
    lock on the folder, so that ``compact`` notices that others use it. A compacted
    segment names the ones it replaces; whoever sees it no longer reads those.
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
        self._append(answer_head(key, record), record.body, durable=True)

    def attempt(
        self, key: str, usd: float, account: str = "", moment: float = 0.0
    ) -> None:
        head = {
            "kind": "attempt",
            "key": key,
            "calls": 1,
            "micro_usd": round(usd * MICRO),
        }
        self._append(
            head | {"time": round(moment or time.time(), 3), "account": account}
        )

    def refund(self, key: str, usd: float, account: str = "") -> None:
        self._append(
            {
                "kind": "refund",
                "key": key,
                "calls": -1,
                "micro_usd": -round(usd * MICRO),
                "account": account,
            }
        )

    def quarantine(self, key: str, body: bytes, reason: str) -> None:
        head = {
            "kind": "quarantine",
            "key": key,
            "digest": _digest(body),
            "reason": reason,
        }
        self._append(head, body, durable=True)

    def spent(self, account: str | None = None) -> tuple[int, float]:
        with self._lock:
            return calls_and_usd(self._spent.total(account))

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
            size = sum(
                os.path.getsize(os.path.join(self._folder, name))
                for name in self._segments()
            )
            return contents_of(self._answers, self._spent.total(), size, services)

    def verify(self) -> Iterator[Damage]:
        with self._lock:
            names = [name for name in self._segments() if name not in self._replaced]
        for name in names:
            yield from damages(os.path.join(self._folder, name))

    def compact(self) -> tuple[int, int]:
        """Rewrite the live answers, the quarantine and the sums of what was spent as
        one segment; bytes before and after.

        The new segment appears whole, by one rename, and names those it replaces:
        killed anywhere, nothing is lost or counted twice. Raises InputError if another
        process, or another open journal of this one, uses the folder.
        """
        with self._lock, self._alone():
            self._forget()
            self._refresh()
            old = {
                name: os.path.getsize(os.path.join(self._folder, name))
                for name in self._segments()
            }
            name = self._new_segment(COMPACTED)
            self._write_compacted(name, old)
            for leftover in [
                *old,
                *(n for n in os.listdir(self._folder) if n.endswith(".tmp")),
            ]:
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
        self._answers, self._spent = Answers(), Ledger()
        self._read_up_to: dict[str, int] = {}
        self._replaced: set[str] = set()
        self._counted: set[str] = set()
        self._readers = {}

    def _segments(self) -> list[str]:
        """In the order in which they were begun."""
        return sorted(
            name for name in os.listdir(self._folder) if name.endswith(SEGMENT)
        )

    def _new_segment(self, ending: str = SEGMENT) -> str:
        return f"t{time.time_ns():020d}-{uuid.uuid4().hex[:8]}{ending}"

    def _get(self, key: str) -> Record | None:
        with self._lock:
            place = self._answers.place(key)
            reader = self._reader(place.path) if place is not None else None
        if place is None or reader is None:
            return None
        data = os.pread(reader.fileno(), READ_AHEAD, place.offset)
        missing = frame_length(data) - len(data)
        if missing > 0:
            data += os.pread(reader.fileno(), missing, place.offset + len(data))
        parsed = parse(data, 0)
        return record_of(*parsed[:2]) if parsed else None

    def _reader(self, path: str) -> io.FileIO:
        if path not in self._readers:
            if len(self._readers) >= OPEN_FILES:
                self._readers = {}
            self._readers[path] = io.FileIO(path)
        return self._readers[path]

    def _append(
        self, head: dict[str, Any], body: bytes = b"", *, durable: bool = False
    ) -> None:
        """One ``write`` per record: a killed process leaves a whole record or a torn
        last one. ``durable`` also survives a power cut.
        """
        data = _frame(head, body)
        with self._lock:
            file = self._writable()
            offset = os.lseek(file, 0, os.SEEK_END)
            _write_all(file, data)
            self._learn(head, os.path.join(self._folder, self._segment), offset)
            self._read_up_to[self._segment] = offset + len(data)
            waiting = os.dup(file) if durable else None
        # outside the lock, so that one wait for the disk serves all who wait
        if waiting is not None:
            try:
                os.fsync(waiting)
            finally:
                os.close(waiting)

    def _writable(self) -> int:
        if self._guard is None:
            self._guard = _shared_guard(self._folder)
        if self._file is None:
            self._segment = self._new_segment()
            self._file = os.open(
                os.path.join(self._folder, self._segment),
                os.O_CREAT | os.O_WRONLY | os.O_APPEND,
                0o644,
            )
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
            if (
                name.endswith(COMPACTED)
                and name not in self._read_up_to
                and name not in self._replaced
            ):
                self._replaced.update(replaced_by(os.path.join(self._folder, name)))
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
        with mapped(path) as data:
            for head, offset, end in heads(data, start):
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
        """Head and whole frame of each answer that ``get`` returns, and of each
        quarantined body once.
        """
        seen: set[tuple[str, str]] = set()
        for name in self._segments():
            path = os.path.join(self._folder, name)
            if name in self._replaced or not os.path.getsize(path):
                continue
            with mapped(path) as data:
                for head, offset, end in heads(data, 0):
                    if (
                        head["kind"] == "quarantine"
                        and (head["key"], head["digest"]) not in seen
                    ):
                        seen.add((head["key"], head["digest"]))
                        yield head, data[offset:end]
                    elif head["kind"] == "answer":
                        place = self._answers.place(head["key"])
                        if place is not None and (place.path, place.offset) == (
                            path,
                            offset,
                        ):
                            yield head, data[offset:end]

    def _write_compacted(self, name: str, old: Mapping[str, int]) -> None:
        """The sums stand at both ends of the file, so that one damaged record doesn't
        lose them; they count once.
        """
        sums = _frame(
            {
                "kind": "compacted",
                "id": name,
                "replaces": sorted(old),
                **self._spent.sums(),
            },
            b"",
        )
        path = os.path.join(self._folder, name)
        try:
            with open(f"{path}.tmp", "wb") as stream:
                stream.write(sums)
                for _, data in self._live():
                    stream.write(data)
                stream.write(sums)
                stream.flush()
                os.fsync(stream.fileno())
            if {
                n: os.path.getsize(os.path.join(self._folder, n))
                for n in self._segments()
            } != old:
                raise InputError(
                    f"the journal {self._folder} was written to while it was compacted;"
                    " stop the run and try again"
                )
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
                f"the disk of the journal {self._folder} keeps no locks, so that a"
                " running writer could go unnoticed: not compacted"
            )
        try:
            fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"the journal {self._folder} is in use; stop the run that uses it and"
                " try again"
            ) from None
        else:
            yield
        finally:
            fcntl.flock(self._guard, fcntl.LOCK_SH)


def _shared_guard(folder: str) -> BinaryIO | None:
    """The folder's lock, shared with all who have the journal open; None where the disk
    has no locks or can't be written.
    """
    try:
        guard = open(os.path.join(folder, "lock"), "ab")  # noqa: SIM115
        fcntl.flock(guard, fcntl.LOCK_SH)
    except OSError:
        return None
    return guard


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
