"""The journal on a disk: every paid answer, raw, durable before anything reads it; and
every attempt before it is made.

A run that is killed anywhere finds its answers and what it has spent again. Each writer
appends to a segment file of its own. Request images and secrets are never stored.
"""

from __future__ import annotations

import fcntl
import io
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import BinaryIO

from coin_ray.cloud.journal.base import (
    IMAGE_ID_DIGITS,
    AnswerRecord,
    CallAccount,
    Journal,
    JournalContents,
    JournalDamage,
)
from coin_ray.cloud.journal.index import (
    MICRO_USD,
    AnswerIndex,
    CallIds,
    Ledger,
    calls_and_usd,
    count_contents,
)
from coin_ray.cloud.journal.keys import TASK
from coin_ray.cloud.journal.record_format import (
    EncodedRecord,
    HeadFields,
    RecordHead,
    answer_head,
    decode_answer,
    encode_record,
    find_segment_damage,
    memory_mapped,
    parse_record,
    quarantine_head,
    record_length,
    replaced_segments,
    scan_heads,
)
from coin_ray.errors import InputError
from coin_ray.storage import wait_for_storage

SEGMENT = ".segment"
COMPACTED = f"-compacted{SEGMENT}"
READ_AHEAD = 8192
"""Bytes read at once: most records are shorter."""
OPEN_FILES_MAX = 64


