"""Read and write files and tables by URI: a local path, ``s3://``, ``gs://``, ...
(fsspec). Each write replaces the whole file.

Storage that can't be reached is waited for (``wait_for_storage``).
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import IO, Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from coin_ray.errors import StorageUnavailable, describe_variables

T = TypeVar("T")

PATIENCE_SECONDS = 600.0
"""Default of ``storage.patience``."""
START_PATIENCE_SECONDS = 20.0
"""Seconds for which a command waits for storage that it never reached."""
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 15.0
"""Pauses between two tries are doubled from the first to the longest."""
AWAY_ERRNOS = frozenset(
    {
        errno.EIO,
        errno.EREMOTEIO,
        errno.ESTALE,
        errno.EBUSY,
        errno.EAGAIN,
        errno.ENOTCONN,
        errno.ETIMEDOUT,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
    }
)
"""Numbers of an OSError from a server that can't be reached, or is too busy."""
AWAY_TYPES = frozenset(
    {
        "aiohttp.client_exceptions.ClientConnectionError",
        "aiohttp.client_exceptions.ClientPayloadError",
        "botocore.exceptions.ConnectionError",
        "botocore.exceptions.HTTPClientError",
        "botocore.parsers.ResponseParserError",
        "google.auth.exceptions.TransportError",
        "requests.exceptions.ConnectionError",
    }
)
"""Exceptions of optional clients, which are not imported here, for such a server."""
CREDENTIAL_TYPES = frozenset(
    {
        "botocore.exceptions.CredentialRetrievalError",
        "botocore.exceptions.NoCredentialsError",
        "botocore.exceptions.PartialCredentialsError",
        "google.auth.exceptions.DefaultCredentialsError",
        "google.auth.exceptions.RefreshError",
    }
)
"""Exceptions of optional clients that have no credentials to send."""
CREDENTIAL_VARIABLES = {
    "s3": (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_PROFILE",
        "AWS_ENDPOINT_URL",
    ),
    "gs": ("GOOGLE_APPLICATION_CREDENTIALS",),
}
"""Environment variables from which the clients of object stores read credentials."""
AWAY_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
"""HTTP statuses of such a server."""
FIRST_LINE_CHARACTERS = 200
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


_patience = PATIENCE_SECONDS
_patience_here: ContextVar[float | None] = ContextVar("patience", default=None)
"""Overrides ``_patience`` in a block of one thread or task."""
_outages: dict[str, float] = {}
"""Since when (``time.monotonic``) each storage has been away, for one line a time."""
_outages_lock = threading.Lock()


def set_patience(seconds: float) -> None:
    """Set for how long this process waits for storage that can't be reached."""
    global _patience
    _patience = seconds


def current_patience() -> float:
    """Return for how many seconds storage that can't be reached is waited for."""
    override = _patience_here.get()
    return _patience if override is None else override


@contextmanager
def without_waiting() -> Iterator[None]:
    """Raise StorageUnavailable at once while the block runs: it must not wait."""
    token = _patience_here.set(0.0)
    try:
        yield
    finally:
        _patience_here.reset(token)


def wait_for_storage(
    operation: Callable[[], T], uri: str, patience: float | None = None
) -> T:
    """Return what ``operation`` returns; while the storage of ``uri`` can't be reached,
    try again for ``patience`` seconds (None: those of ``set_patience``).

    The operation must be one that can be repeated. The beginning and the end of an
    outage are one line each, whatever the number of threads. Raises StorageUnavailable
    after that time; all other errors at once, refused credentials as PermissionError.
    """
    limit = current_patience() if patience is None else patience
    away_since: float | None = None
    pause = FIRST_PAUSE_SECONDS
    while True:
        try:
            returned = operation()
        except Exception as error:
            if not is_away(error):
                if is_denied(error, uri):
                    raise PermissionError(
                        errno.EACCES, _denied_message(uri, error)
                    ) from error
                raise
            now = time.monotonic()
            if away_since is None:
                away_since = now
            seconds_left = away_since + limit - now
            if seconds_left <= 0:
                raise StorageUnavailable(_unavailable_message(uri, limit, error)) from (
                    error
                )
            _announce_outage(uri, limit, error)
            time.sleep(min(pause, seconds_left))
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            continue
        if away_since is not None:
            _announce_return(uri)
        return returned


def is_away(error: BaseException) -> bool:
    """Tell whether the error means that the storage can't be reached, or is too busy;
    not that a file is absent, that it may not be read, or that a disk is full.
    """
    status = _http_status(error)
    if status is not None:
        return status in AWAY_STATUSES
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    if isinstance(error, OSError) and error.errno in AWAY_ERRNOS:
        return True
    names = {f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__}
    return not AWAY_TYPES.isdisjoint(names)


def is_denied(error: BaseException, uri: str) -> bool:
    """Tell whether an object store refuses the credentials, or there are none."""
    if "://" not in uri:
        return False
    if _http_status(error) in (401, 403) or isinstance(error, PermissionError):
        return True
    names = {f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__}
    return not CREDENTIAL_TYPES.isdisjoint(names)


