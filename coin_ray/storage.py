"""Read and write files and tables by URI: a local path, ``s3://``, ``gs://``, ...
(fsspec). Each write replaces the whole file.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

MAX_BYTES_IN_MEMORY = 1 << 26
"""Size of a Parquet file above which ``open_table`` leaves its rows on the disk."""
ROW_GROUP = 1 << 14
"""Rows of a group in a Parquet file; fewer if they take more than
``MAX_BYTES_IN_MEMORY`` bytes."""
BLOCK_ROWS = 1 << 10
"""Rows of a table that are Python objects at the same time."""
VERSION_FIELDS = ("size", "mtime", "LastModified", "updated", "created_at", "ETag")
"""What file systems call the size, the time of change and the version of a file."""
READ_THREADS = 16
"""Files of a folder that are read at once: on an object store reading is mostly
waiting."""

JsonObject = dict[str, Any]
"""A parsed JSON object, whose members have not been checked."""


def absolute_uri(uri: str) -> str:
    """Make local paths absolute, with or without ``file://``: a Ray job runs in a
    temporary copy of the working directory.
    """
    path = uri.removeprefix("file://")
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def join(uri: str, *parts: str) -> str:
    """Return the URI of a path below ``uri``."""
    return "/".join([uri.rstrip("/"), *parts])


def _filesystem(uri: str) -> tuple[Any, str]:
    """Return the file system of a URI and the path in it. Listings are not cached:
    other processes write too. ``s3://`` follows AWS_ENDPOINT_URL and AWS's other
    variables.
    """
    filesystem, path = url_to_fs(uri, use_listings_cache=False)
    return filesystem, path


def exists(uri: str) -> bool:
    """Tell whether there is a file or folder."""
    filesystem, path = _filesystem(uri)
    return bool(filesystem.exists(path))


def version_stamp(uri: str) -> str:
    """Return a text that changes with each write of the file; empty without a file."""
    filesystem, path = _filesystem(uri)
    if not filesystem.exists(path):
        return ""
    file_info = filesystem.info(path)
    fields = ("size", "mtime", "ETag", "LastModified", "updated", "ino")
    return str([file_info.get(name) for name in fields])


def make_folder(uri: str) -> None:
    """Create a folder and its parents; an existing one is no error."""
    filesystem, path = _filesystem(uri)
    filesystem.makedirs(path, exist_ok=True)


def read_bytes(uri: str) -> bytes:
    """Read a whole file."""
    filesystem, path = _filesystem(uri)
    return bytes(filesystem.cat_file(path))


def write_bytes(uri: str, content: bytes) -> None:
    """Write a file atomically: a reader, or a crash, sees the whole file or none of it;
    on a local disk also after a power cut.
    """
    filesystem, path = _filesystem(uri)
    if _is_local(filesystem):
        with atomic_writer(uri) as stream:
            stream.write(content)
        return
    filesystem.makedirs(filesystem._parent(path), exist_ok=True)
    with filesystem.open(path, "wb") as stream:
        stream.write(content)


@contextmanager
def atomic_writer(uri: str) -> Iterator[IO[bytes]]:
    """Open a stream that replaces the file as a whole when the block ends; if the block
    raises, the old file stays.

    For an object store the stream is a file in the temporary folder (TMPDIR).
    """
    filesystem, path = _filesystem(uri)
    filesystem.makedirs(filesystem._parent(path), exist_ok=True)
    if not _is_local(filesystem):
        with tempfile.NamedTemporaryFile(prefix="coin_ray-") as copy:
            yield copy
            copy.flush()
            filesystem.put_file(copy.name, path)
        return
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(temporary, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def _is_local(filesystem: Any) -> bool:
    protocols = filesystem.protocol
    if not isinstance(protocols, tuple):
        protocols = (protocols,)
    return "file" in protocols


def remove(uri: str) -> None:
    """Delete one file; an absent one is no error."""
    filesystem, path = _filesystem(uri)
    if filesystem.exists(path):
        filesystem.rm_file(path)


def sha256(uri: str) -> str:
    """Return the SHA-256 of a file in hexadecimal, without reading it into memory."""
    filesystem, path = _filesystem(uri)
    with filesystem.open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def list_files(uri: str, suffix: str = "") -> list[str]:
    """List the files below ``uri``, recursively, sorted; an absent folder has none."""
    filesystem, path = _filesystem(uri)
    if not filesystem.exists(path):
        return []
    paths = filesystem.find(path)
    if "://" in uri:
        paths = [filesystem.unstrip_protocol(p) for p in paths]
    return sorted(p for p in paths if p.endswith(suffix))


def list_folders(uri: str) -> list[str]:
    """List the folders directly below ``uri``, sorted; an absent folder has none."""
    filesystem, path = _filesystem(uri)
    if not filesystem.exists(path):
        return []
    entries = filesystem.ls(path, detail=True)
    paths = [entry["name"] for entry in entries if entry["type"] == "directory"]
    if "://" in uri:
        paths = [filesystem.unstrip_protocol(p) for p in paths]
    return sorted(p.rstrip("/") for p in paths)


def file_sizes(uri: str) -> dict[str, int]:
    """Return the bytes of each file below ``uri``, recursively; an absent folder has
    none.
    """
    filesystem, path = _filesystem(uri)
    if not filesystem.exists(path):
        return {}
    files = filesystem.find(path, detail=True)
    return {name: int(file_info["size"]) for name, file_info in files.items()}


def file_versions(uri: str) -> dict[str, str]:
    """Return, by the URI of each file below ``uri``, a text that changes with its size
    and its time of change; an absent folder has none.
    """
    filesystem, path = _filesystem(uri)
    if not filesystem.exists(path):
        return {}
    versions = {}
    for name, file_info in filesystem.find(path, detail=True).items():
        file_uri = filesystem.unstrip_protocol(name) if "://" in uri else name
        fields = [file_info.get(field) for field in VERSION_FIELDS]
        versions[file_uri] = " ".join(str(value) for value in fields if value)
    return versions


def read_json(uri: str) -> Any:
    """Read a JSON file."""
    return json.loads(read_bytes(uri))


def write_json(uri: str, content: Any) -> None:
    """Write a JSON file with sorted keys."""
    write_bytes(uri, json.dumps(content, indent=2, sort_keys=True).encode())


def read_table(uri: str) -> pa.Table:
    """Read one Parquet file, or all parts of a folder in the order of their names; a
    column that a part lacks is null there.
    """
    parts = [uri] if uri.endswith(".parquet") else list_files(uri, ".parquet")
    if not parts:
        raise FileNotFoundError(f"no Parquet parts below {uri}")
    return pa.concat_tables(read_tables(parts), promote_options="default")


def read_tables(
    uris: Iterable[str], columns: Sequence[str] | None = None
) -> list[pa.Table]:
    """Read Parquet files in the order of ``uris``, several at a time; ``columns`` that
    a file lacks are left out.
    """
    column_names = None if columns is None else list(columns)

    def read(uri: str) -> pa.Table:
        buffer = pa.BufferReader(read_bytes(uri))
        return pq.read_table(buffer, columns=column_names, use_threads=False)

    with ThreadPoolExecutor(READ_THREADS) as pool:
        return list(pool.map(read, uris))


def stream_table(uri: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Yield one Parquet file in blocks of ``BLOCK_ROWS`` rows; only one block is in
    memory.
    """
    column_names = None if columns is None else list(columns)
    filesystem, path = _filesystem(uri)
    with filesystem.open(path, "rb") as stream:
        file = pq.ParquetFile(stream)
        # one iterator over several row groups would keep all of them in memory
        for group in range(file.num_row_groups):
            batches = file.iter_batches(
                BLOCK_ROWS, row_groups=[group], columns=column_names
            )
            for batch in batches:
                yield pa.Table.from_batches([batch])


