from __future__ import annotations

import asyncio
import json
import logging
import traceback
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from coin_ray.cloud import client as client_module
from coin_ray.cloud.client import Answer, CloudClient
from coin_ray.cloud.limiter import LocalGovernor
from coin_ray.config import Cloud
from coin_ray.errors import (
    AuthError,
    BadRequest,
    BudgetExhausted,
    CloudError,
    CloudUnreachable,
    ConfigError,
    QuotaExhausted,
)

from .conftest import CLASSES, Bench, Reply, element, good, picture, status

Build = Callable[..., Bench]
TOKEN = "sk-live-0123456789abcdef"


def ask(bench: Bench, *pictures: int) -> list[Answer]:
    async def run() -> list[Answer]:
        return list(await asyncio.gather(*(bench.client.answer(picture(seed)) for seed in pictures or (0,))))

    return asyncio.run(run())


def test_an_answer_and_its_request(bench: Build) -> None:
    subject = bench(good(element("dog", 0.4)))
    (answer,) = ask(subject)
    assert (answer.status, answer.attempts, answer.calls) == ("ok", 1, 1)
    assert answer.raw is not None
    assert answer.raw.class_scores.argmax() == CLASSES.index("dog")
    (request,) = subject.service.requests
    assert str(request.url) == "https://detector.example.com/api/v1/detect"
    assert request.headers["idempotency-key"] == subject.client.key(picture())
    assert request.headers["user-agent"].startswith("coin_ray/")
    assert "authorization" not in request.headers
    assert json.loads(request.content)["classes"] == list(CLASSES)


def test_a_proved_empty(bench: Build) -> None:
    subject = bench(lambda _: httpx.Response(200, json={"image": {"w": 60, "h": 40}, "detections": []}))
    assert ask(subject)[0].status == "empty"
    (again,) = ask(subject)
    assert (again.status, again.calls) == ("cached", 0)
    assert again.raw is not None
    assert len(again.raw) == 0


def test_nothing_is_paid_twice(bench: Build) -> None:
    first = bench(good(), usd_per_call=0.01)
    paid = ask(first, 1, 2, 3)
    assert sum(a.cost_usd for a in paid) == pytest.approx(0.03)
    second = bench(status(500), usd_per_call=0.01)
    assert [a.status for a in ask(second, 1, 2, 3)] == ["cached"] * 3
    assert second.service.requests == []
    assert second.journal.spent() == (3, pytest.approx(0.03))


def test_the_same_image_at_once_is_one_call(bench: Build) -> None:
    subject = bench(good())
    answers = ask(subject, *[5] * 20)
    assert len(subject.service.requests) == 1
    assert sorted(a.status for a in answers) == ["cached"] * 19 + ["ok"]


RETRIED: list[tuple[Reply, bool]] = [
    (status(500), True),
    (status(502), True),
    (status(408), False),
    (status(429), False),
    (httpx.ConnectError("refused"), False),
    (httpx.ReadTimeout("slow"), True),
    (httpx.ReadError("reset"), True),
    (httpx.RemoteProtocolError("closed early"), True),
    (httpx.Response(200, content=b'{"image": {"w": 60,'), True),
    (httpx.Response(200, headers={"content-type": "text/html"}, content=b"<html>"), True),
    (httpx.Response(204), True),
]


@pytest.mark.parametrize(("reply", "billed"), RETRIED, ids=lambda v: type(v).__name__)
def test_retried_then_answered(bench: Build, reply: Reply, billed: bool) -> None:
    subject = bench(reply, good())
    (answer,) = ask(subject)
    assert (answer.status, answer.attempts, answer.calls) == ("ok", 2, 1 + billed)
    assert subject.journal.spent()[0] == 1 + billed
    assert subject.governor.stats().calls == 1 + billed
    assert subject.governor.stats().in_flight == 0
    keys = {r.headers["idempotency-key"] for r in subject.service.requests}
    assert len(keys) == 1


@pytest.mark.parametrize("reply", [status(500), status(429), httpx.ReadTimeout("slow")])
def test_attempts_run_out(bench: Build, reply: Reply) -> None:
    subject = bench(reply, attempts=4)
    (answer,) = ask(subject)
    assert (answer.status, answer.attempts, answer.raw) == ("error", 4, None)
    assert len(subject.service.requests) == 4
    assert subject.time.slept == pytest.approx([0.5, 1.0, 2.0])


def test_malformed_answers_are_tried_twice_and_quarantined(bench: Build) -> None:
    subject = bench(httpx.Response(200, json=[]), attempts=6)
    (answer,) = ask(subject)
    assert (answer.status, answer.attempts) == ("error", 2)
    assert "ProtocolError" in str(answer.error)
    assert subject.journal.get(subject.client.key(picture())) is None
    assert ask(bench(good()))[0].status == "ok"


