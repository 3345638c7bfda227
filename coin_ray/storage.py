"""Every path is a URI: a local path, ``s3://``, ``gs://``, ... (fsspec). The last write is the commit."""

from __future__ import annotations

import json
import os
import uuid
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs


def absolute(uri: str) -> str:
    """The URI with local paths made absolute; a Ray job runs in a temporary copy of the working directory."""
    return uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *parts])


def exists(uri: str) -> bool:
    filesystem, path = url_to_fs(uri)
    return bool(filesystem.exists(path))


def make_folder(uri: str) -> None:
    filesystem, path = url_to_fs(uri)
    filesystem.makedirs(path, exist_ok=True)


def read_bytes(uri: str) -> bytes:
    with fsspec.open(uri, "rb") as stream:
        return bytes(stream.read())


def write_bytes(uri: str, data: bytes) -> None:
    """Write so that a reader, or a crash, sees the whole file or none of it; on a local disk also after a power cut."""
    filesystem, path = url_to_fs(uri)
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
    filesystem, path = url_to_fs(uri)
    if filesystem.exists(path):
        filesystem.rm_file(path)


def list_files(uri: str, suffix: str = "") -> list[str]:
    """Files below ``uri``, recursively, sorted; an absent folder has none."""
    filesystem, path = url_to_fs(uri)
    if not filesystem.exists(path):
        return []
    found = (filesystem.unstrip_protocol(p) if "://" in uri else p for p in filesystem.find(path))
    return sorted(p for p in found if p.endswith(suffix))


def read_json(uri: str) -> Any:
    return json.loads(read_bytes(uri))


def write_json(uri: str, value: Any) -> None:
    write_bytes(uri, json.dumps(value, indent=2, sort_keys=True).encode())


def read_table(uri: str) -> pa.Table:
    """One Parquet file, or all parts of a folder in the order of their names."""
    parts = [uri] if uri.endswith(".parquet") else list_files(uri, ".parquet")
    if not parts:
        raise FileNotFoundError(f"no Parquet parts below {uri}")
    return pa.concat_tables([pq.read_table(pa.BufferReader(read_bytes(p))) for p in parts])


def write_table(uri: str, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_bytes(uri, sink.getvalue().to_pybytes())
