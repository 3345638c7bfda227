from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operations import count_calls

from coin_ray import storage
from coin_ray.cloud.journal import segments
from coin_ray.cloud.journal.base import AnswerRecord, Journal
from coin_ray.cloud.journal.keys import answer_key
from coin_ray.cloud.journal.object_store import ObjectJournal
from coin_ray.cloud.journal.opening import open_journal
from coin_ray.cloud.journal.record_format import body_digest, encode_record
from coin_ray.cloud.journal.segments import SegmentJournal
from coin_ray.cloud.protocol import Query
from coin_ray.errors import InputError

from .conftest import check_killed_journal_writer, start_journal_writer

SHARED_FIXTURES = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
"""All examples of a property share one ``tmp_path``; each makes its own folder in it."""


@pytest.fixture(params=["disk", "objects"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return _journal_uri(request.param, tmp_path / "journal")


def _journal_uri(kind: str, folder: Path) -> str:
    """Return the place of a new journal: ``folder``, or objects in memory."""
    if kind == "disk":
        return str(folder)
    return f"memory://{uuid.uuid4().hex}/journal"


def _only_segment(folder: Path | str) -> Path:
    return next(Path(folder).glob("*.segment"))


def _bodies(journal: Journal, keys: Iterable[str]) -> list[bytes | None]:
    """Return the bodies on record for these keys, None where there is no record."""
    records = [journal.get(key) for key in keys]
    return [record.body if record is not None else None for record in records]


def test_kinds(tmp_path: Path) -> None:
    assert isinstance(open_journal(str(tmp_path)), SegmentJournal)
    assert isinstance(open_journal(f"file://{tmp_path}"), SegmentJournal)
    assert isinstance(open_journal("memory://here"), ObjectJournal)


def test_answers_come_back_also_after_reopening(uri: str) -> None:
    journal = open_journal(uri)
    record = AnswerRecord(
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
    assert open_journal(uri).get("a") == record


def test_many_writers(uri: str) -> None:
    writers = [open_journal(uri) for _ in range(3)]
    for i in range(30):
        writers[i % 3].put(f"k{i}", AnswerRecord(b"%d" % i))
        writers[i % 3].attempt(f"k{i}", 0.01)
    assert writers[0].get("k1") is None
    writers[0].refresh()
    for journal in (writers[0], open_journal(uri)):
        bodies = _bodies(journal, [f"k{i}" for i in range(30)])
        assert bodies == [b"%d" % i for i in range(30)]
        assert journal.spent() == pytest.approx((30, 0.3))


def test_attempts_count_until_refunded(uri: str) -> None:
    journal = open_journal(uri)
    journal.attempt("a", 0.002)
    journal.attempt("a", 0.002)
    journal.refund("a", 0.002)
    assert journal.spent() == open_journal(uri).spent() == pytest.approx((1, 0.002))


def test_spending_by_account(uri: str) -> None:
    """Calls without an account, as older versions wrote them, count for each account."""
    journal = open_journal(uri)
    journal.attempt("a", 0.5, "c0ffee")
    journal.attempt("b", 0.25, "beef")
    journal.refund("b", 0.25, "beef")
    journal.attempt("c", 2.0)
    for reader in (journal, open_journal(uri)):
        assert reader.spent("c0ffee") == pytest.approx((2, 2.5))
        assert reader.spent("beef") == reader.spent("f00d") == pytest.approx((1, 2.0))
        assert reader.spent() == pytest.approx((2, 2.5))


def test_when_calls_were_made(uri: str) -> None:
    """Starts are exact to the minute and never too early, so a daily limit is kept."""
    journal = open_journal(uri)
    now = time.time()
    moments = [now - 90_000, now - 7200, now - 3600, now]
    for moment in moments:
        journal.attempt("a", 0.5, "c0ffee", moment)
    journal.refund("a", 0.5, "c0ffee")  # it was made, whoever paid
    journal.attempt("b", 0.5, "beef", now - 30)
    for reader in (journal, open_journal(uri)):
        starts = reader.call_starts("c0ffee", now - 86_400)
        assert len(starts) == 3
        for moment, start in zip(moments[1:], starts, strict=True):
            assert moment - 1 <= start <= min(moment + 60, time.time())
        assert len(reader.call_starts("c0ffee", 0)) == 4
        assert len(reader.call_starts("beef", now - 86_400)) == 1
        assert reader.call_starts("f00d", 0) == []


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
            assert (
                len(reader.call_starts("c0ffee", now - 86_400)) == reader.spent()[0] - 1
            )
            if reader is not journal:
                reader.close()
    assert journal.spent() == (5, 2.5)


def test_spending_of_older_versions(tmp_path: Path) -> None:
    """Records without time and account, also compacted, count as spent, for no day."""
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
    objects = open_journal(f"memory://{uuid.uuid4().hex}/journal")
    assert isinstance(objects, ObjectJournal)
    storage.write_bytes(storage.join(objects._uri, "spent", "abc_1_500000"), b"")
    objects.refresh()
    for subject, spent in ((journal, (7, 3.5)), (objects, (1, 0.5))):
        assert subject.spent() == subject.spent("c0ffee") == spent
        assert subject.call_starts("c0ffee", 0) == subject.call_starts("", 0) == []


def test_quarantined_answers_do_not_come_back(uri: str) -> None:
    journal = open_journal(uri)
    journal.put("a", AnswerRecord(b"broken"))
    journal.quarantine("a", b"broken", "not JSON")
    assert journal.get("a") is None
    journal.put("a", AnswerRecord(b"good"))
    for reader in (journal, open_journal(uri)):
        record = reader.get("a")
        assert record is not None
        assert record.body == b"good"


def test_torn_tail_at_every_byte(tmp_path: Path) -> None:
    journal = open_journal(str(tmp_path / "whole"))
    journal.put("a", AnswerRecord(b"first"))
    size = _only_segment(tmp_path / "whole").stat().st_size
    journal.put("b", AnswerRecord(b"second"))
    whole = _only_segment(tmp_path / "whole").read_bytes()
    folder = tmp_path / "torn"
    folder.mkdir()
    for length in range(size, len(whole)):
        (folder / "x.segment").write_bytes(whole[:length])
        torn = SegmentJournal(str(folder))
        assert torn.get("a") is not None
        assert torn.get("b") is None
    torn.put("c", AnswerRecord(b"third"))
    assert open_journal(str(folder)).get("c") is not None


def test_a_reader_waits_for_the_rest_of_a_torn_record(tmp_path: Path) -> None:
    writer = open_journal(str(tmp_path / "a"))
    writer.put("a", AnswerRecord(b"body"))
    whole = _only_segment(tmp_path / "a").read_bytes()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.segment").write_bytes(whole[:-3])
    reader = open_journal(str(tmp_path / "b"))
    assert reader.get("a") is None
    (tmp_path / "b" / "x.segment").write_bytes(whole)
    reader.refresh()
    assert reader.get("a") is not None


@SHARED_FIXTURES
@given(
    position=st.integers(0, 10_000),
    damage=st.binary(min_size=1, max_size=6),
    bodies=st.lists(st.binary(max_size=40), min_size=2, max_size=6),
)
def test_damage_never_gives_a_wrong_answer(
    tmp_path: Path, position: int, damage: bytes, bodies: list[bytes]
) -> None:
    folder = tmp_path / uuid.uuid4().hex
    journal = open_journal(str(folder))
    for i, body in enumerate(bodies):
        journal.put(str(i), AnswerRecord(body))
    segment = bytearray(_only_segment(folder).read_bytes())
    position %= len(segment)
    segment[position : position + len(damage)] = damage
    _only_segment(folder).write_bytes(segment)
    records = [open_journal(str(folder)).get(str(i)) for i in range(len(bodies))]
    for record, body in zip(records, bodies, strict=True):
        assert record is None or record.body == body
    assert sum(record is None for record in records) <= 2


def test_killed_writers(tmp_path: Path) -> None:
    check_killed_journal_writer(str(tmp_path), 20)


def _calls_to_read(folder: Path, answers: int) -> int:
    """Fill a journal, and return the function calls that opening it and looking every
    answer up takes."""
    journal = open_journal(str(folder))
    for i in range(answers):
        journal.attempt(f"{i:064d}", 0.01)
        journal.put(f"{i:064d}", AnswerRecord(b'{"detections": []}' * 20))

    def read_all() -> None:
        reader = open_journal(str(folder))
        assert all(reader.get(f"{i:064d}") is not None for i in range(answers))

    return count_calls(read_all)


def test_the_work_of_reading_grows_with_the_answers_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    few, many = (_calls_to_read(tmp_path / str(n), n) for n in (200, 800))
    assert many < 4.2 * few


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
    changed_parts = [{name: change} for name, change in CHANGES.items()]
    other_model = {"query": Query("n", ("a", "b"), 0.05)}
    other_threshold = {"query": Query("m", ("a", "b"), 0.06)}
    variants = [KEY]
    for parts in (*changed_parts, other_model, other_threshold):
        variants.append({**KEY, **parts})
    keys = [answer_key(**parts) for parts in variants]  # type: ignore[arg-type]
    assert len(set(keys)) == len(keys)
    assert answer_key(**KEY) == keys[0]  # type: ignore[arg-type]


def test_the_last_writer_s_answer_counts(uri: str) -> None:
    first, second = open_journal(uri), open_journal(uri)
    first.put("a.task", AnswerRecord(b"lost"))
    second.put("a.task", AnswerRecord(b"under way"))
    for reader in (second, open_journal(uri)):
        record = reader.get("a.task")
        assert record is not None
        assert record.body == b"under way"


def test_behind_a_quarantined_answer_an_earlier_one_comes_back(uri: str) -> None:
    journal = open_journal(uri)
    journal.put("a", AnswerRecord(b"good"))
    journal.put("a", AnswerRecord(b"broken"))
    journal.quarantine("a", b"broken", "not JSON")
    for reader in (journal, open_journal(uri)):
        record = reader.get("a")
        assert record is not None
        assert record.body == b"good"
        assert reader.keys() == ["a"]


def test_service_and_model_are_kept(uri: str) -> None:
    journal = open_journal(uri)
    record = AnswerRecord(
        b"x", time=1.0, service="google-vision", model="builtin/latest"
    )
    journal.put("a", record)
    assert open_journal(uri).get("a") == record


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
    stored = encode_record({**head, "digest": body_digest(b"body")}, b"body")
    (tmp_path / "ff00.segment").write_bytes(stored)
    uri = f"memory://{uuid.uuid4().hex}/journal"
    storage.write_bytes(
        storage.join(uri, "answers", f"a-{body_digest(b'body')}"), stored
    )
    for journal in (open_journal(str(tmp_path)), open_journal(uri)):
        assert journal.get("a") == AnswerRecord(b"body", "text/plain", 1, 1.0, 0.0, 5.0)
        journal.put("a", AnswerRecord(b"newer"))
    for journal in (open_journal(str(tmp_path)), open_journal(uri)):
        record = journal.get("a")
        assert record is not None
        assert record.body == b"newer"


def test_contents(uri: str) -> None:
    journal = open_journal(uri)
    for i in range(3):
        journal.attempt(str(i), 0.5)
        journal.put(
            str(i), AnswerRecord(b"%d" % i, service="dino-x" if i else "", model="m")
        )
    journal.refund("2", 0.5)
    journal.put("7.task", AnswerRecord(b"under way"))
    journal.quarantine("0", b"0", "broken")
    counts = open_journal(uri).contents()
    assert (counts.answers, counts.tasks, counts.quarantined) == (2, 1, 1)
    assert (counts.attempts, counts.refunds, counts.calls) == (3, 1, 2)
    assert counts.usd == pytest.approx(1.0)
    assert counts.size > 100
    assert counts.services == (
        {("dino-x", "m"): 2} if isinstance(journal, SegmentJournal) else {}
    )


KEY_NAMES = ("a", "b", "c", "a.task")
KEYS = st.sampled_from(KEY_NAMES)
BODIES = st.sampled_from([b"1", b"2", b"3"])
STEP = st.one_of(
    st.tuples(st.just("put"), KEYS, BODIES),
    st.tuples(st.just("attempt"), KEYS, st.sampled_from([0.0, 0.01, 0.5])),
    st.tuples(st.just("refund"), KEYS, st.sampled_from([0.0, 0.01, 0.5])),
    st.tuples(st.just("quarantine"), KEYS, BODIES),
)
STEPS = st.lists(st.tuples(st.integers(0, 1), STEP), max_size=25)
State = tuple[dict[str, bytes | None], tuple[int, float]]


def _apply(journal: Journal, step: tuple[str, str, bytes | float]) -> None:
    operation, key, argument = step
    if operation == "put":
        assert isinstance(argument, bytes)
        journal.put(key, AnswerRecord(argument))
    elif operation == "quarantine":
        assert isinstance(argument, bytes)
        journal.quarantine(key, argument, "broken")
    else:
        assert isinstance(argument, float)
        getattr(journal, operation)(key, argument)


def _state(journal: Journal) -> State:
    bodies = dict(zip(KEY_NAMES, _bodies(journal, KEY_NAMES), strict=True))
    recorded = [key for key, body in bodies.items() if body is not None]
    assert sorted(journal.keys()) == sorted(recorded)
    return bodies, journal.spent()


def _expected_state(steps: list[tuple[str, str, bytes | float]]) -> State:
    """Return the state that one writer's steps lead to, as ``Journal`` documents it."""
    bodies: dict[str, list[bytes]] = {key: [] for key in KEY_NAMES}
    quarantined = set()
    calls, micro_usd = 0, 0
    for operation, key, argument in steps:
        if operation == "quarantine":
            quarantined.add((key, argument))
        elif isinstance(argument, bytes):
            bodies[key].append(argument)
        else:
            sign = 1 if operation == "attempt" else -1
            calls += sign
            micro_usd += sign * round(argument * 1_000_000)
    latest: dict[str, bytes | None] = dict.fromkeys(KEY_NAMES)
    for key in KEY_NAMES:
        for body in bodies[key]:
            if (key, body) not in quarantined:
                latest[key] = body
    return latest, (calls, micro_usd / 1_000_000)


@SHARED_FIXTURES
@given(steps=STEPS, kind=st.sampled_from(["disk", "objects"]))
def test_one_writer_s_steps_and_any_reader(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: list[tuple[int, tuple[str, str, bytes | float]]],
    kind: str,
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    uri = _journal_uri(kind, tmp_path / uuid.uuid4().hex)
    journal = open_journal(uri)
    for _, step in steps:
        _apply(journal, step)
    expected = _expected_state([step for _, step in steps])
    assert _state(journal) == _state(open_journal(uri)) == expected
    assert not list(journal.verify())


@SHARED_FIXTURES
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
            _apply(writers[number], step)
        for writer in writers:
            writer.close()
        journal = SegmentJournal(folder)
        state_before = _state(journal)
        counts_before = journal.contents()
        journal.compact()
        reader = SegmentJournal(folder)
        assert _state(journal) == _state(reader) == state_before
        assert reader.contents().attempts == counts_before.attempts
        assert reader.contents().refunds == counts_before.refunds
        assert not list(journal.verify())
        assert len(list(Path(folder).glob("*.segment"))) == 1
        journal.close()
        reader.close()


def _fill_journal(folder: Path, writers: int = 3) -> State:
    """Write answers, superseded ones, a quarantined one, attempts and refunds to several
    segments; return the state that a reader then sees.
    """
    for number in range(writers):
        journal = SegmentJournal(str(folder))
        for key in ("a", "b", "c"):
            journal.attempt(key, 0.01)
            journal.put(key, AnswerRecord(b"%d %s" % (number, key.encode() * 50)))
        journal.refund("c", 0.01)
        journal.close()
    journal.put("b", AnswerRecord(b"broken"))
    journal.quarantine("b", b"broken", "not JSON")
    journal.close()
    reader = SegmentJournal(str(folder))
    state = _state(reader)
    reader.close()
    assert all(state[0][key] for key in ("a", "b", "c"))
    return state


def test_compacting_drops_what_is_superseded(tmp_path: Path) -> None:
    state_before = _fill_journal(tmp_path)
    journal = SegmentJournal(str(tmp_path))
    size_before, size_after = journal.compact()
    assert size_after < size_before
    assert size_after == sum(f.stat().st_size for f in tmp_path.glob("*.segment"))
    journal.put("d", AnswerRecord(b"written on"))
    reader = SegmentJournal(str(tmp_path))
    assert reader.keys() == journal.keys() == ["a", "b", "c", "d"]
    assert reader.spent() == state_before[1]


@pytest.mark.parametrize("closed", [False, True])
def test_a_journal_in_use_is_not_compacted(tmp_path: Path, closed: bool) -> None:
    state_before = _fill_journal(tmp_path)
    other, journal = SegmentJournal(str(tmp_path)), SegmentJournal(str(tmp_path))
    if closed:
        other.close()
        journal.compact()
    else:
        with pytest.raises(InputError, match="in use"):
            journal.compact()
        other.put("x", AnswerRecord(b"still written"))
        journal.refresh()
        assert journal.get("x") is not None
        journal.put("y", AnswerRecord(b"too"))
    reader = SegmentJournal(str(tmp_path))
    recorded = [key for key in "abcxy" if reader.get(key) is not None]
    assert recorded == list("abc" if closed else "abcxy")
    assert SegmentJournal(str(tmp_path)).spent() == state_before[1]


def test_a_journal_used_by_another_process_is_not_compacted(tmp_path: Path) -> None:
    process = start_journal_writer(str(tmp_path))
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
    journal.put("a", AnswerRecord(b"1"))
    journal.close()
    SegmentJournal(str(tmp_path)).compact()
    journal.put("b", AnswerRecord(b"2"))
    reader = SegmentJournal(str(tmp_path))
    assert reader.get("a") is not None
    assert reader.get("b") is not None
    with pytest.raises(InputError, match="in use"):
        reader.compact()


def test_without_locks_nothing_is_compacted_but_all_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state_before = _fill_journal(tmp_path)
    reader = SegmentJournal(str(tmp_path))
    reader.close()
    reader.refresh()
    SegmentJournal(str(tmp_path)).compact()
    assert _state(reader) == state_before, "the reader's files were removed meanwhile"

    def no_locks(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", no_locks)
    journal = SegmentJournal(str(tmp_path))
    assert _state(journal) == state_before
    with pytest.raises(InputError, match="keeps no locks"):
        journal.compact()


KILLED_AT = (
    "os.fsync",
    "os.replace",
    "os.remove",
    "os.path.getsize",
    "coin_ray.cloud.journal.segments.encode_record",
)
"""Functions at whose calls the compacting process is killed."""


def _kill_compacting(folder: Path, step: int) -> bool:
    """Compact in a child that is killed at the ``step``-th call of these functions;
    return whether that came before its end.
    """
    child = os.fork()
    if child == 0:
        count = 0

        def counted(function: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **keywords: object) -> object:
                nonlocal count
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **keywords)

            return call

        with pytest.MonkeyPatch.context() as patch:
            journal = SegmentJournal(str(folder))
            for name in KILLED_AT:
                owner, _, attribute = name.rpartition(".")
                module = {"os": os, "os.path": os.path}.get(owner, segments)
                patch.setattr(module, attribute, counted(getattr(module, attribute)))
            journal.compact()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_step_nothing_is_lost_or_counted_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stride: int
) -> None:
    # a killed process loses nothing it has written, synchronised or not
    monkeypatch.setattr(os, "fsync", lambda _: None)
    state_before, step = _fill_journal(tmp_path), 1
    while _kill_compacting(tmp_path, step):
        reader = SegmentJournal(str(tmp_path))
        assert _state(reader) == state_before, step
        reader.close()
        if step % 5 == 0:  # and written on, in the middle of it
            writer = SegmentJournal(str(tmp_path))
            writer.attempt("z", 0.25)
            writer.close()
            records, (calls, usd) = state_before
            state_before = (records, (calls + 1, round(usd + 0.25, 6)))
        step += stride
    assert step > 20
    assert _state(SegmentJournal(str(tmp_path))) == state_before
    assert not list(tmp_path.glob("*.tmp"))
    assert len(list(tmp_path.glob("*.segment"))) == 1


def test_segments_left_behind_by_a_killed_compaction_do_not_count(
    tmp_path: Path,
) -> None:
    state_before = _fill_journal(tmp_path)
    segment_bytes = {file: file.read_bytes() for file in tmp_path.glob("*.segment")}
    journal = SegmentJournal(str(tmp_path))
    journal.compact()
    journal.close()
    for file, stored in segment_bytes.items():
        file.write_bytes(stored)
    reader = SegmentJournal(str(tmp_path))
    assert _state(reader) == state_before
    reader.compact()
    assert _state(reader) == state_before
    assert len(list(tmp_path.glob("*.segment"))) == 1


@pytest.mark.parametrize("position", [20, -20])
def test_one_damaged_record_does_not_lose_the_sums(
    tmp_path: Path, position: int
) -> None:
    state_before = _fill_journal(tmp_path)
    segment_bytes = {file: file.read_bytes() for file in tmp_path.glob("*.segment")}
    SegmentJournal(str(tmp_path)).compact()
    damaged = bytearray(_only_segment(tmp_path).read_bytes())
    damaged[position] ^= 1
    _only_segment(tmp_path).write_bytes(damaged)
    for file, original in segment_bytes.items():
        file.write_bytes(original)
    assert _state(SegmentJournal(str(tmp_path))) == state_before


def test_a_full_disk_leaves_the_journal_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state_before = _fill_journal(tmp_path)
    files = sorted(os.listdir(tmp_path))
    journal = SegmentJournal(str(tmp_path))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            journal.compact()
    assert sorted(os.listdir(tmp_path)) == files
    assert _state(journal) == state_before


def test_a_writer_unnoticed_by_the_lock_stops_the_compaction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state_before = _fill_journal(tmp_path)
    journal = SegmentJournal(str(tmp_path))
    live = journal._current_records

    def while_another_writes() -> Iterator[object]:
        yield from live()
        with _only_segment(tmp_path).open("ab") as stream:
            stream.write(b"more")

    monkeypatch.setattr(journal, "_current_records", while_another_writes)
    with pytest.raises(InputError, match="written to while"):
        journal.compact()
    assert _state(SegmentJournal(str(tmp_path))) == state_before


@SHARED_FIXTURES
@given(
    position=st.integers(0, 10_000),
    bit=st.integers(0, 7),
    kind=st.sampled_from(["disk", "objects"]),
)
def test_every_changed_bit_is_found(
    tmp_path: Path, position: int, bit: int, kind: str
) -> None:
    journal_uri = _journal_uri(kind, tmp_path / uuid.uuid4().hex)
    journal = open_journal(journal_uri)
    journal.attempt("a", 0.01)
    journal.put("a", AnswerRecord(b"first"))
    journal.put("b", AnswerRecord(b"second"))
    journal.quarantine("b", b"second", "broken")
    assert not list(journal.verify())
    files = [f for f in storage.list_files(journal_uri) if storage.read_bytes(f)]
    stored = bytearray(b"".join(storage.read_bytes(f) for f in files))
    position %= len(stored)
    stored[position] ^= 1 << bit
    start = 0
    for file in files:
        size = len(storage.read_bytes(file))
        if start <= position < start + size:
            storage.write_bytes(file, bytes(stored[start : start + size]))
            changed, offset = file, position - start
        start += size
    (damage,) = open_journal(journal_uri).verify()
    assert damage.path.endswith(changed.rpartition("/")[2])
    assert damage.offset <= offset
    assert damage.reason


def test_a_torn_tail_and_foreign_content_are_found(tmp_path: Path) -> None:
    journal = SegmentJournal(str(tmp_path))
    journal.put("a", AnswerRecord(b"first"))
    torn_segment = _only_segment(tmp_path)
    size = torn_segment.stat().st_size
    journal.put("b", AnswerRecord(b"second"))
    torn_segment.write_bytes(torn_segment.read_bytes()[:-3])
    foreign_record = encode_record(
        {"kind": "answer", "key": "c", "digest": "0" * 16}, b"another body"
    )
    (tmp_path / "x.segment").write_bytes(
        foreign_record + encode_record({"kind": "novel"}, b"")
    )
    (tmp_path / "y.segment").touch()
    torn, foreign, unknown = journal.verify()
    assert (Path(torn.path).name, torn.offset) == (torn_segment.name, size)
    assert "last" in torn.reason
    assert (foreign.offset, unknown.offset) == (0, len(foreign_record))
    assert "not the one that was received" in foreign.reason
    assert "unknown kind" in unknown.reason
    assert SegmentJournal(str(tmp_path)).get("a") is not None


def test_objects_under_wrong_names_are_found() -> None:
    uri = f"memory://{uuid.uuid4().hex}/journal"
    journal = open_journal(uri)
    journal.put("a", AnswerRecord(b"1"))
    journal.attempt("a", 0.5)
    (answer,) = storage.list_files(storage.join(uri, "answers"))
    storage.write_bytes(
        storage.join(uri, "answers", "b-" + "0" * 16), storage.read_bytes(answer)
    )
    storage.write_bytes(
        storage.join(uri, "answers", "stray"), storage.read_bytes(answer)
    )
    storage.write_bytes(storage.join(uri, "spent", "stray"), b"")
    reopened = open_journal(uri)
    assert reopened.spent() == (1, 0.5)
    assert _bodies(reopened, ["a"]) == [b"1"]
    assert sorted(d.path.rpartition("/")[2] for d in reopened.verify()) == [
        "b-" + "0" * 16,
        "stray",
        "stray",
    ]