@pytest.mark.parametrize("code", [413, 415, 451])
def test_rejected_images_are_not_retried(bench: Build, code: int) -> None:
    subject = bench(status(code, title="no"))
    (answer,) = ask(subject)
    assert (answer.status, answer.attempts, answer.calls) == ("error", 1, 0)
    assert str(code) in str(answer.error)


STOPS = [(401, AuthError), (403, AuthError), (402, QuotaExhausted), (400, BadRequest), (422, BadRequest), (307, BadRequest)]


@pytest.mark.parametrize(("code", "kind"), STOPS)
def test_errors_that_stop_the_run_cost_one_request(bench: Build, code: int, kind: type[CloudError]) -> None:
    subject = bench(status(code, {"location": "http://elsewhere.example.com"}))
    with pytest.raises(kind):
        ask(subject)
    assert len(subject.service.requests) == 1
    assert subject.journal.spent()[0] == 0


WAITS = [("2", 2.5), ("0", 0.5), ("-5", 0.5), ("abc", 0.5), ("99999", None), ("Wed, 21 Oct 2026 07:28:10 GMT", 10.5)]


@pytest.mark.parametrize(("value", "slept"), WAITS)
def test_retry_after_is_waited_out(bench: Build, value: str, slept: float | None) -> None:
    hint = status(429, {"retry-after": value, "date": "Wed, 21 Oct 2026 07:28:00 GMT"})
    subject = bench(hint, good())
    (answer,) = ask(subject)
    if slept is None:  # longer than the deadline
        assert answer.status == "error"
        assert "DeadlineExceeded" in str(answer.error)
        assert subject.governor.reserve(0).wait == pytest.approx(120, abs=1)
    else:
        assert answer.status == "ok"
        assert subject.time.slept[0] == pytest.approx(slept)


def test_a_throttled_call_slows_all_callers(bench: Build) -> None:
    subject = bench(status(429, {"retry-after": "3"}), good(), in_flight=1, deadline=1e6)
    answers = ask(subject, *range(20))
    assert all(a.status == "ok" for a in answers)
    assert len(subject.service.requests) == 21
    assert subject.governor.stats().throttled == 1


def test_backoff_is_capped_and_jittered(bench: Build) -> None:
    subject = bench(status(500), attempts=9, deadline=1000.0)
    ask(subject)
    assert subject.time.slept == pytest.approx([0.5, 1, 2, 4, 8, 16, 20, 20])


def test_deadline_ends_a_stalled_call_which_stays_spent(bench: Build) -> None:
    async def stall(request: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError

    subject = bench(good(), deadline=0.05)
    subject.client._http = httpx.AsyncClient(transport=httpx.MockTransport(stall))
    (answer,) = ask(subject)
    assert answer.status == "error"
    assert "DeadlineExceeded" in str(answer.error)
    assert (answer.calls, subject.journal.spent()[0], subject.governor.stats().calls) == (1, 1, 1)
    assert subject.governor.stats().in_flight == 0


class Endless(httpx.AsyncByteStream):
    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            yield b" " * 1000


def test_bodies_are_capped(bench: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "BODY_MAX", 10_000)
    subject = bench(good())

    async def flood(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=Endless())

    subject.client._http = httpx.AsyncClient(transport=httpx.MockTransport(flood))
    (answer,) = ask(subject)
    assert answer.status == "error"
    assert "longer than" in str(answer.error)


@pytest.mark.parametrize("limit", [{"max_calls": 10}, {"max_usd": 0.1}])
def test_budget_is_exact_with_many_in_flight_and_after_reopening(bench: Build, limit: dict[str, Any]) -> None:
    first = bench(good(), in_flight=16, usd_per_call=0.01, skip_over_budget=True, **limit)
    states = [a.status for a in ask(first, *range(40))]
    assert (states.count("ok"), states.count("skipped_budget")) == (10, 30)
    assert len(first.service.requests) == 10
    second = bench(good(), usd_per_call=0.01, **limit)
    with pytest.raises(BudgetExhausted, match="answers so far are kept"):
        ask(second, 99)
    assert second.service.requests == []


def test_a_budget_counts_attempts_of_a_killed_run(bench: Build) -> None:
    killed = bench(good(), max_calls=2)
    killed.journal.attempt("some image", 0)
    subject = bench(good(), max_calls=2, skip_over_budget=True)
    states = sorted(a.status for a in ask(subject, 1, 2, 3))
    assert states == ["ok", "skipped_budget", "skipped_budget"]


def test_journalled_images_come_through_over_budget(bench: Build) -> None:
    ask(bench(good(), max_calls=1), 1)
    assert ask(bench(good(), max_calls=1), 1)[0].status == "cached"


def test_calls_under_way_are_limited(bench: Build) -> None:
    now = most = 0

    async def count(request: httpx.Request) -> httpx.Response:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.001)
        now -= 1
        return good()

    subject = bench(good(), in_flight=3, deadline=1e6)
    subject.client._http = httpx.AsyncClient(transport=httpx.MockTransport(count))
    ask(subject, *range(20))
    assert most == 3


