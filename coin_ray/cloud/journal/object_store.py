"""The journal on an object store."""

from __future__ import annotations

import re
import threading
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Set
from dataclasses import replace

from coin_ray import storage
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
from coin_ray.cloud.journal.record_format import (
    answer_head,
    body_digest,
    decode_answer,
    encode_record,
    find_record_fault,
    parse_record,
    quarantine_head,
)

ANSWER_NAME = re.compile(r"([^-]+)-([0-9a-f]{16})(?:-(\d+)(?:-([0-9a-f]+))?)?")
"""Key, digest of the body, the time of writing and the call that was answered; older
versions left out the time, and no call is named where the answer is a copy."""
SPENDING_NAME = re.compile(
    r"[^_]*_(-?\d+)_(-?\d+)"
    r"(?:_(\d+)_([0-9a-f]*)(?:_([0-9a-f]*)_([0-9A-Za-z-]*)_([0-9a-f]*))?)?"
)
"""Calls, millionths of a USD, the time, the account, the call, its run and the image;
older versions left out what follows the second or the fourth."""


class ObjectJournal(Journal):
    """Journal on an object store: one object per answer, and empty objects whose names
    hold what was spent.
    """

    def __init__(self, uri: str, run: str = "") -> None:
        self.run = run
        self._call_ids = CallIds()
        self._answered_calls: set[str] = set()
        self._uri = uri
        self._lock = threading.Lock()
        self._answers = AnswerIndex()
        self._spending_names: set[str] = set()
        self.refresh()

    def get(self, key: str) -> AnswerRecord | None:
        with self._lock:
            location = self._answers.locate(key)
        if location is None:
            return None
        parsed = parse_record(storage.read_bytes(location.path), 0)
        return decode_answer(parsed) if parsed else None

    def has(self, key: str) -> bool:
        with self._lock:
            return self._answers.locate(key) is not None

    def put(self, key: str, record: AnswerRecord) -> None:
        digest = body_digest(record.body)
        call_id = self._call_ids.end(key)
        name = f"{key}-{digest}-{time.time_ns():020d}"
        if call_id:
            name += f"-{call_id}"
        uri = storage.join(self._uri, "answers", name)
        head = answer_head(key, replace(record, run=record.run or self.run))
        storage.write_bytes(uri, encode_record(head, record.body))
        with self._lock:
            self._answers.add(key, digest, uri)
            self._answered_calls.add(call_id)

    def attempt(
        self,
        key: str,
        usd: float,
        account: str = "",
        moment: float = 0.0,
        image_id: str = "",
    ) -> None:
        call = f"{self._call_ids.begin(key)}_{self.run}_{image_id[:IMAGE_ID_DIGITS]}"
        self._write_spending(key, 1, usd, account, moment, call)

    def refund(self, key: str, usd: float, account: str = "") -> None:
        call = f"{self._call_ids.end(key)}_{self.run}_"
        self._write_spending(key, -1, -usd, account, 0.0, call)

    def quarantine(self, key: str, body: bytes, reason: str) -> None:
        digest = body_digest(body)
        uri = storage.join(self._uri, "quarantine", f"{key}-{digest}")
        storage.write_bytes(
            uri, encode_record(quarantine_head(key, body, reason), body)
        )
        with self._lock:
            self._answers.quarantined.add((key, digest))

    def drop(self, key: str) -> None:
        """Move the key's answers to ``dropped``, where nothing reads them."""
        self.drop_all([key])

    def drop_all(self, keys: Collection[str]) -> None:
        """Move the answers of several keys; the objects are listed once."""
        dropped_keys = set(keys)
        if not dropped_keys:
            return
        objects = self._list_answers("answers") + self._list_answers("quarantine")
        for name, uri in objects:
            if name[1] in dropped_keys:
                dropped = storage.join(self._uri, "dropped", _object_name(uri))
                storage.write_bytes(dropped, storage.read_bytes(uri))
                storage.remove(uri)
        with self._lock:
            for key in dropped_keys:
                self._answers.drop(key)

    def spent(self, account: str | None = None) -> tuple[int, float]:
        with self._lock:
            return calls_and_usd(self._read_ledger().total(account))

    def account(self, run: str | None = None) -> CallAccount:
        with self._lock:
            return self._read_ledger().account(run)

    def call_starts(self, account: str, since: float) -> list[float]:
        with self._lock:
            return self._read_ledger().call_starts(account, since)

    def keys(self) -> list[str]:
        with self._lock:
            return self._answers.keys()

    def contents(self) -> JournalContents:
        """Return counts without services and models: those are inside the objects."""
        with self._lock:
            size = sum(storage.file_sizes(self._uri).values())
            return count_contents(self._answers, self._read_ledger(), size, {})

    def verify(self) -> Iterator[JournalDamage]:
        for folder in ("answers", "quarantine"):
            for uri in storage.list_files(storage.join(self._uri, folder)):
                fault = _find_object_fault(uri, folder)
                if fault:
                    yield JournalDamage(uri, 0, fault)
        for uri in storage.list_files(storage.join(self._uri, "spent")):
            if not SPENDING_NAME.fullmatch(_object_name(uri)):
                reason = "the name does not hold calls and USD"
                yield JournalDamage(uri, 0, reason)

    def refresh(self) -> None:
        quarantined = {
            (name[1], name[2]) for name, _ in self._list_answers("quarantine")
        }
        answers = self._list_answers("answers")
        dropped = self._list_answers("dropped")
        answers.sort(key=lambda answer: answer[0][3] or "")
        spendings = storage.list_files(storage.join(self._uri, "spent"))
        with self._lock:
            self._answers = AnswerIndex()
            self._answers.quarantined = quarantined
            for name, uri in answers:
                self._answers.add(name[1], name[2], uri)
            self._answered_calls.update(
                name[4] for name, _ in [*answers, *dropped] if name[4]
            )
            self._spending_names.update(_object_name(uri) for uri in spendings)

    def close(self) -> None:
        pass

    def _list_answers(self, folder: str) -> list[tuple[re.Match[str], str]]:
        """Return the parsed name and the URI of each object of a folder. ``verify``
        reports those with other names.
        """
        objects = []
        for uri in storage.list_files(storage.join(self._uri, folder)):
            name = ANSWER_NAME.fullmatch(_object_name(uri))
            if name is not None:
                objects.append((name, uri))
        return objects

    def _read_ledger(self) -> Ledger:
        return _add_up(self._spending_names, self._answered_calls)

    def _write_spending(
        self, key: str, calls: int, usd: float, account: str, moment: float, call: str
    ) -> None:
        unique = f"{key[:16]}{uuid.uuid4().hex}"
        seconds = int(moment or time.time())
        name = f"{unique}_{calls}_{round(usd * MICRO_USD)}_{seconds}_{account}_{call}"
        storage.write_bytes(storage.join(self._uri, "spent", name), b"")
        with self._lock:
            self._spending_names.add(name)


