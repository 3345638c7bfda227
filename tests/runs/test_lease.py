"""A root belongs to one run at a time, on a disk and on an object store."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from coin_ray import storage
from coin_ray.errors import RootInUse
from coin_ray.runs import lease
from coin_ray.runs.lease import SILENT_SECONDS, Claim, hold_root

HOLDER = """
import sys, time
from coin_ray.runs.lease import hold_root
with hold_root(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other_process(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the root ``tmp_path``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture
def store() -> str:
    """A root on a store without locks."""
    return f"memory:///lease-{time.monotonic_ns()}"


def _write_claim(root: str, claim: Claim) -> str:
    uri = storage.join(root, "lease", f"{claim.token}.json")
    storage.write_json(uri, asdict(claim))
    return uri


def _claims(root: str) -> list[str]:
    return storage.list_files(storage.join(root, "lease"), ".json")


def test_the_second_process_is_refused_and_a_kill_hands_the_root_over(
    tmp_path: Path, other_process: subprocess.Popen[str]
) -> None:
    with pytest.raises(RootInUse) as refusal, hold_root(str(tmp_path)):
        pytest.fail("both hold the root")
    message = str(refusal.value)
    assert f"process {other_process.pid} on " in message
    assert "since 20" in message
    assert "--root" in message
    assert refusal.value.exit_code == 2
    other_process.send_signal(signal.SIGKILL)
    # the process stays a zombie until ``wait``: its lock is free all the same
    give_up_at = time.monotonic() + 10
    while True:
        try:
            with hold_root(str(tmp_path)):
                assert len(_claims(str(tmp_path))) == 1
            break
        except RootInUse:
            assert time.monotonic() < give_up_at
    assert not _claims(str(tmp_path))


@pytest.mark.parametrize("kind", ["disk", "store"])
def test_a_process_holds_a_root_once_and_frees_it_after_an_error(
    kind: str, tmp_path: Path, store: str
) -> None:
    root = str(tmp_path) if kind == "disk" else store

    def hold_twice_and_fail() -> None:
        with hold_root(root):
            with pytest.raises(RootInUse), hold_root(f"{root}/"):
                pytest.fail("the process holds the root twice")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        hold_twice_and_fail()
    with hold_root(root):
        assert len(_claims(root)) == 1
    assert not _claims(root)


ELSEWHERE = {"machine": "another machine", "host": "far-away"}


@pytest.mark.parametrize(
    ("changes", "is_live"),
    [
        pytest.param({}, True, id="this machine, the process lives"),
        pytest.param({"pid": 2**22 + 1}, False, id="this machine, no such process"),
        pytest.param({"process_start": 1.0}, False, id="another process, same number"),
        pytest.param(ELSEWHERE, True, id="another machine, renewed now"),
        pytest.param(
            {**ELSEWHERE, "renewed": time.time() - SILENT_SECONDS - 1},
            False,
            id="another machine, silent",
        ),
    ],
)
def test_claims_on_a_store_without_locks(
    changes: dict[str, object], is_live: bool, store: str
) -> None:
    claim = replace(Claim.of_this_process(), **changes)  # type: ignore[arg-type]
    uri = _write_claim(store, claim)
    if is_live:
        with pytest.raises(RootInUse, match=claim.host), hold_root(store):
            pytest.fail("the root has a live claim")
        assert _claims(store) == [uri]
    else:
        with hold_root(store):
            assert uri not in _claims(store)


def test_a_claim_of_another_machine_counts_on_a_shared_disk(tmp_path: Path) -> None:
    claim = replace(Claim.of_this_process(), machine="another machine")
    _write_claim(str(tmp_path), claim)
    with (
        pytest.raises(RootInUse, match=r"last seen \d+ s ago"),
        hold_root(str(tmp_path)),
    ):
        pytest.fail("the root has a live claim")


def test_a_claim_is_renewed(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.01)
    with hold_root(store):
        (uri,) = _claims(store)
        first = storage.read_json(uri)
        give_up_at = time.monotonic() + 10
        while storage.read_json(uri)["renewed"] == first["renewed"]:
            assert time.monotonic() < give_up_at
    assert first["since"] == first["renewed"]


def test_two_that_begin_at_the_same_moment_do_not_both_hold_the_root(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sees the claim of the other only after it has written its own."""
    monkeypatch.setattr(lease, "RACE_PAUSE_SECONDS", 0.0)
    rival = replace(Claim.of_this_process(), machine="another machine")
    list_claims = lease._other_claims
    calls = iter(range(100))

    def list_with_late_rival(root: str, claim: Claim | None) -> list[Claim]:
        if next(calls) == 1:
            _write_claim(root, rival)
        return list_claims(root, claim)

    monkeypatch.setattr(lease, "_other_claims", list_with_late_rival)
    with pytest.raises(RootInUse), hold_root(store):
        pytest.fail("both hold the root")
    assert [storage.read_json(uri)["token"] for uri in _claims(store)] == [rival.token]


def test_a_password_in_the_command_is_not_written(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["coin-ray", "--x", "https://me:word@host/a"])
    with hold_root(store):
        (uri,) = _claims(store)
        assert "word" not in json.dumps(storage.read_json(uri))
        assert storage.read_json(uri)["command"] == "coin-ray --x https://host/a"