def _denied_message(uri: str, error: Exception) -> str:
    protocol = uri.partition("://")[0]
    variables = CREDENTIAL_VARIABLES.get(protocol, ())
    source = "Check the credentials of its client and what they may do"
    if variables:
        source = (
            f"Its credentials come from {describe_variables(*variables)}, from the"
            " client's own files, or from the machine's role: check them and what they"
            " may do"
        )
    return (
        f"{_storage_name(uri)} refuses access to {uri}: {_first_line(error)}. {source}"
    )


def _http_status(error: BaseException) -> int | None:
    """Return the HTTP status in the error of an object store's client, or in its cause."""
    for cause in (error, error.__cause__):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            metadata = response.get("ResponseMetadata", {})
            status = metadata.get("HTTPStatusCode")
            if isinstance(status, int):
                return status
        code = getattr(cause, "code", None)  # gcsfs
        if isinstance(code, int) and code >= 400:
            return code
    return None


def _storage_name(uri: str) -> str:
    """Return what the files of one storage share: the bucket, or the disk."""
    protocol, separator, path = uri.partition("://")
    return f"{protocol}://{path.partition('/')[0]}" if separator else "the disk"


def _announce_outage(uri: str, limit: float, error: Exception) -> None:
    name = _storage_name(uri)
    with _outages_lock:
        if name in _outages:
            return
        _outages[name] = time.monotonic()
    print(
        f"storage: {name} can't be reached ({_first_line(error)}); waiting for up to"
        f" {limit:.0f} s",
        file=sys.stderr,
        flush=True,
    )


