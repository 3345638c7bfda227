"""Every path is a URI: a local path, ``s3://``, ``gs://``, ... (fsspec). The last write
is the commit.
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
"""Bytes of a Parquet file from which ``open_table`` leaves its rows on the disk."""
ROW_GROUP = 1 << 14
"""Rows of a group in a Parquet file, unless they are more than ``MAX_BYTES_IN_MEMORY`` bytes."""
BLOCK_ROWS = 1 << 10
"""Rows of a table that are worked on at once, where each becomes Python objects."""
READ_THREADS = 16
"""Files of a folder that are read at once: on an object store reading is mostly
waiting."""


def absolute_uri(uri: str) -> str:
    """The URI with local paths, also those behind ``file://``, made absolute; a Ray job
    runs in a temporary copy of the working directory.
    """
    path = uri.removeprefix("file://")
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *parts])


def _filesystem(uri: str) -> tuple[Any, str]:
    """Without a cache of listings: other processes write too. ``s3://`` follows
    AWS_ENDPOINT_URL and AWS's other variables.
    """
    filesystem, path = url_to_fs(uri, use_listings_cache=False)
    return filesystem, path


def exists(uri: str) -> bool:
    filesystem, path = _filesystem(uri)
    return bool(filesystem.exists(path))


def version_stamp(uri: str) -> str:
    """Another one after each write of the file; empty while there is none."""
    filesystem, path = _filesystem(uri)
    if not filesystem.exists(path):
        return ""
    found = filesystem.info(path)
    return str(
        [
            found.get(name)
            for name in ("size", "mtime", "ETag", "LastModified", "updated", "ino")
        ]
    )


def make_folder(uri: str) -> None:
    filesystem, path = _filesystem(uri)
    filesystem.makedirs(path, exist_ok=True)


def read_bytes(uri: str) -> bytes:
    filesystem, path = _filesystem(uri)
    return bytes(filesystem.cat_file(path))


def write_bytes(uri: str, data: bytes) -> None:
    """Write so that a reader, or a crash, sees the whole file or none of it; on a local
    disk also after a power cut.
    """
    filesystem, path = _filesystem(uri)
    if _is_local(filesystem):
        with atomic_writer(uri) as stream:
            stream.write(data)
        return
    filesystem.makedirs(filesystem._parent(path), exist_ok=True)
    with filesystem.open(path, "wb") as stream:
        stream.write(data)


@contextmanager
def atomic_writer(uri: str) -> Iterator[IO[bytes]]:
    """A stream that becomes the file when the block ends, as a whole; if the block
    raises, what was there before stays.

    For an object store it is a file in the temporary folder (TMPDIR) until then.
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
    return "file" in (
        filesystem.protocol
        if isinstance(filesystem.protocol, tuple)
        else (filesystem.protocol,)
    )


def remove(uri: str) -> None:
    """Delete one file; an absent one is no error."""
    filesystem, path = _filesystem(uri)
    if filesystem.exists(path):
        filesystem.rm_file(path)


def sha256(uri: str) -> str:
    """SHA-256 of a file, which is never in memory as a whole; hexadecimal."""
    filesystem, path = _filesystem(uri)
    with filesystem.open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def list_files(uri: str, suffix: str = "") -> list[str]:
    """Files below ``uri``, recursively, sorted; an absent folder has none."""
    filesystem, path = _filesystem(uri)
    if not filesystem.exists(path):
        return []
    found = (
        filesystem.unstrip_protocol(p) if "://" in uri else p
        for p in filesystem.find(path)
    )
    return sorted(p for p in found if p.endswith(suffix))


def file_sizes(uri: str) -> dict[str, int]:
    """Bytes of each file below ``uri``, recursively; an absent folder has none."""
    filesystem, path = _filesystem(uri)
    if not filesystem.exists(path):
        return {}
    return {
        name: int(info["size"])
        for name, info in filesystem.find(path, detail=True).items()
    }


def read_json(uri: str) -> Any:
    return json.loads(read_bytes(uri))


def write_json(uri: str, value: Any) -> None:
    write_bytes(uri, json.dumps(value, indent=2, sort_keys=True).encode())