def test_unreachable_from_the_start(bench: Build) -> None:
    subject = bench(httpx.ConnectError("refused"))
    with pytest.raises(CloudUnreachable, match=r"detector\.example\.com.*cloud\.url"):
        ask(subject)
    with pytest.raises(CloudUnreachable):
        asyncio.run(bench(httpx.ConnectError("refused")).client.check())


def test_a_service_that_dies_stops_the_run(bench: Build) -> None:
    subject = bench(good(), httpx.ConnectError("refused"), in_flight=4)
    with pytest.raises(CloudUnreachable, match="breaker"):
        ask(subject, *range(60))
    assert len(subject.service.requests) < 60


HEALTH = [(200, None), (404, None), (500, None), (401, AuthError), (403, AuthError), (301, BadRequest)]


@pytest.mark.parametrize(("code", "kind"), HEALTH)
def test_check(bench: Build, code: int, kind: type[CloudError] | None) -> None:
    subject = bench(status(code))
    if kind is None:
        asyncio.run(subject.client.check())
    else:
        with pytest.raises(kind):
            asyncio.run(subject.client.check())
    assert [str(r.url.path) for r in subject.service.requests] == ["/api/health"]
    assert subject.journal.spent() == (0, 0)


URLS = ["", "detector.example.com", "ftp://host", "https://user:pw@host", "https://host/?key=secret", "http://host"]


@pytest.mark.parametrize("url", URLS)
def test_unusable_addresses(bench: Build, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("CLOUD_TOKEN", TOKEN)
    with pytest.raises(ConfigError) as caught:
        bench(good(), url=url or "/", token_env="CLOUD_TOKEN")
    assert "secret" not in str(caught.value)
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize("value", [None, "", "  ", "two\nlines-secret", "schlüssel-secret"])
def test_missing_or_unusable_token(bench: Build, monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("CLOUD_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("CLOUD_TOKEN", value)
    with pytest.raises(ConfigError, match="CLOUD_TOKEN") as caught:
        bench(good(), token_env="CLOUD_TOKEN")
    assert "secret" not in str(caught.value)


ECHOES: list[Reply] = [
    good(),
    status(401, title="bad", detail=f"token {TOKEN} is wrong"),
    status(500, detail=TOKEN),
    httpx.Response(200, content=f'{{"echo": "{TOKEN}"}}'.encode()),
    httpx.ConnectError(f"no {TOKEN}"),
    httpx.ReadError(TOKEN),
    httpx.LocalProtocolError(TOKEN),
]


@pytest.mark.parametrize("reply", ECHOES, ids=lambda r: type(r).__name__)
def test_the_token_is_sent_and_shown_nowhere(
    bench: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reply: Reply
) -> None:
    monkeypatch.setenv("CLOUD_TOKEN", TOKEN)
    caplog.set_level(logging.DEBUG)
    subject = bench(reply, token_env="CLOUD_TOKEN", attempts=2)
    shown = [repr(subject.client)]
    try:
        shown += [repr(a) for a in ask(subject)]
    except CloudError as error:
        shown += [repr(error), *traceback.format_exception(error)]
    assert subject.service.requests[0].headers["authorization"] == f"Bearer {TOKEN}"
    shown += [caplog.text, *(p.read_bytes().decode("latin-1") for p in tmp_path.rglob("*") if p.is_file())]
    assert not any(TOKEN in text for text in shown)
    assert TOKEN not in str(subject.service.requests[0].url)


def test_request_images_are_not_journalled(bench: Build, tmp_path: Path) -> None:
    ask(bench(good()))
    stored = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert picture().data[:200] not in stored
    assert len(stored) < len(picture().data) + 1200


def test_a_local_server_is_the_same_on_another_port(bench: Build) -> None:
    subject = bench(good())
    governor = LocalGovernor(subject.governor)
    addresses = ("http://127.0.0.1:1111", "http://127.0.0.1:2222")
    clients = [CloudClient(Cloud(serve="demo"), CLASSES, url, subject.journal, governor) for url in addresses]
    assert clients[0].key(picture()) == clients[1].key(picture()) != subject.client.key(picture())