class SegmentJournal(Journal):
    """Journal on a local (or mounted) disk: checksummed records in append-only files,
    one file per writer.

    A torn record, at the end or in the middle, is skipped. Every open journal shares a
    lock on the folder, so that ``compact`` notices that others use it. A compacted
    segment names the ones it replaces; readers that see it no longer read those.
    """

    notes_are_fast = True

    def __init__(self, folder: str, run: str = "") -> None:
        self.run = run
        self._call_ids = CallIds()
        self._folder = folder
        self._lock = threading.Lock()
        self._file: int | None = None
        self._readers: dict[str, io.FileIO] = {}
        self._segment = ""
        os.makedirs(folder, exist_ok=True)
        self._folder_lock = _shared_lock(folder)
        self._clear_index()
        self.refresh()

    def get(self, key: str) -> AnswerRecord | None:
        try:
            return wait_for_storage(lambda: self._get(key), self._folder)
        except FileNotFoundError:  # compacted meanwhile, on a disk without locks
            self.refresh()
            return self._get(key)

    def has(self, key: str) -> bool:
        with self._lock:
            return self._answers.locate(key) is not None

    def put(self, key: str, record: AnswerRecord) -> None:
        self.put_all([(key, record)])

    def put_all(self, answers: Sequence[tuple[str, AnswerRecord]]) -> None:
        records = []
        for key, record in answers:
            head = answer_head(key, record)
            head |= _without_empty(
                run=record.run or self.run, call=self._call_ids.end(key)
            )
            records.append(EncodedRecord(head, encode_record(head, record.body)))
        self._append_all(records, durable=True)

    def attempt(
        self,
        key: str,
        usd: float,
        account: str = "",
        moment: float = 0.0,
        image_id: str = "",
    ) -> None:
        self._append(
            {
                "kind": "attempt",
                "key": key,
                "calls": 1,
                "micro_usd": round(usd * MICRO_USD),
                "time": round(moment or time.time(), 3),
                "account": account,
                "call": self._call_ids.begin(key),
                **_without_empty(run=self.run, image=image_id[:IMAGE_ID_DIGITS]),
            }
        )

    def refund(self, key: str, usd: float, account: str = "") -> None:
        self._append(
            {
                "kind": "refund",
                "key": key,
                "calls": -1,
                "micro_usd": -round(usd * MICRO_USD),
                "account": account,
                **_without_empty(call=self._call_ids.end(key), run=self.run),
            }
        )

    def quarantine(self, key: str, body: bytes, reason: str) -> None:
        self._append(quarantine_head(key, body, reason), body, durable=True)

    def drop(self, key: str) -> None:
        """Note the drop after all answers so far; ``compact`` removes their bytes."""
        self._append({"kind": "drop", "key": key, "time": time.time()}, durable=True)

    def has_other_users(self) -> bool:
        with self._lock:
            if self._folder_lock is None:
                return False
            try:
                fcntl.flock(self._folder_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return True
            fcntl.flock(self._folder_lock, fcntl.LOCK_SH)
            return False

    def spent(self, account: str | None = None) -> tuple[int, float]:
        with self._lock:
            return calls_and_usd(self._ledger.total(account))

    def account(self, run: str | None = None) -> CallAccount:
        with self._lock:
            return self._ledger.account(run)

    def call_starts(self, account: str, since: float) -> list[float]:
        with self._lock:
            return self._ledger.call_starts(account, since)

    def latest_version(self, service: str, model: str) -> str:
        with self._lock:
            return self._answers.latest_version(service, model)

    def keys(self) -> list[str]:
        with self._lock:
            return self._answers.keys()

    def contents(self) -> JournalContents:
        with self._lock:
            services: Counter[tuple[str, str]] = Counter()
            for head, _ in self._current_records():
                if head["kind"] == "answer" and not head["key"].endswith(TASK):
                    services[head.get("service", ""), head.get("model", "")] += 1
            size = sum(self._segment_sizes().values())
            return count_contents(self._answers, self._ledger, size, services)

    def verify(self) -> Iterator[JournalDamage]:
        with self._lock:
            names = [name for name in self._segments() if name not in self._replaced]
        for name in names:
            yield from find_segment_damage(self._path(name))

    def compact(self) -> tuple[int, int]:
        """Rewrite the current answers, the quarantine and the sums of what was spent as
        one segment; return the bytes before and after.

        The new segment appears whole, by one rename, and names those it replaces:
        killed anywhere, nothing is lost or counted twice. Raises InputError if another
        process, or another open journal of this one, uses the folder.
        """
        with self._lock, self._exclusive_lock():
            self._clear_index()
            self._refresh()
            old_sizes = self._segment_sizes()
            name = _new_segment_name(COMPACTED)
            self._write_compacted(name, old_sizes)
            temporary = [n for n in os.listdir(self._folder) if n.endswith(".tmp")]
            for obsolete in [*old_sizes, *temporary]:
                os.remove(self._path(obsolete))
            _sync_folder(self._folder)
            self._clear_index()
            self._refresh()
            return sum(old_sizes.values()), os.path.getsize(self._path(name))

    def refresh(self) -> None:
        with self._lock:
            self._refresh()

    def close(self) -> None:
        with self._lock:
            self._close_segment()
            self._readers = {}
            if self._folder_lock is not None:
                self._folder_lock.close()
                self._folder_lock = None

    def _clear_index(self) -> None:
        self._answers = AnswerIndex()
        self._ledger = Ledger()
        self._read_up_to: dict[str, int] = {}
        self._replaced: set[str] = set()
        self._counted_sums: set[str] = set()
        self._readers = {}

    def _path(self, name: str) -> str:
        return os.path.join(self._folder, name)

    def _segments(self) -> list[str]:
        """Return the segments' names in the order in which they were begun."""
        names = os.listdir(self._folder)
        return sorted(name for name in names if name.endswith(SEGMENT))

    def _segment_sizes(self) -> dict[str, int]:
        return {name: os.path.getsize(self._path(name)) for name in self._segments()}

    def _get(self, key: str) -> AnswerRecord | None:
        with self._lock:
            location = self._answers.locate(key)
            if location is None:
                return None
            reader = self._open_reader(location.path)
        encoded = os.pread(reader.fileno(), READ_AHEAD, location.offset)
        missing = record_length(encoded) - len(encoded)
        if missing > 0:
            encoded += os.pread(
                reader.fileno(), missing, location.offset + len(encoded)
            )
        parsed = parse_record(encoded, 0)
        return decode_answer(parsed) if parsed else None

    def _open_reader(self, path: str) -> io.FileIO:
        if path not in self._readers:
            if len(self._readers) >= OPEN_FILES_MAX:
                self._readers = {}
            self._readers[path] = io.FileIO(path)
        return self._readers[path]

    def _append(
        self, head: HeadFields, body: bytes = b"", *, durable: bool = False
    ) -> None:
        record = EncodedRecord(head, encode_record(head, body))
        self._append_all([record], durable=durable)

    def _append_all(self, records: Sequence[EncodedRecord], *, durable: bool) -> None:
        """Append records with one ``write``: a killed process leaves whole records or
        a torn last one. ``durable`` records also survive a power cut.
        """

        def append() -> None:
            try:
                self._write_records(records, durable=durable)
            except OSError:
                with self._lock:
                    self._readers = {}
                    self._close_segment()
                raise

        wait_for_storage(append, self._folder)

    def _write_records(
        self, records: Sequence[EncodedRecord], *, durable: bool
    ) -> None:
        with self._lock:
            file = self._open_segment()
            offset = os.lseek(file, 0, os.SEEK_END)
            _write_all(file, b"".join(record.encoded for record in records))
            for record in records:
                self._index_record(record.head, self._path(self._segment), offset)
                offset += len(record.encoded)
            self._read_up_to[self._segment] = offset
            unsynced = os.dup(file) if durable else None
        # outside the lock, so that one wait for the disk serves all writers
        if unsynced is not None:
            try:
                os.fsync(unsynced)
            finally:
                os.close(unsynced)

    def _open_segment(self) -> int:
        """Return the file to append to, a new segment if none is open."""
        if self._folder_lock is None:
            self._folder_lock = _shared_lock(self._folder)
        if self._file is None:
            self._segment = _new_segment_name(SEGMENT)
            flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND
            self._file = os.open(self._path(self._segment), flags, 0o644)
            _sync_folder(self._folder)
        return self._file

    def _close_segment(self) -> None:
        """Close the segment; the next record begins another, since this one may be
        compacted meanwhile.
        """
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def _refresh(self) -> None:
        names = self._segments()
        for name in names:
            is_new = name not in self._read_up_to and name not in self._replaced
            if is_new and name.endswith(COMPACTED):
                self._replaced.update(replaced_segments(self._path(name)))
        if self._replaced & self._read_up_to.keys():
            self._clear_index()
            self._refresh()
            return
        for name in names:
            if name not in self._replaced:
                self._read_segment(name)

    def _read_segment(self, name: str) -> None:
        """Index the records of a segment that were not read yet."""
        path = self._path(name)
        start = self._read_up_to.get(name, 0)
        if os.path.getsize(path) <= start:
            return
        with memory_mapped(path) as segment:
            for record in scan_heads(segment, start):
                self._index_record(record.head, path, record.offset)
                self._read_up_to[name] = record.end

    def _index_record(self, head: HeadFields, path: str, offset: int) -> None:
        kind = head["kind"]
        if kind == "answer":
            self._answers.add(head["key"], head["digest"], path, offset)
            self._answers.note_version(head)
            self._ledger.mark_answered(head.get("call", ""))
        elif kind == "quarantine":
            self._answers.quarantined.add((head["key"], head["digest"]))
        elif kind == "drop":
            self._answers.drop(head["key"])
        elif kind in ("attempt", "refund"):
            self._ledger.add_record(head)
        elif kind == "compacted" and head["id"] not in self._counted_sums:
            self._counted_sums.add(head["id"])
            self._ledger.add_compacted(head)

    def _current_records(self) -> Iterator[tuple[HeadFields, bytes]]:
        """Yield head and bytes of each answer that ``get`` returns, and of each
        quarantined body once.
        """
        yielded: set[tuple[str, str]] = set()
        for name in self._segments():
            path = self._path(name)
            if name in self._replaced or not os.path.getsize(path):
                continue
            with memory_mapped(path) as segment:
                for record in scan_heads(segment, 0):
                    if self._is_current(record, path, yielded):
                        yield record.head, segment[record.offset : record.end]

    def _is_current(
        self, record: RecordHead, path: str, yielded: set[tuple[str, str]]
    ) -> bool:
        """Return whether a record is the answer that ``get`` returns, or a quarantined
        body that is not in ``yielded``, to which it is then added.
        """
        head = record.head
        if head["kind"] == "answer":
            location = self._answers.locate(head["key"])
            if location is None:
                return False
            return (location.path, location.offset) == (path, record.offset)
        if head["kind"] != "quarantine":
            return False
        body = (head["key"], head["digest"])
        if body in yielded or body not in self._answers.quarantined:
            return False
        yielded.add(body)
        return True

    def _write_compacted(self, name: str, old_sizes: Mapping[str, int]) -> None:
        """Write the compacted segment. The sums are at both ends of the file, so that
        one damaged record does not lose them; they count once.
        """
        head = {"kind": "compacted", "id": name, "replaces": sorted(old_sizes)}
        sums = encode_record(head | self._ledger.sums(), b"")
        path = self._path(name)
        temporary = f"{path}.tmp"
        try:
            with open(temporary, "wb") as stream:
                stream.write(sums)
                for _, encoded in self._current_records():
                    stream.write(encoded)
                stream.write(sums)
                stream.flush()
                os.fsync(stream.fileno())
            if self._segment_sizes() != old_sizes:
                raise InputError(
                    f"the journal {self._folder} was written to while it was compacted;"
                    " stop the run and try again"
                )
            os.replace(temporary, path)
        finally:
            if os.path.exists(temporary):
                os.remove(temporary)
        _sync_folder(self._folder)

    @contextmanager
    def _exclusive_lock(self) -> Iterator[None]:
        self._close_segment()
        if self._folder_lock is None:
            self._folder_lock = _shared_lock(self._folder)
        if self._folder_lock is None:
            raise InputError(
                f"the journal {self._folder} is not compacted: its disk keeps no locks,"
                " so that a running writer could go unnoticed"
            )
        try:
            fcntl.flock(self._folder_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"the journal {self._folder} is in use; stop the run that uses it and"
                " try again"
            ) from None
        else:
            yield
        finally:
            fcntl.flock(self._folder_lock, fcntl.LOCK_SH)


def _without_empty(**fields: str) -> HeadFields:
    """Return the fields of a record's head that are not empty."""
    return {name: text for name, text in fields.items() if text}


def _new_segment_name(suffix: str) -> str:
    return f"t{time.time_ns():020d}-{uuid.uuid4().hex[:8]}{suffix}"


def _shared_lock(folder: str) -> BinaryIO | None:
    """Return the folder's lock file, locked together with all who have the journal
    open; None where the disk has no locks or can't be written.
    """
    try:
        lock_file = open(os.path.join(folder, "lock"), "ab")  # noqa: SIM115
        fcntl.flock(lock_file, fcntl.LOCK_SH)
    except OSError:
        return None
    return lock_file


def _write_all(file: int, encoded: bytes) -> None:
    unwritten = memoryview(encoded)
    while unwritten:
        unwritten = unwritten[os.write(file, unwritten) :]


def _sync_folder(folder: str) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