def read_table(uri: str) -> pa.Table:
    """One Parquet file, or all parts of a folder in the order of their names; a column
    that a part lacks is null there.
    """
    parts = [uri] if uri.endswith(".parquet") else list_files(uri, ".parquet")
    if not parts:
        raise FileNotFoundError(f"no Parquet parts below {uri}")
    return pa.concat_tables(read_tables(parts), promote_options="default")


def read_tables(
    uris: Iterable[str], columns: Sequence[str] | None = None
) -> list[pa.Table]:
    """Parquet files in the order of ``uris``, several at a time; of ``columns`` those
    that a file has.
    """

    def read(uri: str) -> pa.Table:
        return pq.read_table(
            pa.BufferReader(read_bytes(uri)),
            columns=None if columns is None else list(columns),
            use_threads=False,
        )

    with ThreadPoolExecutor(READ_THREADS) as pool:
        return list(pool.map(read, uris))


def stream_table(uri: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """One Parquet file in blocks of ``BLOCK_ROWS`` rows; its other rows are not in memory."""
    filesystem, path = _filesystem(uri)
    with filesystem.open(path, "rb") as stream:
        file = pq.ParquetFile(stream)
        # a reader of several keeps what it has read of all of them
        for group in range(file.num_row_groups):
            for batch in file.iter_batches(
                BLOCK_ROWS,
                row_groups=[group],
                columns=None if columns is None else list(columns),
            ):
                yield pa.Table.from_batches([batch])


def row_count(uri: str) -> int:
    """Rows of one Parquet file, by its footer."""
    filesystem, path = _filesystem(uri)
    with filesystem.open(path, "rb") as stream:
        return int(pq.ParquetFile(stream).metadata.num_rows)


def open_table(uri: str, columns: Sequence[str]) -> pa.Table:
    """Columns of one Parquet file. A large one is not held in memory: it is mapped from
    a copy in the temporary folder (TMPDIR).

    The copy has no name any more when this returns; the disk is free again when the
    table is gone or the process ends.
    """
    filesystem, path = _filesystem(uri)
    if filesystem.size(path) <= MAX_BYTES_IN_MEMORY:
        return pq.read_table(pa.BufferReader(read_bytes(uri)), columns=list(columns))
    with tempfile.NamedTemporaryFile(prefix="coin_ray-", suffix=".arrow") as copy:
        with filesystem.open(path, "rb") as stream:
            schema = pq.ParquetFile(stream).schema_arrow
        with pa.ipc.new_file(
            copy, pa.schema([schema.field(name) for name in columns])
        ) as writer:
            for block in stream_table(uri, columns):
                writer.write_table(block.select(list(columns)))
        copy.flush()
        return pa.ipc.open_file(pa.memory_map(copy.name)).read_all()


def write_table(uri: str, table: pa.Table) -> None:
    with table_writer(uri, table.schema) as writer:
        for start in range(0, table.num_rows, ROW_GROUP):
            writer.write(table.slice(start, ROW_GROUP))


class TableWriter:
    """Writes rows to a Parquet file as they come; what it holds are the rows of one
    group.
    """

    def __init__(self, file: pq.ParquetWriter) -> None:
        self.file = file
        self.held, self.rows, self.bytes = [file.schema.empty_table()], 0, 0

    def write(self, table: pa.Table) -> None:
        """Rows to follow those before; columns as in the schema."""
        self.held.append(table)
        self.rows, self.bytes = self.rows + table.num_rows, self.bytes + table.nbytes
        if self.rows >= ROW_GROUP or self.bytes >= MAX_BYTES_IN_MEMORY:
            self.flush(self.rows // ROW_GROUP * ROW_GROUP or self.rows)

    def flush(self, rows: int) -> None:
        """Write so many of the rows that are held."""
        held = pa.concat_tables(self.held)
        self.file.write_table(
            held.slice(0, rows).combine_chunks(), row_group_size=ROW_GROUP
        )
        rest = held.slice(rows)
        self.held, self.rows, self.bytes = [rest], rest.num_rows, rest.nbytes


@contextmanager
def table_writer(uri: str, schema: pa.Schema) -> Iterator[TableWriter]:
    """A writer of one Parquet file, which is there once the block has ended."""
    with atomic_writer(uri) as stream, pq.ParquetWriter(stream, schema) as file:
        writer = TableWriter(file)
        yield writer
        writer.flush(writer.rows)
