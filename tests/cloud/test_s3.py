"""Storage and the journal on s3://, against a local server that AWS_ENDPOINT_URL names."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pyarrow as pa
import pytest
from s3_server import S3Server, s3fs, start_s3_server

from coin_ray import storage
from coin_ray.cloud import question_client
from coin_ray.cloud.client import CloudClient
from coin_ray.cloud.journal.base import AnswerRecord
from coin_ray.cloud.journal.object_store import ObjectJournal
from coin_ray.cloud.journal.opening import open_journal
from coin_ray.commands.main import main
from coin_ray.config import Cloud, PipelineConfig
from coin_ray.config.presets import folder
from tests.cloud_actors import ACTORS, ask_cloud_actors

from .conftest import (
    CLASSES,
    URL,
    check_killed_journal_writer,
    detection_json,
    response_json,
)
from .storm import SIZE, numbered_images


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with start_s3_server() as server:
        yield server


@pytest.fixture
def root(server: S3Server) -> str:
    return server.new_root()


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


def test_tables_in_parts_on_s3(root: str) -> None:
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


def test_a_server_that_goes_away_is_waited_for(
    server: S3Server, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = open_journal(storage.join(root, "journal"), "collect-1")
    server.stop()
    back = threading.Timer(3.0, server.start_again)
    back.start()
    try:
        journal.attempt("a", 0.01)
        journal.put("a", AnswerRecord(b"paid"))
        storage.write_table(storage.join(root, "t.parquet"), pa.table({"n": [1]}))
    finally:
        back.join()
    reader = open_journal(storage.join(root, "journal"))
    record = reader.get("a")
    assert record is not None
    assert record.body == b"paid"
    account = reader.account()
    assert (account.answered, account.unanswered) == (1, 0)
    assert storage.read_table(storage.join(root, "t.parquet"))["n"].to_pylist() == [1]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" (")[0] for line in lines[:-1]] == [
        "storage: s3://coin-runs can't be reached"
    ]
    assert lines[-1].startswith("storage: s3://coin-runs answers again after")


def test_killed_writers_on_s3(root: str) -> None:
    check_killed_journal_writer(storage.join(root, "journal"), 10)


def _query_about(
    rows: list[dict[str, str]], config: PipelineConfig, root: str, actors: int
) -> tuple[pa.Table, Counter[bytes]]:
    """Return the answers of so many actors with a journal on s3, and how often the
    service was sent each request.
    """
    requests: Counter[bytes] = Counter()

    def reply(request: httpx.Request) -> httpx.Response:
        requests[request.content] += 1
        width, height = SIZE
        body = response_json(detection_json(), width=width, height=height)
        return httpx.Response(200, json=body)

    journal = storage.join(root, "journal")
    client = functools.partial(CloudClient, transport=httpx.MockTransport(reply))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(question_client, "CloudClient", client)
        answers = ask_cloud_actors(actors, rows, config, [URL], journal)
    return answers, requests


def test_three_actors_on_s3_call_once_about_an_image(root: str, tmp_path: Path) -> None:
    """Of two images with equal bytes each actor asks about one."""
    rows = []
    for number, image in enumerate(numbered_images(9)):
        for copy in range(2):
            file = tmp_path / f"{number}-{copy}.jpg"
            file.write_bytes(image.data)
            rows.append({"image_id": file.stem, "uri": str(file)})
    preset = folder()
    cloud = Cloud(url=URL, in_flight=4, rate=1000.0, usd_per_call=0.01)
    collect = replace(preset.collect, labeler="none")
    config = replace(preset, classes=CLASSES, cloud=cloud, collect=collect)
    answers, requests = _query_about(rows, config, root, ACTORS)
    assert sorted(requests.values()) == [1] * 9
    assert Counter(answers["status"].to_pylist()) == {"ok": 9, "cached": 9}
    journal = open_journal(storage.join(root, "journal"))
    assert journal.spent() == pytest.approx((9, 0.09))
    for actors in (1, ACTORS):
        again, requests = _query_about(rows, config, root, actors)
        assert not requests
        assert set(again["status"].to_pylist()) == {"cached"}
        assert again["boxes"] == answers["boxes"]
