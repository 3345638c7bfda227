"""The journal's disk or object store goes away while a service answers: no answer is
lost, no image is asked again, no deadline passes."""

from __future__ import annotations

import asyncio
import errno
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from coin_ray import storage
from coin_ray.cloud.accounts import governor_limits
from coin_ray.cloud.answer import Answer
from coin_ray.cloud.client import CloudClient
from coin_ray.cloud.governor import Governor, LocalGovernor
from coin_ray.cloud.journal import object_store
from coin_ray.cloud.journal.base import Journal
from coin_ray.cloud.journal.opening import open_journal
from coin_ray.config import Cloud
from coin_ray.errors import StorageUnavailable

from .conftest import CLASSES, URL, ok_response, solid_image

IMAGES = 6
DEADLINE = 0.2
OUTAGE = 0.6
"""Longer than the deadline of a call."""


class Disk:
    """Fails every write from the ``first``-th on, for ``seconds``."""

    def __init__(self, first: int, seconds: float) -> None:
        self.first = first
        self.seconds = seconds
        self.writes = 0
        self.back_at: float | None = None

    def check(self) -> None:
        self.writes += 1
        if self.writes < self.first:
            return
        if self.back_at is None:
            self.back_at = time.monotonic() + self.seconds
        if time.monotonic() < self.back_at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))


def _break(disk: Disk, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "disk":
        write = os.write

        def write_or_fail(file: int, content: bytes) -> int:
            if os.fstat(file).st_size >= 0 and _is_segment(file):
                disk.check()
            return write(file, content)

        monkeypatch.setattr(os, "write", write_or_fail)
        return

    def write_bytes(uri: str, content: bytes) -> None:
        def write_object() -> None:
            disk.check()
            stored(uri, content)

        storage.wait_for_storage(write_object, uri)

    stored = storage.write_bytes
    monkeypatch.setattr(object_store.storage, "write_bytes", write_bytes)


def _is_segment(file: int) -> bool:
    return os.readlink(f"/proc/self/fd/{file}").endswith(".segment")


@pytest.fixture(params=["disk", "objects"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def ask(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Disk], tuple[list[Answer], Journal, int]]:
    """Ask about the images at once; return answers, journal, and requests received."""
    monkeypatch.setattr(storage, "FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(storage, "LONGEST_PAUSE_SECONDS", 0.05)
    uri = str(tmp_path) if kind == "disk" else f"memory://{uuid.uuid4().hex}"
    requests: list[httpx.Request] = []

    async def reply(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        await asyncio.sleep(0.01)
        return ok_response()

    async def ask_all(journal: Journal) -> list[Answer]:
        config = Cloud(url=URL, rate=1000.0, deadline=DEADLINE, attempts=2)
        governor = LocalGovernor(Governor(governor_limits(config)))
        transport = httpx.MockTransport(reply)
        client = CloudClient(
            config, CLASSES, URL, journal, governor, transport=transport
        )
        answers = await asyncio.gather(
            *(client.answer(solid_image(seed)) for seed in range(IMAGES))
        )
        await client.aclose()
        return list(answers)

    def ask(disk: Disk) -> tuple[list[Answer], Journal, int]:
        with monkeypatch.context() as patch:
            _break(disk, kind, patch)
            answers = asyncio.run(ask_all(open_journal(uri, "collect-1")))
        return answers, open_journal(uri), len(requests)

    return ask


@pytest.mark.parametrize("first_write", [1, 2, 5, 8])  # answers share writes
def test_no_answer_is_lost_or_asked_again(
    first_write: int,
    ask: Callable[[Disk], tuple[list[Answer], Journal, int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    start = time.monotonic()
    answers, journal, requests = ask(Disk(first_write, OUTAGE))
    assert time.monotonic() - start > OUTAGE
    assert [answer.status for answer in answers] == ["ok"] * IMAGES
    assert [answer.calls for answer in answers] == [1] * IMAGES
    assert requests == IMAGES
    account = journal.account()
    assert (account.answered, account.unanswered) == (IMAGES, 0)
    assert len(journal.keys()) == IMAGES
    assert capsys.readouterr().err.count("can't be reached") == 1


def test_storage_that_stays_away_ends_the_calls(
    ask: Callable[[Disk], tuple[list[Answer], Journal, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(storage, "_patience", 0.2)
    with pytest.raises(StorageUnavailable):
        ask(Disk(3, 60.0))
