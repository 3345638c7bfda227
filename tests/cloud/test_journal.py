from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coin_ray import storage
from coin_ray.cloud.journal.journal import (
    Journal,
    ObjectJournal,
    Record,
    SegmentJournal,
    answer_key,
)
from coin_ray.cloud.journal.journal import journal as journal_module
from coin_ray.cloud.protocol import Query
from coin_ray.errors import InputError


@pytest.fixture(params=["disk", "objects"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return (
        str(tmp_path / "journal")
        if request.param == "disk"
        else f"memory://{uuid.uuid4().hex}/journal"
    )


def segment(folder: Path | str) -> Path:
    return next(Path(folder).glob("*.segment"))


def test_kinds(tmp_path: Path) -> None:
    assert isinstance(Journal.open(str(tmp_path)), SegmentJournal)
    assert isinstance(Journal.open(f"file://{tmp_path}"), SegmentJournal)
    assert isinstance(Journal.open("memory://here"), ObjectJournal)


def test_answers_come_back_also_after_reopening(place: str) -> None:
    journal = Journal.open(place)
    record = Record(
        b'{"detections": []}',
        "application/json",
        attempts=3,
        latency_ms=12.5,
        cost_usd=0.02,
        time=5.0,
    )
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
        assert [journal.get(f"k{i}").body for i in range(30)] == [
            b"%d" % i for i in range(30)
        ]  # type: ignore[union-attr]
        assert journal.spent() == pytest.approx((30, 0.3))


def test_attempts_count_until_refunded(place: str) -> None:
    journal = Journal.open(place)
    journal.attempt("a", 0.002)
    journal.attempt("a", 0.002)
    journal.refund("a", 0.002)
    assert journal.spent() == Journal.open(place).spent() == pytest.approx((1, 0.002))


def test_spending_by_account(place: str) -> None:
    """What names no account, as of older versions, counts for each."""
    journal = Journal.open(place)
    journal.attempt("a", 0.5, "c0ffee")
    journal.attempt("b", 0.25, "beef")
    journal.refund("b", 0.25, "beef")
    journal.attempt("c", 2.0)
    for reader in (journal, Journal.open(place)):
        assert reader.spent("c0ffee") == pytest.approx((2, 2.5))
        assert reader.spent("beef") == reader.spent("f00d") == pytest.approx((1, 2.0))
        assert reader.spent() == pytest.approx((2, 2.5))


def test_when_calls_were_made(place: str) -> None:
    """To the minute, and never too early, so that a daily limit is kept."""
    journal = Journal.open(place)
    now = time.time()
    moments = [now - 90_000, now - 7200, now - 3600, now]
    for moment in moments:
        journal.attempt("a", 0.5, "c0ffee", moment)
    journal.refund("a", 0.5, "c0ffee")  # it was made, whoever paid
    journal.attempt("b", 0.5, "beef", now - 30)
    for reader in (journal, Journal.open(place)):
        starts = reader.starts("c0ffee", now - 86_400)
        assert len(starts) == 3
        assert all(
            moment - 1 <= start <= min(moment + 60, time.time())
            for moment, start in zip(moments[1:], starts, strict=True)
        )
        assert len(reader.starts("c0ffee", 0)) == 4
        assert len(reader.starts("beef", now - 86_400)) == 1
        assert reader.starts("f00d", 0) == []


def test_compacting_keeps_accounts_and_today_s_calls(tmp_path: Path) -> None:
    journal = SegmentJournal(str(tmp_path))
    now = time.time()
    for moment in (now - 200_000, now - 80_000, now):
        journal.attempt("a", 0.5, "c0ffee", moment)
    journal.attempt("b", 0.25, "beef", now)
    journal.refund("b", 0.25, "beef")
    for _ in range(2):
        journal.compact()
        journal.attempt("a", 0.5, "c0ffee", now)
        for reader in (journal, SegmentJournal(str(tmp_path))):
            assert reader.spent("beef") == (0, 0)
            assert reader.spent("c0ffee") == reader.spent()
            assert len(reader.starts("c0ffee", now - 86_400)) == reader.spent()[0] - 1
            if reader is not journal:
                reader.close()
    assert journal.spent() == (5, 2.5)


def test_spending_of_older_versions(tmp_path: Path) -> None:
    """Without time and account, also compacted: it counts as spent, and for no day."""
    journal = SegmentJournal(str(tmp_path / "disk"))
    journal._append({"kind": "attempt", "key": "a", "calls": 1, "micro_usd": 500_000})
    journal._append(
        {
            "kind": "compacted",
            "id": "x",
            "replaces": [],
            "attempts": 7,
            "refunds": 1,
            "calls": 6,
            "micro_usd": 3_000_000,
        }
    )
    objects = Journal.open(f"memory://{uuid.uuid4().hex}/journal")
    assert isinstance(objects, ObjectJournal)
    storage.write_bytes(storage.join(objects._uri, "spent", "abc_1_500000"), b"")
    objects.refresh()
    for subject, spent in ((journal, (7, 3.5)), (objects, (1, 0.5))):
        assert subject.spent() == subject.spent("c0ffee") == spent
        assert subject.starts("c0ffee", 0) == subject.starts("", 0) == []


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


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    place=st.integers(0, 10_000),
    damage=st.binary(min_size=1, max_size=6),
    bodies=st.lists(st.binary(max_size=40), min_size=2, max_size=6),
)
def test_damage_never_gives_a_wrong_answer(
    tmp_path: Path, place: int, damage: bytes, bodies: list[bytes]
) -> None:
    folder = tmp_path / uuid.uuid4().hex
    journal = Journal.open(str(folder))
    for i, body in enumerate(bodies):
        journal.put(str(i), Record(body))
    data = bytearray(segment(folder).read_bytes())
    place %= len(data)
    data[place : place + len(damage)] = damage
    segment(folder).write_bytes(data)
    found = [Journal.open(str(folder)).get(str(i)) for i in range(len(bodies))]
    assert all(
        r is None or r.body == body for r, body in zip(found, bodies, strict=True)
    )
    assert sum(r is None for r in found) <= 2


WRITER = """
import sys
from coin_ray.cloud.journal.journal import Journal, Record
journal = Journal.open(sys.argv[1])
for i in range(10**6):
    journal.attempt(str(i), 0.01)
    journal.put(str(i), Record(b"%d" % i))
    print(i, flush=True)
"""


def test_kill(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
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
    started = time.process_time()
    journal = Journal.open(str(tmp_path))
    assert all(journal.get(f"{i:064d}") is not None for i in range(10_000))
    # ten times as many in ten seconds; the process's own time, not that of its
    # neighbours
    assert time.process_time() - started < 1.0


KEY = {
    "adapter": "reference",
    "endpoint": "host/path",
    "query": Query("m", ("a", "b"), 0.05),
    "max_side": 4096,
    "sent": b"image",
}
CHANGES = {
    "adapter": "other",
    "endpoint": "host/other",
    "query": Query("m", ("b", "a"), 0.05),
    "max_side": 1000,
    "sent": b"other",
}


def test_key_depends_on_everything() -> None:
    keys = [answer_key(**KEY)] + [
        answer_key(**{**KEY, name: value}) for name, value in CHANGES.items()
    ]  # type: ignore[arg-type]
    keys += [
        answer_key(**{**KEY, "query": Query(*q)})
        for q in (("n", ("a", "b"), 0.05), ("m", ("a", "b"), 0.06))
    ]  # type: ignore[arg-type]
    assert len(set(keys)) == len(keys)
    assert answer_key(**KEY) == keys[0]  # type: ignore[arg-type]


def test_the_last_writer_s_answer_counts(place: str) -> None:
    first, second = Journal.open(place), Journal.open(place)
    first.put("a.task", Record(b"lost"))
    second.put("a.task", Record(b"under way"))
    for reader in (second, Journal.open(place)):
        found = reader.get("a.task")
        assert found is not None
        assert found.body == b"under way"


def test_behind_a_quarantined_answer_an_earlier_one_comes_back(place: str) -> None:
    journal = Journal.open(place)
    journal.put("a", Record(b"good"))
    journal.put("a", Record(b"broken"))
    journal.quarantine("a", b"broken", "not JSON")
    for reader in (journal, Journal.open(place)):
        found = reader.get("a")
        assert found is not None
        assert found.body == b"good"
        assert reader.keys() == ["a"]


def test_service_and_model_are_kept(place: str) -> None:
    journal = Journal.open(place)
    record = Record(b"x", time=1.0, service="google-vision", model="builtin/latest")
    journal.put("a", record)
    assert Journal.open(place).get("a") == record


def test_journals_of_older_versions_are_read(tmp_path: Path) -> None:
    head = {
        "kind": "answer",
        "key": "a",
        "content_type": "text/plain",
        "attempts": 1,
        "latency_ms": 1.0,
        "cost_usd": 0.0,
        "time": 5.0,
    }
    data = journal_module._frame(
        {**head, "digest": journal_module._digest(b"body")}, b"body"
    )
    (tmp_path / "ff00.segment").write_bytes(data)
    place = f"memory://{uuid.uuid4().hex}/journal"
    storage.write_bytes(
        storage.join(place, "answers", f"a-{journal_module._digest(b'body')}"), data
    )
    for journal in (Journal.open(str(tmp_path)), Journal.open(place)):
        assert journal.get("a") == Record(b"body", "text/plain", 1, 1.0, 0.0, 5.0)
        journal.put("a", Record(b"newer"))
    for journal in (Journal.open(str(tmp_path)), Journal.open(place)):
        found = journal.get("a")
        assert found is not None
        assert found.body == b"newer"


def test_contents(place: str) -> None:
    journal = Journal.open(place)
    for i in range(3):
        journal.attempt(str(i), 0.5)
        journal.put(str(i), Record(b"%d" % i, service="dino-x" if i else "", model="m"))
    journal.refund("2", 0.5)
    journal.put("7.task", Record(b"under way"))
    journal.quarantine("0", b"0", "broken")
    found = Journal.open(place).contents()
    assert (
        found.answers,
        found.tasks,
        found.quarantined,
        found.attempts,
        found.refunds,
        found.calls,
    ) == (2, 1, 1, 3, 1, 2)
    assert found.usd == pytest.approx(1.0)
    assert found.size > 100
    assert found.services == (
        {("dino-x", "m"): 2} if isinstance(journal, SegmentJournal) else {}
    )


KEYS = st.sampled_from(["a", "b", "c", "a.task"])
BODIES = st.sampled_from([b"1", b"2", b"3"])
STEP = st.one_of(
    st.tuples(st.just("put"), KEYS, BODIES),
    st.tuples(st.just("attempt"), KEYS, st.sampled_from([0.0, 0.01, 0.5])),
    st.tuples(st.just("refund"), KEYS, st.sampled_from([0.0, 0.01, 0.5])),
    st.tuples(st.just("quarantine"), KEYS, BODIES),
)
STEPS = st.lists(st.tuples(st.integers(0, 1), STEP), max_size=25)
State = tuple[dict[str, bytes | None], tuple[int, float]]


def do(journal: Journal, step: tuple[str, str, bytes | float]) -> None:
    kind, key, value = step
    if kind == "put":
        assert isinstance(value, bytes)
        journal.put(key, Record(value))
    elif kind == "quarantine":
        assert isinstance(value, bytes)
        journal.quarantine(key, value, "broken")
    else:
        assert isinstance(value, float)
        getattr(journal, kind)(key, value)


def state(journal: Journal) -> State:
    found = {key: journal.get(key) for key in ("a", "b", "c", "a.task")}
    assert sorted(journal.keys()) == sorted(
        k for k, r in found.items() if r is not None
    )
    return {k: r.body if r else None for k, r in found.items()}, journal.spent()


def expected(steps: list[tuple[str, str, bytes | float]]) -> State:
    """What one writer's steps leave, by the words of ``Journal``."""
    puts: dict[str, list[bytes]] = {"a": [], "b": [], "c": [], "a.task": []}
    rejected = {(key, value) for kind, key, value in steps if kind == "quarantine"}
    calls, micro = 0, 0
    for kind, key, value in steps:
        if isinstance(value, bytes):
            puts[key] += [value] if kind == "put" else []
        else:
            sign = 1 if kind == "attempt" else -1
            calls, micro = calls + sign, micro + sign * round(value * 1_000_000)
    answers = {
        key: next((b for b in reversed(bodies) if (key, b) not in rejected), None)
        for key, bodies in puts.items()
    }
    return answers, (calls, micro / 1_000_000)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(steps=STEPS, kind=st.sampled_from(["disk", "objects"]))
def test_one_writer_s_steps_and_any_reader(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: list[tuple[int, tuple[str, str, bytes | float]]],
    kind: str,
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    place = (
        str(tmp_path / uuid.uuid4().hex)
        if kind == "disk"
        else f"memory://{uuid.uuid4().hex}/journal"
    )
    journal = Journal.open(place)
    for _, step in steps:
        do(journal, step)
    assert (
        state(journal) == state(Journal.open(place)) == expected([s for _, s in steps])
    )
    assert not list(journal.verify())


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(before=STEPS, after=STEPS)
def test_compacting_changes_neither_answers_nor_spending(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: list[tuple[int, tuple[str, str, bytes | float]]],
    after: list[tuple[int, tuple[str, str, bytes | float]]],
) -> None:
    """Two writers; then the journal is compacted, written on, and compacted again."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    folder = str(tmp_path / uuid.uuid4().hex)
    for steps in (before, after):
        writers = [SegmentJournal(folder) for _ in range(2)]
        for number, step in steps:
            do(writers[number], step)
        for writer in writers:
            writer.close()
        journal = SegmentJournal(folder)
        known, contents = state(journal), journal.contents()
        journal.compact()
        reader = SegmentJournal(folder)
        assert state(journal) == state(reader) == known
        assert (reader.contents().attempts, reader.contents().refunds) == (
            contents.attempts,
            contents.refunds,
        )
        assert not list(journal.verify())
        assert len(list(Path(folder).glob("*.segment"))) == 1
        journal.close()
        reader.close()


def filled(folder: Path, writers: int = 3) -> State:
    """Answers, superseded ones, a quarantined one, attempts and refunds in several
    segments; what a reader then finds."""
    for number in range(writers):
        journal = SegmentJournal(str(folder))
        for key in ("a", "b", "c"):
            journal.attempt(key, 0.01)
            journal.put(key, Record(b"%d %s" % (number, key.encode() * 50)))
        journal.refund("c", 0.01)
        journal.close()
    journal.put("b", Record(b"broken"))
    journal.quarantine("b", b"broken", "not JSON")
    journal.close()
    reader = SegmentJournal(str(folder))
    known = state(reader)
    reader.close()
    assert all(known[0][k] for k in ("a", "b", "c"))
    return known


def test_compacting_drops_what_is_superseded(tmp_path: Path) -> None:
    known = filled(tmp_path)
    journal = SegmentJournal(str(tmp_path))
    before, after = journal.compact()
    assert after < before
    assert after == sum(f.stat().st_size for f in tmp_path.glob("*.segment"))
    journal.put("d", Record(b"written on"))
    reader = SegmentJournal(str(tmp_path))
    assert reader.keys() == journal.keys() == ["a", "b", "c", "d"]
    assert reader.spent() == known[1]


@pytest.mark.parametrize("closed", [False, True])
def test_a_journal_in_use_is_not_compacted(tmp_path: Path, closed: bool) -> None:
    known = filled(tmp_path)
    other, journal = SegmentJournal(str(tmp_path)), SegmentJournal(str(tmp_path))
    if closed:
        other.close()
        journal.compact()
    else:
        with pytest.raises(InputError, match="in use"):
            journal.compact()
        other.put("x", Record(b"still written"))
        journal.refresh()
        assert journal.get("x") is not None
        journal.put("y", Record(b"too"))
    assert [SegmentJournal(str(tmp_path)).get(k) is not None for k in "abcxy"] == [
        True
    ] * 3 + [not closed] * 2
    assert SegmentJournal(str(tmp_path)).spent() == known[1]


def test_a_journal_used_by_another_process_is_not_compacted(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    journal = SegmentJournal(str(tmp_path))
    with pytest.raises(InputError, match="in use"):
        journal.compact()
    process.kill()
    process.stdout.read()
    process.stdout.close()
    process.wait()
    journal.refresh()
    spent = journal.spent()
    journal.compact()
    assert SegmentJournal(str(tmp_path)).spent() == spent


def test_a_closed_journal_that_is_used_again_writes_beside_the_compacted_one(
    tmp_path: Path,
) -> None:
    journal = SegmentJournal(str(tmp_path))
    journal.put("a", Record(b"1"))
    journal.close()
    SegmentJournal(str(tmp_path)).compact()
    journal.put("b", Record(b"2"))
    reader = SegmentJournal(str(tmp_path))
    assert reader.get("a") is not None
    assert reader.get("b") is not None
    with pytest.raises(InputError, match="in use"):
        reader.compact()


def test_without_locks_nothing_is_compacted_but_all_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = filled(tmp_path)
    reader = SegmentJournal(str(tmp_path))
    reader.close()
    reader.refresh()
    SegmentJournal(str(tmp_path)).compact()
    assert state(reader) == known, "its files went away under it"

    def no_locks(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", no_locks)
    journal = SegmentJournal(str(tmp_path))
    assert state(journal) == known
    with pytest.raises(InputError, match="keeps no locks"):
        journal.compact()


KILLED_AT = (
    "os.fsync",
    "os.replace",
    "os.remove",
    "os.path.getsize",
    "coin_ray.cloud.journal.journal._frame",
)


def killed_compacting(folder: Path, step: int) -> bool:
    """Whether a child that compacts was killed at the ``step``-th of the calls that
    matter, instead of finishing."""
    child = os.fork()
    if child == 0:
        count = 0

        def counted(function: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **named: object) -> object:
                nonlocal count
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **named)

            return call

        with pytest.MonkeyPatch.context() as patch:
            journal = SegmentJournal(str(folder))
            for name in KILLED_AT:
                owner, _, attribute = name.rpartition(".")
                module = {"os": os, "os.path": os.path}.get(owner, journal_module)
                patch.setattr(module, attribute, counted(getattr(module, attribute)))
            journal.compact()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_killed_at_any_step_nothing_is_lost_or_counted_twice(tmp_path: Path) -> None:
    known, step = filled(tmp_path), 1
    while killed_compacting(tmp_path, step):
        reader = SegmentJournal(str(tmp_path))
        assert state(reader) == known, step
        reader.close()
        if step % 5 == 0:  # and written on, in the middle of it
            writer = SegmentJournal(str(tmp_path))
            writer.attempt("z", 0.25)
            writer.close()
            known = (known[0], (known[1][0] + 1, round(known[1][1] + 0.25, 6)))
        step += 1
    assert step > 20
    assert state(SegmentJournal(str(tmp_path))) == known
    assert not list(tmp_path.glob("*.tmp"))
    assert len(list(tmp_path.glob("*.segment"))) == 1


def test_segments_left_behind_by_a_killed_compaction_do_not_count(
    tmp_path: Path,
) -> None:
    known = filled(tmp_path)
    old = {f: f.read_bytes() for f in tmp_path.glob("*.segment")}
    journal = SegmentJournal(str(tmp_path))
    journal.compact()
    journal.close()
    for file, data in old.items():
        file.write_bytes(data)
    again = SegmentJournal(str(tmp_path))
    assert state(again) == known
    again.compact()
    assert state(again) == known
    assert len(list(tmp_path.glob("*.segment"))) == 1


@pytest.mark.parametrize("place", [20, -20])
def test_one_damaged_record_does_not_lose_the_sums(tmp_path: Path, place: int) -> None:
    known = filled(tmp_path)
    old = {f: f.read_bytes() for f in tmp_path.glob("*.segment")}
    SegmentJournal(str(tmp_path)).compact()
    data = bytearray(segment(tmp_path).read_bytes())
    data[place] ^= 1
    segment(tmp_path).write_bytes(data)
    for file, content in old.items():
        file.write_bytes(content)
    assert state(SegmentJournal(str(tmp_path))) == known


def test_a_full_disk_leaves_the_journal_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = filled(tmp_path)
    files = sorted(os.listdir(tmp_path))
    journal = SegmentJournal(str(tmp_path))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            journal.compact()
    assert sorted(os.listdir(tmp_path)) == files
    assert state(journal) == known


def test_a_writer_unnoticed_by_the_lock_stops_the_compaction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = filled(tmp_path)
    journal = SegmentJournal(str(tmp_path))
    live = journal._live

    def while_another_writes() -> Iterator[object]:
        yield from live()
        with segment(tmp_path).open("ab") as stream:
            stream.write(b"more")

    monkeypatch.setattr(journal, "_live", while_another_writes)
    with pytest.raises(InputError, match="written to while"):
        journal.compact()
    assert state(SegmentJournal(str(tmp_path))) == known


@settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    place=st.integers(0, 10_000),
    bit=st.integers(0, 7),
    kind=st.sampled_from(["disk", "objects"]),
)
def test_every_changed_bit_is_found(
    tmp_path: Path, place: int, bit: int, kind: str
) -> None:
    uri = (
        str(tmp_path / uuid.uuid4().hex)
        if kind == "disk"
        else f"memory://{uuid.uuid4().hex}/journal"
    )
    journal = Journal.open(uri)
    journal.attempt("a", 0.01)
    journal.put("a", Record(b"first"))
    journal.put("b", Record(b"second"))
    journal.quarantine("b", b"second", "broken")
    assert not list(journal.verify())
    files = [f for f in storage.list_files(uri) if storage.read_bytes(f)]
    data = bytearray(b"".join(storage.read_bytes(f) for f in files))
    place %= len(data)
    data[place] ^= 1 << bit
    start = 0
    for file in files:
        size = len(storage.read_bytes(file))
        if start <= place < start + size:
            storage.write_bytes(file, bytes(data[start : start + size]))
            changed, offset = file, place - start
        start += size
    (damage,) = Journal.open(uri).verify()
    assert damage.place.endswith(changed.rpartition("/")[2])
    assert damage.offset <= offset
    assert damage.reason


def test_a_torn_tail_and_foreign_content_are_found(tmp_path: Path) -> None:
    journal = SegmentJournal(str(tmp_path))
    journal.put("a", Record(b"first"))
    written = segment(tmp_path)
    size = written.stat().st_size
    journal.put("b", Record(b"second"))
    written.write_bytes(written.read_bytes()[:-3])
    wrong = journal_module._frame(
        {"kind": "answer", "key": "c", "digest": "0" * 16}, b"another body"
    )
    (tmp_path / "x.segment").write_bytes(
        wrong + journal_module._frame({"kind": "novel"}, b"")
    )
    (tmp_path / "y.segment").touch()
    found = [(Path(d.place).name, d.offset, d.reason) for d in journal.verify()]
    assert found[0][:2] == (written.name, size)
    assert "last" in found[0][2]
    assert [f[1] for f in found[1:]] == [0, len(wrong)]
    assert "not the one that was received" in found[1][2]
    assert "unknown kind" in found[2][2]
    assert SegmentJournal(str(tmp_path)).get("a") is not None


def test_objects_under_wrong_names_are_found() -> None:
    place = f"memory://{uuid.uuid4().hex}/journal"
    journal = Journal.open(place)
    journal.put("a", Record(b"1"))
    journal.attempt("a", 0.5)
    (answer,) = storage.list_files(storage.join(place, "answers"))
    storage.write_bytes(
        storage.join(place, "answers", "b-" + "0" * 16), storage.read_bytes(answer)
    )
    storage.write_bytes(
        storage.join(place, "answers", "stray"), storage.read_bytes(answer)
    )
    storage.write_bytes(storage.join(place, "spent", "stray"), b"")
    again = Journal.open(place)
    assert (again.spent(), again.get("a").body) == ((1, 0.5), b"1")  # type: ignore[union-attr]
    assert sorted(d.place.rpartition("/")[2] for d in again.verify()) == [
        "b-" + "0" * 16,
        "stray",
        "stray",
    ]
