"""The account of calls: what was answered, what may be billed, by run and of all runs."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from coin_ray import storage
from coin_ray.cloud.journal.base import AnswerRecord, CallAccount, Journal
from coin_ray.cloud.journal.opening import open_journal
from coin_ray.cloud.journal.record_format import encode_record
from coin_ray.cloud.journal.segments import SegmentJournal

PRICE = 0.002
FIRST, SECOND = "collect-0123456789ab", "collect-ba9876543210"
IMAGE_A, IMAGE_B = "a" * 64, "b" * 64


@pytest.fixture(params=["disk", "objects"])
def account_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    name = uuid.uuid4().hex
    return str(tmp_path / name) if request.param == "disk" else f"memory://{name}"


def _ask(journal: Journal, key: str, body: bytes = b"{}", image_id: str = "") -> None:
    journal.attempt(key, PRICE, image_id=image_id)
    journal.put(key, AnswerRecord(body))


def _account(account_uri: str, run: str | None = None) -> CallAccount:
    """Read the account as another process does."""
    return open_journal(account_uri).account(run)


def test_a_killed_process_leaves_the_calls_that_may_be_billed(account_uri: str) -> None:
    killed = open_journal(account_uri, FIRST)
    _ask(killed, "k1", image_id=IMAGE_A)
    killed.attempt("k2", PRICE, image_id=IMAGE_B)
    assert killed.account() == _account(account_uri)
    assert _account(account_uri) == CallAccount(2, 2 * PRICE, ("b" * 16,))
    resumed = open_journal(account_uri, FIRST)
    _ask(resumed, "k2", image_id=IMAGE_B)
    account = _account(account_uri, FIRST)
    assert (account.calls, account.answered, account.unanswered) == (3, 2, 1)
    assert account.usd == pytest.approx(3 * PRICE)
    assert account.unanswered_images == ("b" * 16,)
    assert open_journal(account_uri).contents().unanswered == 1


def test_runs_of_a_root_are_told_apart_and_add_up(account_uri: str) -> None:
    first, second = open_journal(account_uri, FIRST), open_journal(account_uri, SECOND)
    for number in range(3):
        _ask(first, f"first {number}")
    _ask(second, "second")
    second.attempt("lost", PRICE)
    _ask(open_journal(account_uri), "of no run")
    counts = {
        run: (account.answered, account.unanswered)
        for run in (FIRST, SECOND, "collect-other", None)
        for account in [_account(account_uri, run)]
    }
    assert counts == {
        FIRST: (3, 0),
        SECOND: (1, 1),
        "collect-other": (0, 0),
        None: (5, 1),
    }
    assert _account(account_uri).usd == pytest.approx(
        open_journal(account_uri).spent()[1]
    )


def test_a_refused_call_is_no_call_and_one_without_a_reply_stays(
    account_uri: str,
) -> None:
    journal = open_journal(account_uri, FIRST)
    journal.attempt("k", PRICE)
    journal.refund("k", PRICE)
    assert _account(account_uri, FIRST) == CallAccount(0, 0.0)
    journal.attempt("k", PRICE)  # the connection breaks: billed or not, nobody knows
    _ask(journal, "k")
    account = _account(account_uri, FIRST)
    assert (account.answered, account.unanswered) == (1, 1)
    _ask(journal, "broken", b"no JSON")
    journal.quarantine("broken", b"no JSON", "broken")
    assert _account(account_uri, FIRST).answered == 2, "a reply of no use is a reply"


def test_a_task_answers_its_call_and_its_result_answers_no_other(
    account_uri: str,
) -> None:
    open_journal(account_uri, FIRST).attempt("k", PRICE, image_id=IMAGE_A)
    journal = open_journal(account_uri, FIRST)
    journal.attempt("k", PRICE)
    journal.put("k.task", AnswerRecord(b"task 7"))
    journal.put("k", AnswerRecord(b"{}"))
    open_journal(account_uri, FIRST).put("k", AnswerRecord(b"again"))
    assert _account(account_uri, FIRST) == CallAccount(2, 2 * PRICE, ("a" * 16,))


def test_an_answer_names_the_run_that_paid_for_it(account_uri: str) -> None:
    _ask(open_journal(account_uri, FIRST), "k")
    journal = open_journal(account_uri, SECOND)
    record = journal.get("k")
    assert record is not None
    assert record.run == FIRST
    journal.put("copy", record)
    copied = open_journal(account_uri).get("copy")
    assert copied is not None
    assert copied.run == FIRST


def test_dropped_answers_were_answers(account_uri: str) -> None:
    journal = open_journal(account_uri, FIRST)
    _ask(journal, "k")
    journal.drop("k")
    assert _account(account_uri, FIRST) == CallAccount(1, PRICE)


def test_compacting_keeps_the_account(tmp_path: Path) -> None:
    journal = SegmentJournal(str(tmp_path), FIRST)
    for number in range(4):
        _ask(journal, f"k{number % 3}")
    journal.attempt("lost", PRICE, image_id=IMAGE_A)
    journal.attempt("refused", PRICE)
    journal.refund("refused", PRICE)
    before = [journal.account(run) for run in (FIRST, SECOND, None)]
    for _ in range(2):
        journal.compact()
        reader = SegmentJournal(str(tmp_path))
        assert [reader.account(run) for run in (FIRST, SECOND, None)] == before
        reader.close()
    assert before[0] == CallAccount(5, 5 * PRICE, ("a" * 16,))


def test_calls_of_older_versions_count_as_answered(tmp_path: Path) -> None:
    head = {"kind": "attempt", "key": "k", "calls": 1, "micro_usd": 2000}
    (tmp_path / "ff00.segment").write_bytes(encode_record(head, b""))
    account_uri = f"memory://{uuid.uuid4().hex}"
    for name in ("k0_1_2000", "k1_1_2000_1700000000_ab"):
        storage.write_bytes(storage.join(account_uri, "spent", name), b"")
    assert _account(str(tmp_path)) == CallAccount(1, PRICE)
    assert _account(account_uri) == CallAccount(2, 2 * PRICE)
