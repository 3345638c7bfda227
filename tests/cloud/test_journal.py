from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coin_ray.cloud.journal import Journal, ObjectJournal, Record, SegmentJournal, answer_key
from coin_ray.cloud.protocol import Query


@pytest.fixture(params=["disk", "objects"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "journal") if request.param == "disk" else f"memory://{uuid.uuid4().hex}/journal"


def segment(folder: Path | str) -> Path:
    return next(Path(folder).glob("*.segment"))


def test_kinds(tmp_path: Path) -> None:
    assert isinstance(Journal.open(str(tmp_path)), SegmentJournal)
    assert isinstance(Journal.open(f"file://{tmp_path}"), SegmentJournal)
    assert isinstance(Journal.open("memory://here"), ObjectJournal)


def test_answers_come_back_also_after_reopening(place: str) -> None:
    journal = Journal.open(place)
    record = Record(b'{"detections": []}', "application/json", attempts=3, latency_ms=12.5, cost_usd=0.02, time=5.0)
    assert journal.get("a") is None
    journal.put("a", record)
    assert journal.get("a") == record
    journal.close()
    assert Journal.open(place).get("a") == record


def test_many_writers(place: str) -> None:
    writers = [Journal.open(place) for _ in range(3)]
    for i in range(30):
        writers[i % 3].put(f"k{i}", Record(b"%d" % i))
        writers[i % 3].attempt(f"k{i}", 0.01)
    assert writers[0].get("k1") is None
    writers[0].refresh()
    for journal in (writers[0], Journal.open(place)):
        assert [journal.get(f"k{i}").body for i in range(30)] == [b"%d" % i for i in range(30)]  # type: ignore[union-attr]
        assert journal.spent() == (30, pytest.approx(0.3))


def test_attempts_count_until_refunded(place: str) -> None:
    journal = Journal.open(place)
    journal.attempt("a", 0.002)
    journal.attempt("a", 0.002)
    journal.refund("a", 0.002)
    assert journal.spent() == Journal.open(place).spent() == (1, pytest.approx(0.002))


def test_quarantined_answers_do_not_come_back(place: str) -> None:
    journal = Journal.open(place)
    journal.put("a", Record(b"broken"))
    journal.quarantine("a", b"broken", "not JSON")
    assert journal.get("a") is None
    journal.put("a", Record(b"good"))
    for reader in (journal, Journal.open(place)):
        found = reader.get("a")
        assert found is not None
        assert found.body == b"good"


def test_torn_tail_at_every_byte(tmp_path: Path) -> None:
    journal = Journal.open(str(tmp_path / "whole"))
    journal.put("a", Record(b"first"))
    size = segment(tmp_path / "whole").stat().st_size
    journal.put("b", Record(b"second"))
    whole = segment(tmp_path / "whole").read_bytes()
    folder = tmp_path / "torn"
    folder.mkdir()
    for length in range(size, len(whole)):
        (folder / "x.segment").write_bytes(whole[:length])
        torn = SegmentJournal(str(folder))
        assert torn.get("a") is not None
        assert torn.get("b") is None
    torn.put("c", Record(b"third"))
    assert Journal.open(str(folder)).get("c") is not None


def test_a_reader_waits_for_the_rest_of_a_torn_record(tmp_path: Path) -> None:
    writer = Journal.open(str(tmp_path / "a"))
    writer.put("a", Record(b"body"))
    whole = segment(tmp_path / "a").read_bytes()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.segment").write_bytes(whole[:-3])
    reader = Journal.open(str(tmp_path / "b"))
    assert reader.get("a") is None
    (tmp_path / "b" / "x.segment").write_bytes(whole)
    reader.refresh()
    assert reader.get("a") is not None


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    place=st.integers(0, 10_000), damage=st.binary(min_size=1, max_size=6), bodies=st.lists(st.binary(max_size=40), min_size=2, max_size=6)
)
def test_damage_never_gives_a_wrong_answer(tmp_path: Path, place: int, damage: bytes, bodies: list[bytes]) -> None:
    folder = tmp_path / uuid.uuid4().hex
    journal = Journal.open(str(folder))
    for i, body in enumerate(bodies):
        journal.put(str(i), Record(body))
    data = bytearray(segment(folder).read_bytes())
    place %= len(data)
    data[place : place + len(damage)] = damage
    segment(folder).write_bytes(data)
    found = [Journal.open(str(folder)).get(str(i)) for i in range(len(bodies))]
    assert all(r is None or r.body == body for r, body in zip(found, bodies, strict=True))
    assert sum(r is None for r in found) <= 2


WRITER = """
import sys
from coin_ray.cloud.journal import Journal, Record
journal = Journal.open(sys.argv[1])
for i in range(10**6):
    journal.attempt(str(i), 0.01)
    journal.put(str(i), Record(b"%d" % i))
    print(i, flush=True)
"""


def test_kill(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    seen = [process.stdout.readline() for _ in range(20)]
    os.kill(process.pid, signal.SIGKILL)
    seen += process.stdout.read().splitlines()
    process.stdout.close()
    process.wait()
    last = int(seen[-1])
    journal = Journal.open(str(tmp_path))
    assert all(journal.get(str(i)) is not None for i in range(last + 1))
    assert last + 1 <= journal.spent()[0] <= last + 2


def test_loads_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    journal = Journal.open(str(tmp_path))
    for i in range(10_000):
        journal.put(f"{i:064d}", Record(b'{"detections": []}' * 20))
    started = time.perf_counter()
    assert Journal.open(str(tmp_path)).get(f"{9_999:064d}") is not None
    assert time.perf_counter() - started < 1.0  # ten times as many in ten seconds


KEY = {"adapter": "reference", "endpoint": "host/path", "query": Query("m", ("a", "b"), 0.05), "max_side": 4096, "sent": b"image"}
CHANGES = {
    "adapter": "other",
    "endpoint": "host/other",
    "query": Query("m", ("b", "a"), 0.05),
    "max_side": 1000,
    "sent": b"other",
}


def test_key_depends_on_everything() -> None:
    keys = [answer_key(**KEY)] + [answer_key(**{**KEY, name: value}) for name, value in CHANGES.items()]  # type: ignore[arg-type]
    keys += [answer_key(**{**KEY, "query": Query(*q)}) for q in (("n", ("a", "b"), 0.05), ("m", ("a", "b"), 0.06))]  # type: ignore[arg-type]
    assert len(set(keys)) == len(keys)
    assert answer_key(**KEY) == keys[0]  # type: ignore[arg-type]
