"""Every path is a URI: a local path, ``s3://``, ``gs://``, ... (fsspec). The last write is the commit."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

IN_MEMORY = 1 << 26
"""Bytes of a Parquet file from which ``open_table`` leaves its rows on the disk."""
GROUP = 1 << 14
"""Rows that are read from Parquet at once."""


def absolute(uri: str) -> str:
    """The URI with local paths, also those behind ``file://``, made absolute; a Ray job runs in a temporary copy of the working directory."""
    path = uri.removeprefix("file://")
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *parts])


def _filesystem(uri: str) -> tuple[Any, str]:
    """Without a cache of listings: other processes write too. ``s3://`` follows AWS_ENDPOINT_URL and AWS's other variables."""
    filesystem, path = url_to_fs(uri, use_listings_cache=False)
    return filesystem, path


def exists(uri: str) -> bool:
    filesystem, path = _filesystem(uri)
    return bool(filesystem.exists(path))


def stamp(uri: str) -> str:
    """Another one after each write of the file; empty while there is none."""
    filesystem, path = _filesystem(uri)
    if not filesystem.exists(path):
        return ""
    found = filesystem.info(path)
    return str([found.get(name) for name in ("size", "mtime", "ETag", "LastModified", "updated", "ino")])


def make_folder(uri: str) -> None:
    filesystem, path = _filesystem(uri)
    filesystem.makedirs(path, exist_ok=True)


def read_bytes(uri: str) -> bytes:
    filesystem, path = _filesystem(uri)
    return bytes(filesystem.cat_file(path))


def write_bytes(uri: str, data: bytes) -> None:
    """Write so that a reader, or a crash, sees the whole file or none of it; on a local disk also after a power cut."""
    filesystem, path = _filesystem(uri)
    parent = filesystem._parent(path)
    filesystem.makedirs(parent, exist_ok=True)
    if "file" not in (filesystem.protocol if isinstance(filesystem.protocol, tuple) else (filesystem.protocol,)):
        with filesystem.open(path, "wb") as stream:
            stream.write(data)
        return
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def remove(uri: str) -> None:
    """Delete one file; an absent one is no error."""
    filesystem, path = _filesystem(uri)
    if filesystem.exists(path):
        filesystem.rm_file(path)


def digest(uri: str) -> str:
    """SHA-256 of a file, which is never in memory as a whole; hexadecimal."""
    filesystem, path = _filesystem(uri)
    with filesystem.open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def list_files(uri: str, suffix: str = "") -> list[str]:
    """Files below ``uri``, recursively, sorted; an absent folder has none."""
    filesystem, path = _filesystem(uri)
    if not filesystem.exists(path):
        return []
    found = (filesystem.unstrip_protocol(p) if "://" in uri else p for p in filesystem.find(path))
    return sorted(p for p in found if p.endswith(suffix))


def file_sizes(uri: str) -> dict[str, int]:
    """Bytes of each file below ``uri``, recursively; an absent folder has none."""
    filesystem, path = _filesystem(uri)
    if not filesystem.exists(path):
        return {}
    return {name: int(info["size"]) for name, info in filesystem.find(path, detail=True).items()}


def read_json(uri: str) -> Any:
    return json.loads(read_bytes(uri))


def write_json(uri: str, value: Any) -> None:
    write_bytes(uri, json.dumps(value, indent=2, sort_keys=True).encode())


def read_table(uri: str) -> pa.Table:
    """One Parquet file, or all parts of a folder in the order of their names; a column that a part lacks is null there."""
    parts = [uri] if uri.endswith(".parquet") else list_files(uri, ".parquet")
    if not parts:
        raise FileNotFoundError(f"no Parquet parts below {uri}")
    return pa.concat_tables([pq.read_table(pa.BufferReader(read_bytes(p))) for p in parts], promote_options="default")


def open_table(uri: str, columns: Sequence[str]) -> pa.Table:
    """Columns of one Parquet file. A large one is not held in memory: it is mapped from a copy in the temporary folder (TMPDIR).

    The copy has no name any more when this returns; the disk is free again when the table is gone or the process ends.
    """
    filesystem, path = _filesystem(uri)
    if filesystem.size(path) <= IN_MEMORY:
        return pq.read_table(pa.BufferReader(read_bytes(uri)), columns=list(columns))
    with filesystem.open(path, "rb") as stream, tempfile.NamedTemporaryFile(prefix="coin_ray-", suffix=".arrow") as copy:
        source = pq.ParquetFile(stream)
        with pa.ipc.new_file(copy, pa.schema([source.schema_arrow.field(name) for name in columns])) as writer:
            for batch in source.iter_batches(GROUP, columns=list(columns)):
                writer.write_batch(batch.select(list(columns)))
        copy.flush()
        return pa.ipc.open_file(pa.memory_map(copy.name)).read_all()


def write_table(uri: str, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=GROUP)
    write_bytes(uri, sink.getvalue().to_pybytes())
