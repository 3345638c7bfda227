"""Storage that goes away for a while: waited for, with one line, and nothing is lost."""

from __future__ import annotations

import errno
import io
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from coin_ray import storage
from coin_ray.commands.exit_codes import run_command
from coin_ray.data.formats.parsing import HEAD_BYTES, image_size, read_head
from coin_ray.data.truth import read_orientation
from coin_ray.errors import StorageUnavailable

ORIENTATION_TAG = 0x0112


class Outage:
    """Makes the file system ``flaky://`` fail while ``errors`` lasts."""

    def __init__(self) -> None:
        self.errors: list[Exception] = []
        """Raised one after the other by the next operations."""
        self.until = 0.0
        """``time.monotonic`` before which every operation fails."""
        self.calls = 0
        self._lock = threading.Lock()

    def check(self) -> None:
        with self._lock:
            self.calls += 1
            if time.monotonic() < self.until:
                raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")
            if self.errors:
                raise self.errors.pop(0)


outage = Outage()


class FlakyFileSystem(MemoryFileSystem):
    """Files in memory that can't be reached during the outage."""

    protocol = "flaky"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs: list[str] = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def unstrip_protocol(self, name: str) -> str:
        return f"flaky://{name}"


def _failing(name: str) -> Callable[..., Any]:
    method = getattr(MemoryFileSystem, name)

    def call(self: FlakyFileSystem, *arguments: Any, **options: Any) -> Any:
        outage.check()
        return method(self, *arguments, **options)

    return call


for _name in ("info", "ls", "_open", "cat_file", "rm_file", "makedirs", "pipe_file"):
    setattr(FlakyFileSystem, _name, _failing(_name))
fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(storage, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(storage, "LONGEST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(storage, "_patience", 5.0)
    yield
    outage.until = 0.0
    outage.errors.clear()


@pytest.fixture
def root() -> str:
    return f"flaky://bucket/{uuid.uuid4().hex}"


TABLE = pa.table({"n": range(20)})
OPERATIONS: dict[str, Callable[[str], Any]] = {
    "write": lambda root: storage.write_bytes(f"{root}/new", b"x"),
    "read": lambda root: storage.read_bytes(f"{root}/a"),
    "exists": lambda root: storage.exists(f"{root}/a"),
    "list": lambda root: len(storage.list_files(root)),
    "folders": lambda root: len(storage.list_folders(root)),
    "sizes": lambda root: len(storage.file_sizes(root)),
    "versions": lambda root: len(storage.file_versions(root)),
    "stamp": lambda root: bool(storage.version_stamp(f"{root}/a")),
    "sha256": lambda root: storage.sha256(f"{root}/a"),
    "remove": lambda root: storage.remove(f"{root}/a"),
    "table": lambda root: storage.read_table(f"{root}/t.parquet").num_rows,
    "stream": lambda root: [
        block.num_rows for block in storage.stream_table(f"{root}/t.parquet")
    ],
    "rows": lambda root: storage.row_count(f"{root}/t.parquet"),
    "open": lambda root: storage.open_table(f"{root}/t.parquet", ["n"]).num_rows,
    "write table": lambda root: storage.write_table(f"{root}/u.parquet", TABLE),
}


def _fill(root: str) -> None:
    storage.write_bytes(f"{root}/a", b"content")
    storage.write_table(f"{root}/t.parquet", TABLE)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_repeated_until_the_storage_is_back(
    name: str, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _fill(root)
    expected = OPERATIONS[name](root)
    _fill(root)
    calls_before = outage.calls
    outage.until = time.monotonic() + 0.1
    assert OPERATIONS[name](root) == expected
    assert outage.calls > calls_before + 2
    first, last = capsys.readouterr().err.splitlines()
    assert first == (
        "storage: flaky://bucket can't be reached (ConnectionRefusedError: [Errno 111]"
        " refused); waiting for up to 5 s"
    )
    assert "flaky://bucket answers again after 0 s" in last


def test_headers_of_images_are_waited_for(root: str) -> None:
    """They were read as (0, 0) and upright during an outage."""
    uri = f"{root}/image.jpg"
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = 6
    stream = io.BytesIO()
    Image.new("RGB", (40, 30)).save(stream, "JPEG", exif=exif)
    storage.write_bytes(uri, stream.getvalue())
    for read, expected in (
        (image_size, (30, 40)),
        (read_orientation, 6),
        (read_head, stream.getvalue()[:HEAD_BYTES]),
    ):
        outage.until = time.monotonic() + 0.1
        assert read(uri) == expected


def test_an_outage_in_the_middle_of_a_table_loses_no_row(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "BLOCK_ROWS", 4)
    storage.write_table(f"{root}/t.parquet", TABLE)
    rows: list[int] = []
    for block in storage.stream_table(f"{root}/t.parquet"):
        rows += block["n"].to_pylist()
        outage.errors = [TimeoutError("slow")] * 2
    assert rows == list(range(20))


def test_many_threads_say_one_line(
    root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _fill(root)
    outage.until = time.monotonic() + 0.2
    with ThreadPoolExecutor(8) as pool:
        contents = list(pool.map(storage.read_bytes, [f"{root}/a"] * 16))
    assert contents == [b"content"] * 16
    assert capsys.readouterr().err.count("can't be reached") == 1


def test_after_its_patience_a_command_ends_with_one_line_and_exit_code_3(
    root: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_patience", 0.05)
    outage.until = time.monotonic() + 60
    with pytest.raises(StorageUnavailable, match=r"storage\.patience"):
        storage.read_bytes(f"{root}/a")
    capsys.readouterr()
    monkeypatch.setattr(storage, "_outages", {"flaky://bucket": 0.0})
    assert run_command(lambda: storage.write_bytes(f"{root}/a", b"")) == 3
    output = capsys.readouterr()
    (line,) = output.err.strip().splitlines()
    assert line.startswith(f"StorageUnavailable: {root}/a could not be reached for 0 s")
    assert "run the same command" in line


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "absent"),
        PermissionError(errno.EACCES, "denied"),
        OSError(errno.ENOSPC, "full"),
        OSError(errno.EROFS, "read-only"),
        OSError(errno.EINVAL, "wrong"),
        ValueError("damaged"),
    ],
)
def test_other_errors_are_raised_at_once(error: Exception, root: str) -> None:
    outage.errors = [error]
    with pytest.raises(type(error)):
        storage.read_bytes(f"{root}/a")


class _ClientError(Exception):
    """Has the shape of botocore's error of an HTTP status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}


@pytest.mark.parametrize(
    ("status", "away"),
    [(503, True), (500, True), (429, True), (403, False), (404, False), (507, False)],
)
def test_statuses_of_an_object_store(status: int, away: bool) -> None:
    translated = OSError(errno.EIO, "as s3fs says it")
    translated.__cause__ = _ClientError(status)
    assert storage.is_away(translated) == away
    assert storage.is_away(_ClientError(status)) == away


@pytest.mark.parametrize("status", [401, 403])
def test_refused_credentials_name_their_variables(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIA-a-key-id")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)

    def refuse() -> None:
        raise PermissionError("Forbidden") from _ClientError(status)

    with pytest.raises(PermissionError) as refusal:
        storage.wait_for_storage(refuse, "s3://bucket/root")
    message = str(refusal.value)
    assert message.startswith(
        "[Errno 13] s3://bucket refuses access to s3://bucket/root: PermissionError:"
        " Forbidden. Its credentials come from AWS_ACCESS_KEY_ID (set),"
        " AWS_SECRET_ACCESS_KEY (not set)"
    )
    assert "AKIA" not in message
    assert run_command(lambda: storage.wait_for_storage(refuse, "gs://b/x")) == 2
    with pytest.raises(PermissionError, match=r"^Forbidden$"):
        storage.wait_for_storage(refuse, "/disk/file")


def test_credentials_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    exceptions = pytest.importorskip("botocore.exceptions")

    def refuse() -> None:
        raise exceptions.NoCredentialsError

    with pytest.raises(PermissionError, match=r"Unable to locate credentials\. Its"):
        storage.wait_for_storage(refuse, "s3://bucket/root")


def test_errors_of_optional_clients_are_known() -> None:
    exceptions = pytest.importorskip("botocore.exceptions")
    for error in (
        exceptions.EndpointConnectionError(endpoint_url="http://s3"),
        exceptions.ConnectTimeoutError(endpoint_url="http://s3"),
        exceptions.ReadTimeoutError(endpoint_url="http://s3"),
        exceptions.ConnectionClosedError(endpoint_url="http://s3"),
    ):
        assert storage.is_away(error), error
    assert not storage.is_away(exceptions.NoCredentialsError())
    aiohttp = pytest.importorskip("aiohttp")
    assert storage.is_away(aiohttp.ServerDisconnectedError())


def test_a_local_write_is_repeated_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "file")
    storage.write_bytes(uri, b"old")
    replace, failures = os.replace, [OSError(errno.EIO, "gone"), OSError(5, "gone")]

    def replace_later(source: str, target: str) -> None:
        if failures:
            raise failures.pop()
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_later)
    storage.write_bytes(uri, b"new")
    assert storage.read_bytes(uri) == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_storage_that_was_never_reached_is_not_waited_for_long(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "START_PATIENCE_SECONDS", 0.05)
    outage.until = time.monotonic() + 60
    with pytest.raises(StorageUnavailable):
        storage.check_reachable(root)