def _announce_return(uri: str) -> None:
    name = _storage_name(uri)
    with _outages_lock:
        since = _outages.pop(name, None)
    if since is not None:
        seconds = time.monotonic() - since
        print(
            f"storage: {name} answers again after {seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )


def _unavailable_message(uri: str, limit: float, error: Exception) -> str:
    return (
        f"{uri} could not be reached for {limit:.0f} s (storage.patience):"
        f" {_first_line(error)}. Everything stored before is kept; when the storage"
        " answers again, run the same command"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text[:FIRST_LINE_CHARACTERS]


def check_reachable(uri: str) -> None:
    """Raise StorageUnavailable soon if the storage of ``uri`` can't be reached at the
    start of a command: its address may be wrong.
    """
    filesystem, path = _filesystem(uri)
    wait_for_storage(
        lambda: _path_exists(filesystem, path), uri, START_PATIENCE_SECONDS
    )


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


def _path_exists(filesystem: Any, path: str) -> bool:
    """Tell whether there is a file or folder. fsspec's own ``exists`` also returns False
    if the storage can't be reached.
    """
    try:
        filesystem.info(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def exists(uri: str) -> bool:
    """Tell whether there is a file or folder."""
    filesystem, path = _filesystem(uri)
    return wait_for_storage(lambda: _path_exists(filesystem, path), uri)


def version_stamp(uri: str) -> str:
    """Return a text that changes with each write of the file; empty without a file."""
    filesystem, path = _filesystem(uri)

    def read_stamp() -> str:
        if not _path_exists(filesystem, path):
            return ""
        file_info = filesystem.info(path)
        fields = ("size", "mtime", "ETag", "LastModified", "updated", "ino")
        return str([file_info.get(name) for name in fields])

    return wait_for_storage(read_stamp, uri)


def make_folder(uri: str) -> None:
    """Create a folder and its parents; an existing one is no error."""
    filesystem, path = _filesystem(uri)
    wait_for_storage(lambda: filesystem.makedirs(path, exist_ok=True), uri)


def read_bytes(uri: str) -> bytes:
    """Read a whole file."""
    filesystem, path = _filesystem(uri)
    return wait_for_storage(lambda: bytes(filesystem.cat_file(path)), uri)


def write_bytes(uri: str, content: bytes) -> None:
    """Write a file atomically: a reader, or a crash, sees the whole file or none of it;
    on a local disk also after a power cut.
    """
    filesystem, path = _filesystem(uri)

    def write() -> None:
        if _is_local(filesystem):
            with atomic_writer(uri) as stream:
                stream.write(content)
            return
        filesystem.makedirs(filesystem._parent(path), exist_ok=True)
        with filesystem.open(path, "wb") as stream:
            stream.write(content)

    wait_for_storage(write, uri)


@contextmanager
def atomic_writer(uri: str) -> Iterator[IO[bytes]]:
    """Open a stream that replaces the file as a whole when the block ends; if the block
    raises, the old file stays.

    For an object store the stream is a file in the temporary folder (TMPDIR).
    """
    filesystem, path = _filesystem(uri)
    if not _is_local(filesystem):
        with tempfile.NamedTemporaryFile(prefix="coin_ray-") as copy:
            yield copy
            copy.flush()
            wait_for_storage(lambda: _upload(filesystem, copy.name, path), uri)
        return
    filesystem.makedirs(filesystem._parent(path), exist_ok=True)
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


def _upload(filesystem: Any, file: str, path: str) -> None:
    filesystem.makedirs(filesystem._parent(path), exist_ok=True)
    filesystem.put_file(file, path)


@contextmanager
def open_reader(uri: str) -> Iterator[io.BufferedReader]:
    """Open a file for reading in parts; each part is waited for."""
    filesystem, path = _filesystem(uri)
    stream = wait_for_storage(lambda: filesystem.open(path, "rb"), uri)
    try:
        if _is_local(filesystem):
            yield stream
        else:
            yield io.BufferedReader(_PatientReader(stream, uri))
    finally:
        stream.close()


class _PatientReader(io.RawIOBase):
    """Reads a file of an object store; each read is waited for."""

    def __init__(self, stream: IO[bytes], uri: str) -> None:
        self.stream = stream
        self.uri = uri

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self.stream.seek(offset, whence)

    def tell(self) -> int:
        return self.stream.tell()

    def readinto(self, buffer: Any) -> int:
        start = self.stream.tell()

        def read() -> bytes:
            self.stream.seek(start)
            return self.stream.read(len(buffer))

        part = wait_for_storage(read, self.uri)
        buffer[: len(part)] = part
        return len(part)


def _is_local(filesystem: Any) -> bool:
    protocols = filesystem.protocol
    if not isinstance(protocols, tuple):
        protocols = (protocols,)
    return "file" in protocols


def remove(uri: str) -> None:
    """Delete one file; an absent one is no error."""
    filesystem, path = _filesystem(uri)

    def delete() -> None:
        if _path_exists(filesystem, path):
            filesystem.rm_file(path)

    wait_for_storage(delete, uri)


def sha256(uri: str) -> str:
    """Return the SHA-256 of a file in hexadecimal, without reading it into memory."""
    with open_reader(uri) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def list_files(uri: str, suffix: str = "") -> list[str]:
    """List the files below ``uri``, recursively, sorted; an absent folder has none."""
    filesystem, path = _filesystem(uri)
    paths = wait_for_storage(
        lambda: filesystem.find(path) if _path_exists(filesystem, path) else [], uri
    )
    if "://" in uri:
        paths = [filesystem.unstrip_protocol(p) for p in paths]
    return sorted(p for p in paths if p.endswith(suffix))


def list_folders(uri: str) -> list[str]:
    """List the folders directly below ``uri``, sorted; an absent folder has none."""
    filesystem, path = _filesystem(uri)

    def list_entries() -> list[JsonObject]:
        if not _path_exists(filesystem, path):
            return []
        return list(filesystem.ls(path, detail=True))

    entries = wait_for_storage(list_entries, uri)
    paths = [entry["name"] for entry in entries if entry["type"] == "directory"]
    if "://" in uri:
        paths = [filesystem.unstrip_protocol(p) for p in paths]
    return sorted(p.rstrip("/") for p in paths)


def file_sizes(uri: str) -> dict[str, int]:
    """Return the bytes of each file below ``uri``, recursively; an absent folder has
    none.
    """
    filesystem, path = _filesystem(uri)
    files = _find_details(filesystem, path, uri)
    return {name: int(file_info["size"]) for name, file_info in files.items()}


def file_versions(uri: str) -> dict[str, str]:
    """Return, by the URI of each file below ``uri``, a text that changes with its size
    and its time of change; an absent folder has none.
    """
    filesystem, path = _filesystem(uri)
    versions = {}
    for name, file_info in _find_details(filesystem, path, uri).items():
        file_uri = filesystem.unstrip_protocol(name) if "://" in uri else name
        fields = [file_info.get(field) for field in VERSION_FIELDS]
        versions[file_uri] = " ".join(str(value) for value in fields if value)
    return versions


def _find_details(filesystem: Any, path: str, uri: str) -> dict[str, JsonObject]:
    """Return the file system's description of each file below a path, by name."""

    def find() -> dict[str, JsonObject]:
        if not _path_exists(filesystem, path):
            return {}
        return dict(filesystem.find(path, detail=True))

    return wait_for_storage(find, uri)


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
    with open_reader(uri) as stream:
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
    with open_reader(uri) as stream:
        return int(pq.ParquetFile(stream).metadata.num_rows)


def open_table(uri: str, columns: Sequence[str]) -> pa.Table:
    """Open columns of one Parquet file. A large one is not held in memory: it is mapped
    from a copy in the temporary folder (TMPDIR).

    The copy has no name any more when this returns; the disk is free again when the
    table is deleted or the process ends.
    """
    column_names = list(columns)
    filesystem, path = _filesystem(uri)
    size = wait_for_storage(lambda: filesystem.size(path), uri)
    if size <= MAX_BYTES_IN_MEMORY:
        return pq.read_table(pa.BufferReader(read_bytes(uri)), columns=column_names)
    with tempfile.NamedTemporaryFile(prefix="coin_ray-", suffix=".arrow") as copy:
        with open_reader(uri) as stream:
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