def _add_up(names: Iterable[str], answered_calls: Set[str]) -> Ledger:
    """Add up what the names of spending objects hold; ``answered_calls``: those with an
    answer on record.
    """
    ledger = Ledger()
    refunded_calls = []
    for name in names:
        match = SPENDING_NAME.fullmatch(name)
        if match is None:
            continue
        calls = int(match[1])
        head = {
            "kind": "attempt" if calls > 0 else "refund",
            "calls": calls,
            "micro_usd": int(match[2]),
        }
        if match[3]:
            head |= {"time": int(match[3]), "account": match[4]}
        if match[5]:
            head |= {"call": match[5], "image": match[7]}
        head["run"] = match[6] or ""
        ledger.add_record(head)
        if calls < 0:
            refunded_calls.append(match[5] or "")
    for call_id in [*refunded_calls, *answered_calls]:
        ledger.mark_answered(call_id)
    return ledger


def _object_name(uri: str) -> str:
    return uri.rpartition("/")[2]


def _find_object_fault(uri: str, folder: str) -> str:
    """Return why the object does not hold what its name says; empty if it does."""
    stored = storage.read_bytes(uri)
    parsed = parse_record(stored, 0)
    if parsed is None or parsed.end != len(stored):
        return "no whole record, or its checksum is wrong"
    name = ANSWER_NAME.fullmatch(_object_name(uri))
    key_and_digest = (parsed.head.get("key"), parsed.head.get("digest"))
    if name is None or key_and_digest != name.groups()[:2]:
        return f"the record belongs to another name in {folder}"
    return find_record_fault(parsed.head, parsed.packed_body)
