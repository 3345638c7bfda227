"""Storage and the journal on s3://, against a local server that AWS_ENDPOINT_URL names."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator

import pyarrow as pa
import pytest

from coin_ray import storage
from coin_ray.cloud.journal.base import AnswerRecord
from coin_ray.cloud.journal.object_store import ObjectJournal
from coin_ray.cloud.journal.opening import open_journal
from coin_ray.commands.main import main

from .conftest import check_killed_journal_writer

s3fs = pytest.importorskip("s3fs", reason="s3:// needs the extra s3")
moto_server = pytest.importorskip(
    "moto.server",
    reason="the S3 server of these tests is moto[server], of the extra test",
)

BUCKET = "coin-runs"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto_server.ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in (
            "AWS_PROFILE",
            "AWS_SESSION_TOKEN",
            "AWS_CONFIG_FILE",
            "AWS_SHARED_CREDENTIALS_FILE",
            "HTTP_PROXY",
            "http_proxy",
        ):
            patch.delenv(name, raising=False)
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "id")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir(BUCKET)
        yield f"http://{host}:{port}"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture
def root(endpoint: str) -> str:
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


def _write_as_another_process(uri: str, content: bytes) -> None:
    """Write an object without this process's file system, which caches listings."""
    s3fs.S3FileSystem(skip_instance_cache=True).pipe_file(uri, content)


def test_files(root: str) -> None:
    uri = storage.join(root, "a", "b.json")
    assert not storage.exists(uri)
    assert storage.list_files(root) == []
    storage.write_json(uri, {"x": [1, 2]})
    assert storage.exists(uri)
    assert storage.read_json(uri) == {"x": [1, 2]}
    assert storage.list_files(root) == [uri]
    storage.write_bytes(uri, b"new")
    assert storage.read_bytes(uri) == b"new"
    assert list(storage.file_sizes(root).values()) == [3]
    storage.remove(uri)
    storage.remove(uri)
    assert not storage.exists(uri)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(uri)


def test_tables_in_parts(root: str) -> None:
    storage.write_table(storage.join(root, "part-1.parquet"), pa.table({"n": [1]}))
    storage.write_table(
        storage.join(root, "part-0.parquet"), pa.table({"n": [0], "later": ["x"]})
    )
    assert storage.read_table(root).to_pylist() == [
        {"n": 0, "later": "x"},
        {"n": 1, "later": None},
    ]


def test_what_another_process_writes_is_seen(root: str) -> None:
    """Check this also in a folder that was listed before."""
    for number in range(3):
        uri = storage.join(root, "parts", f"{number}.json")
        assert len(storage.list_files(root)) == number
        assert not storage.exists(uri)
        _write_as_another_process(uri, b"%d" % number)
        assert storage.exists(uri)
        assert storage.read_bytes(uri) == b"%d" % number
    _write_as_another_process(uri, b"changed")
    assert storage.read_bytes(uri) == b"changed"


def test_journal(root: str) -> None:
    journal_uri = storage.join(root, "journal")
    writers = [open_journal(journal_uri) for _ in range(2)]
    assert isinstance(writers[0], ObjectJournal)
    for i in range(6):
        writers[i % 2].attempt(f"k{i}", 0.01)
        writers[i % 2].put(f"k{i}", AnswerRecord(b"%d" % i, time=1.0))
    writers[0].refund("k0", 0.01)
    writers[0].put("k0.task", AnswerRecord(b"lost"))
    writers[1].put("k0.task", AnswerRecord(b"under way"))
    writers[1].quarantine("k5", b"5", "broken")
    writers[0].refresh()
    for journal in (writers[0], open_journal(journal_uri)):
        assert journal.spent() == pytest.approx((5, 0.05))
        assert sorted(journal.keys()) == ["k0", "k0.task", "k1", "k2", "k3", "k4"]
        assert journal.get("k5") is None
        assert journal.get("k1") == AnswerRecord(b"1", time=1.0)
        task = journal.get("k0.task")
        assert task is not None
        assert task.body == b"under way"
        assert not list(journal.verify())
        assert journal.contents().size > 0


def test_a_damaged_object_is_found_and_never_an_answer(
    root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    journal_uri = storage.join(root, "journal")
    open_journal(journal_uri).put("a", AnswerRecord(b"body" * 100))
    (object_uri,) = storage.list_files(storage.join(journal_uri, "answers"))
    content = bytearray(storage.read_bytes(object_uri))
    content[-1] ^= 1
    _write_as_another_process(object_uri, bytes(content))
    assert open_journal(journal_uri).get("a") is None
    assert main(["journal", "verify", "--root", root]) == 1
    assert f"{object_uri}: offset 0: " in capsys.readouterr().out
    assert main(["journal", "show", "--root", root]) == 0
    assert main(["journal", "compact", "--root", root]) == 0


def test_kill(root: str) -> None:
    check_killed_journal_writer(storage.join(root, "journal"), 10)
