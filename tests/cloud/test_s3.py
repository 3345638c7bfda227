"""Storage and the journal on s3://, against a server on this machine that
AWS_ENDPOINT_URL names."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator

import pyarrow as pa
import pytest

from coin_ray import storage
from coin_ray.cloud.journal.journal import Journal, ObjectJournal, Record
from coin_ray.commands import labels as tools

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


def written_elsewhere(uri: str, data: bytes) -> None:
    """As another process would: not through this one's file system."""
    s3fs.S3FileSystem(skip_instance_cache=True).pipe_file(uri, data)


def test_files(root: str) -> None:
    place = storage.join(root, "a", "b.json")
    assert not storage.exists(place)
    assert storage.list_files(root) == []
    storage.write_json(place, {"x": [1, 2]})
    assert storage.exists(place)
    assert storage.read_json(place) == {"x": [1, 2]}
    assert storage.list_files(root) == [place]
    storage.write_bytes(place, b"new")
    assert storage.read_bytes(place) == b"new"
    assert list(storage.file_sizes(root).values()) == [3]
    storage.remove(place)
    storage.remove(place)
    assert not storage.exists(place)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(place)


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
    """Also in a folder that was listed before."""
    for number in range(3):
        place = storage.join(root, "parts", f"{number}.json")
        assert len(storage.list_files(root)) == number
        assert not storage.exists(place)
        written_elsewhere(place, b"%d" % number)
        assert storage.exists(place)
        assert storage.read_bytes(place) == b"%d" % number
    written_elsewhere(place, b"changed")
    assert storage.read_bytes(place) == b"changed"


def test_journal(root: str) -> None:
    place = storage.join(root, "journal")
    writers = [Journal.open(place) for _ in range(2)]
    assert isinstance(writers[0], ObjectJournal)
    for i in range(6):
        writers[i % 2].attempt(f"k{i}", 0.01)
        writers[i % 2].put(f"k{i}", Record(b"%d" % i, time=1.0))
    writers[0].refund("k0", 0.01)
    writers[0].put("k0.task", Record(b"lost"))
    writers[1].put("k0.task", Record(b"under way"))
    writers[1].quarantine("k5", b"5", "broken")
    writers[0].refresh()
    for journal in (writers[0], Journal.open(place)):
        assert journal.spent() == pytest.approx((5, 0.05))
        assert sorted(journal.keys()) == ["k0", "k0.task", "k1", "k2", "k3", "k4"]
        assert journal.get("k5") is None
        assert journal.get("k1") == Record(b"1", time=1.0)
        task = journal.get("k0.task")
        assert task is not None
        assert task.body == b"under way"
        assert not list(journal.verify())
        assert journal.contents().size > 0


def test_a_damaged_object_is_found_and_never_an_answer(
    root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = storage.join(root, "journal")
    Journal.open(place).put("a", Record(b"body" * 100))
    (answer,) = storage.list_files(storage.join(place, "answers"))
    data = bytearray(storage.read_bytes(answer))
    data[-1] ^= 1
    written_elsewhere(answer, bytes(data))
    assert Journal.open(place).get("a") is None
    assert tools.main(["journal", "verify", "--root", root]) == 1
    assert f"{answer}: offset 0: " in capsys.readouterr().out
    assert tools.main(["journal", "show", "--root", root]) == 0
    assert tools.main(["journal", "compact", "--root", root]) == 0


WRITER = """
import sys
from coin_ray.cloud.journal.journal import Journal, Record
journal = Journal.open(sys.argv[1])
for i in range(10**6):
    journal.attempt(str(i), 0.01)
    journal.put(str(i), Record(b"%d" % i))
    print(i, flush=True)
"""


def test_kill(root: str) -> None:
    place = storage.join(root, "journal")
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, place], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    seen = [process.stdout.readline() for _ in range(10)]
    os.kill(process.pid, signal.SIGKILL)
    seen += process.stdout.read().splitlines()
    process.stdout.close()
    process.wait()
    last = int(seen[-1])
    journal = Journal.open(place)
    assert all(journal.get(str(i)) is not None for i in range(last + 1))
    assert last + 1 <= journal.spent()[0] <= last + 2