def row_count(uri: str) -> int:
    """Return the number of rows of one Parquet file, from its footer."""
    filesystem, path = _filesystem(uri)
    with filesystem.open(path, "rb") as stream:
        return int(pq.ParquetFile(stream).metadata.num_rows)


def open_table(uri: str, columns: Sequence[str]) -> pa.Table:
    """Open columns of one Parquet file. A large one is not held in memory: it is mapped
    from a copy in the temporary folder (TMPDIR).

    The copy has no name any more when this returns; the disk is free again when the
    table is deleted or the process ends.
    """
    column_names = list(columns)
    filesystem, path = _filesystem(uri)
    if filesystem.size(path) <= MAX_BYTES_IN_MEMORY:
        return pq.read_table(pa.BufferReader(read_bytes(uri)), columns=column_names)
    with tempfile.NamedTemporaryFile(prefix="coin_ray-", suffix=".arrow") as copy:
        with filesystem.open(path, "rb") as stream:
            file_schema = pq.ParquetFile(stream).schema_arrow
        schema = pa.schema([file_schema.field(name) for name in column_names])
        with pa.ipc.new_file(copy, schema) as writer:
            for block in stream_table(uri, column_names):
                writer.write_table(block.select(column_names))
        copy.flush()
        return pa.ipc.open_file(pa.memory_map(copy.name)).read_all()


def write_table(uri: str, table: pa.Table) -> None:
    """Write one Parquet file."""
    with table_writer(uri, table.schema) as writer:
        for start in range(0, table.num_rows, ROW_GROUP):
            writer.write(table.slice(start, ROW_GROUP))


class TableWriter:
    """Writes rows to a Parquet file as they come; the rows of one group are in memory."""

    def __init__(self, file: pq.ParquetWriter) -> None:
        self.file = file
        self.pending, self.rows, self.bytes = [file.schema.empty_table()], 0, 0

    def write(self, table: pa.Table) -> None:
        """Append rows with the columns of the schema."""
        self.pending.append(table)
        self.rows += table.num_rows
        self.bytes += table.nbytes
        if self.rows >= ROW_GROUP or self.bytes >= MAX_BYTES_IN_MEMORY:
            whole_groups = self.rows // ROW_GROUP * ROW_GROUP
            self.flush(whole_groups or self.rows)

    def flush(self, rows: int) -> None:
        """Write this many of the pending rows."""
        pending = pa.concat_tables(self.pending)
        group = pending.slice(0, rows).combine_chunks()
        self.file.write_table(group, row_group_size=ROW_GROUP)
        remainder = pending.slice(rows)
        self.pending = [remainder]
        self.rows, self.bytes = remainder.num_rows, remainder.nbytes


@contextmanager
def table_writer(uri: str, schema: pa.Schema) -> Iterator[TableWriter]:
    """Open a writer of one Parquet file, which exists once the block has ended."""
    with atomic_writer(uri) as stream, pq.ParquetWriter(stream, schema) as file:
        writer = TableWriter(file)
        yield writer
        writer.flush(writer.rows)
