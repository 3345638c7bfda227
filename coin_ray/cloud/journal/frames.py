"""Records as bytes: a JSON head and a compressed body behind a header with their
lengths and checksum, one after another in a segment.
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
from dataclasses import asdict
from typing import Any

from coin_ray.cloud.journal.base import Damage, Record

MAGIC = b"\x93CRJ"
FRAME = struct.Struct("<4sIII")
"""Magic, length of the JSON head, length of the compressed body, CRC32 of both."""


def digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:16]


def answer_head(key: str, record: Record) -> dict[str, Any]:
    fields = {
        name: value
        for name, value in asdict(record).items()
        if name != "body" and value != ""
    }
    fields["time"] = fields["time"] or time.time()
    return {"kind": "answer", "key": key, "digest": digest(record.body), **fields}


def frame(head: dict[str, Any], body: bytes) -> bytes:
    name, packed = (
        json.dumps(head, separators=(",", ":")).encode(),
        zlib.compress(body, 1),
    )
    return (
        FRAME.pack(MAGIC, len(name), len(packed), zlib.crc32(name + packed))
        + name
        + packed
    )


def frame_length(start: bytes) -> int:
    _, head_length, body_length, _ = FRAME.unpack_from(start)
    return int(FRAME.size + head_length + body_length)


@contextmanager
def mapped(path: str) -> Iterator[mmap.mmap]:
    with (
        open(path, "rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        yield data


def parse(
    data: bytes | mmap.mmap, offset: int, *, body: bool = True
) -> tuple[dict[str, Any], bytes, int] | None:
    """Head, packed body (if wanted) and end of the record at ``offset``; None if there
    is no whole, undamaged one.
    """
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


def heads(data: mmap.mmap, offset: int) -> Iterator[tuple[dict[str, Any], int, int]]:
    """Head, offset and end of each whole record from ``offset`` on; damaged stretches
    are skipped.
    """
    while offset >= 0:
        parsed = parse(data, offset, body=False)
        if parsed is None:
            offset = data.find(MAGIC, offset + 1)
            continue
        yield parsed[0], offset, parsed[2]
        offset = parsed[2]


def record_of(head: dict[str, Any], packed: bytes) -> Record:
    names = (
        "content_type",
        "attempts",
        "latency_ms",
        "cost_usd",
        "time",
        "service",
        "model",
    )
    return Record(
        zlib.decompress(packed), **{name: head[name] for name in names if name in head}
    )


def record_damage(head: Mapping[str, Any], packed: bytes) -> str:
    kind = head.get("kind")
    if kind not in ("answer", "quarantine", "attempt", "refund", "compacted"):
        return f"unknown kind of record {str(kind)[:40]!r}"
    if kind not in ("answer", "quarantine"):
        return ""
    try:
        body = zlib.decompress(packed)
    except zlib.error:
        return "the body can't be unpacked"
    return (
        ""
        if digest(body) == head.get("digest")
        else "the body is not the one that was received"
    )


def damages(path: str) -> Iterator[Damage]:
    """Each stretch of a segment without a whole record, and each record that is whole
    but wrong.
    """
    if not os.path.getsize(path):
        return
    with mapped(path) as data:
        expected = 0
        for head, offset, end in heads(data, 0):
            if offset > expected:
                yield Damage(
                    path, expected, f"{offset - expected} bytes without a whole record"
                )
            expected = end
            reason = record_damage(head, parse(data, offset, body=True)[1])  # type: ignore[index]
            if reason:
                yield Damage(path, offset, reason)
        if expected < len(data):
            yield Damage(
                path,
                expected,
                f"the last {len(data) - expected} bytes are no whole record: a writer"
                " was killed, or is writing",
            )


def replaced_by(path: str) -> list[str]:
    if not os.path.getsize(path):
        return []
    with mapped(path) as data:
        return next(
            (
                head["replaces"]
                for head, _, _ in heads(data, 0)
                if head["kind"] == "compacted"
            ),
            [],
        )
