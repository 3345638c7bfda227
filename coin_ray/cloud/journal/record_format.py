"""The binary format of records: a header with lengths and checksum, a JSON head and a
compressed body; in a segment file one record after another.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from coin_ray.cloud.journal.base import AnswerRecord, JournalDamage

MAGIC = b"\x93CRJ"
HEADER = struct.Struct("<4sIII")
"""Magic, length of the JSON head, length of the compressed body, CRC32 of both."""
RECORD_KINDS = ("answer", "quarantine", "attempt", "refund", "drop", "compacted")
KINDS_WITH_BODY = ("answer", "quarantine")
ANSWER_FIELDS = (
    "content_type",
    "attempts",
    "latency_ms",
    "cost_usd",
    "time",
    "service",
    "model",
    "run",
    "version",
)
"""Fields of ``AnswerRecord`` that the JSON head holds."""


HeadFields = dict[str, Any]
"""The JSON head of a record: kind, key, digest and others by kind."""


class ParsedRecord(NamedTuple):
    """One record; ``packed_body``: compressed; ``end``: offset after the record."""

    head: HeadFields
    packed_body: bytes
    end: int


class RecordHead(NamedTuple):
    """The JSON head of a record, with the offsets of its first byte and after its last."""

    head: HeadFields
    offset: int
    end: int


class EncodedRecord(NamedTuple):
    """A record that is to be written, and its JSON head."""

    head: HeadFields
    encoded: bytes


def body_digest(body: bytes) -> str:
    """Return the digest [16 hexadecimal digits] by which a body is known."""
    return hashlib.sha256(body).hexdigest()[:16]


def answer_head(key: str, record: AnswerRecord) -> HeadFields:
    """Return the JSON head of an answer."""
    fields: HeadFields = {}
    for name in ANSWER_FIELDS:
        text_or_number = getattr(record, name)
        if text_or_number != "":
            fields[name] = text_or_number
    fields["time"] = fields["time"] or time.time()
    digest = body_digest(record.body)
    return {"kind": "answer", "key": key, "digest": digest, **fields}


def quarantine_head(key: str, body: bytes, reason: str) -> HeadFields:
    """Return the JSON head of a body that is kept, but no longer an answer."""
    return {
        "kind": "quarantine",
        "key": key,
        "digest": body_digest(body),
        "reason": reason,
    }


def encode_record(head: HeadFields, body: bytes) -> bytes:
    """Return a whole record."""
    packed_head = json.dumps(head, separators=(",", ":")).encode()
    packed_body = zlib.compress(body, 1)
    checksum = zlib.crc32(packed_head + packed_body)
    header = HEADER.pack(MAGIC, len(packed_head), len(packed_body), checksum)
    return header + packed_head + packed_body


def record_length(start: bytes) -> int:
    """Return the length in bytes of the record that begins with ``start``."""
    _, head_length, body_length, _ = HEADER.unpack_from(start)
    return int(HEADER.size + head_length + body_length)


@contextmanager
def memory_mapped(path: str) -> Iterator[mmap.mmap]:
    """Map a file that is not empty into memory."""
    with (
        open(path, "rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        yield mapped


def parse_record(
    segment: bytes | mmap.mmap, offset: int, *, with_body: bool = True
) -> ParsedRecord | None:
    """Return the record at ``offset``, or None if there is no whole, undamaged one.

    Without ``with_body`` the body is empty.
    """
    if offset + HEADER.size > len(segment):
        return None
    magic, head_length, body_length, checksum = HEADER.unpack_from(segment, offset)
    start = offset + HEADER.size
    end = start + head_length + body_length
    if magic != MAGIC or end > len(segment):
        return None
    payload = segment[start:end]
    if zlib.crc32(payload) != checksum:
        return None
    packed_body = payload[head_length:] if with_body else b""
    return ParsedRecord(json.loads(payload[:head_length]), packed_body, end)


def scan_heads(segment: mmap.mmap, offset: int) -> Iterator[RecordHead]:
    """Yield the head of each whole record from ``offset`` on; damaged bytes are skipped."""
    while offset >= 0:
        parsed = parse_record(segment, offset, with_body=False)
        if parsed is None:
            offset = segment.find(MAGIC, offset + 1)
            continue
        yield RecordHead(parsed.head, offset, parsed.end)
        offset = parsed.end


def decode_answer(parsed: ParsedRecord) -> AnswerRecord:
    """Return the answer in a record of kind ``answer``."""
    head = parsed.head
    fields = {name: head[name] for name in ANSWER_FIELDS if name in head}
    return AnswerRecord(zlib.decompress(parsed.packed_body), **fields)


def find_record_fault(head: Mapping[str, Any], packed_body: bytes) -> str:
    """Return why a whole record is wrong all the same; empty if it is right."""
    kind = head.get("kind")
    if kind not in RECORD_KINDS:
        return f"unknown kind of record {str(kind)[:40]!r}"
    if kind not in KINDS_WITH_BODY:
        return ""
    try:
        body = zlib.decompress(packed_body)
    except zlib.error:
        return "the body can't be unpacked"
    if body_digest(body) != head.get("digest"):
        return "the body is not the one that was received"
    return ""


def find_segment_damage(path: str) -> Iterator[JournalDamage]:
    """Yield each part of a segment without a whole record, and each record that is
    whole but wrong.
    """
    if not os.path.getsize(path):
        return
    with memory_mapped(path) as segment:
        expected = 0
        for record in scan_heads(segment, 0):
            if record.offset > expected:
                gap = record.offset - expected
                yield JournalDamage(
                    path, expected, f"{gap} bytes without a whole record"
                )
            expected = record.end
            parsed = parse_record(segment, record.offset)
            fault = find_record_fault(
                record.head, parsed.packed_body if parsed else b""
            )
            if fault:
                yield JournalDamage(path, record.offset, fault)
        if expected < len(segment):
            reason = (
                f"the last {len(segment) - expected} bytes are no whole record: a"
                " writer was killed, or is writing"
            )
            yield JournalDamage(path, expected, reason)


def replaced_segments(path: str) -> list[str]:
    """Return the names of the segments that a compacted segment replaces."""
    if not os.path.getsize(path):
        return []
    with memory_mapped(path) as segment:
        for record in scan_heads(segment, 0):
            if record.head["kind"] == "compacted":
                return list(record.head["replaces"])
    return []
