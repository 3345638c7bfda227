from __future__ import annotations

import asyncio
import json
import logging
import time
import traceback
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from coin_ray.cloud.adapters.reference import ReferenceAdapter
from coin_ray.cloud.answer import Answer
from coin_ray.cloud.client import POLL_CAP, TASK_SECONDS, CloudClient, account_name, governor_limits
from coin_ray.cloud.governor import Governor, LocalGovernor
from coin_ray.cloud.http import connections
from coin_ray.cloud.journal.journal import TASK
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

from .conftest import (
    CLASSES,
    URL,
    ClientHarness,
    InBodyAdapter,
    Reply,
    TaskAdapter,
    detection_json,
    ok_response,
    solid_image,
    status_response,
)

HarnessBuilder = Callable[..., ClientHarness]
TOKEN = "sk-live-0123456789abcdef"


def ask(build_harness: ClientHarness, *pictures: int) -> list[Answer]:
    async def run() -> list[Answer]:
        return list(
            await asyncio.gather(
                *(build_harness.client.answer(solid_image(seed)) for seed in pictures or (0,))
            )
        )

    return asyncio.run(run())


def test_an_answer_and_its_request(build_harness: HarnessBuilder) -> None:
    subject = build_harness(ok_response(detection_json("dog", 0.4)))
    (answer,) = ask(subject)
    assert (answer.status, answer.attempts, answer.calls) == ("ok", 1, 1)
    assert answer.raw is not None
    assert answer.raw.class_scores.argmax() == CLASSES.index("dog")
    (request,) = subject.service.requests
    assert str(request.url) == "https://detector.example.com/api/v1/detect"
    assert request.headers["idempotency-key"] == subject.client.key(solid_image())
    assert request.headers["user-agent"].startswith("coin_ray/")
    assert "authorization" not in request.headers
    assert json.loads(request.content)["classes"] == list(CLASSES)


def test_a_proved_empty(build_harness: HarnessBuilder) -> None:
    subject = build_harness(
        lambda _: httpx.Response(
            200, json={"image": {"w": 60, "h": 40}, "detections": []}
        )
    )
    assert ask(subject)[0].status == "empty"
    (again,) = ask(subject)
    assert (again.status, again.calls) == ("cached", 0)
    assert again.raw is not None
    assert len(again.raw) == 0


def test_nothing_is_paid_twice(build_harness: HarnessBuilder) -> None:
    first = build_harness(ok_response(), usd_per_call=0.01)
    paid = ask(first, 1, 2, 3)
    assert sum(a.cost_usd for a in paid) == pytest.approx(0.03)
    second = build_harness(status_response(500), usd_per_call=0.01)
    assert [a.status for a in ask(second, 1, 2, 3)] == ["cached"] * 3
    assert second.service.requests == []
    assert second.journal.spent() == pytest.approx((3, 0.03))


def test_the_same_image_at_once_is_one_call(build_harness: HarnessBuilder) -> None:
    subject = build_harness(ok_response())
    answers = ask(subject, *[5] * 20)
    assert len(subject.service.requests) == 1
    assert sorted(a.status for a in answers) == ["cached"] * 19 + ["ok"]


RETRIED: list[tuple[Reply, bool]] = [
    (status_response(500), True),
    (status_response(502), True),
    (status_response(408), False),
    (status_response(429), False),
    (httpx.ConnectError("refused"), False),
    (httpx.ReadTimeout("slow"), True),
    (httpx.ReadError("reset"), True),
    (httpx.RemoteProtocolError("closed early"), True),
    (httpx.Response(200, content=b'{"image": {"w": 60,'), True),
    (
        httpx.Response(200, headers={"content-type": "text/html"}, content=b"<html>"),
        True,
    ),
    (httpx.Response(204), True),
]


@pytest.mark.parametrize(("reply", "billed"), RETRIED, ids=lambda v: type(v).__name__)
def test_retried_then_answered(build_harness: HarnessBuilder, reply: Reply, billed: bool) -> None:
    subject = build_harness(reply, ok_response())
    (answer,) = ask(subject)
    assert (answer.status, answer.attempts, answer.calls) == ("ok", 2, 1 + billed)
    assert subject.journal.spent()[0] == 1 + billed
    assert subject.governor.stats().calls == 1 + billed
    assert subject.governor.stats().in_flight == 0
    keys = {r.headers["idempotency-key"] for r in subject.service.requests}
    assert len(keys) == 1


@pytest.mark.parametrize("reply", [status_response(500), status_response(429), httpx.ReadTimeout("slow")])
def test_attempts_run_out(build_harness: HarnessBuilder, reply: Reply) -> None:
    subject = build_harness(reply, attempts=4)
    (answer,) = ask(subject)
    assert (answer.status, answer.attempts, answer.raw) == ("error", 4, None)
    assert len(subject.service.requests) == 4
    assert subject.time.slept == pytest.approx([0.5, 1.0, 2.0])


def test_malformed_answers_are_tried_twice_and_quarantined(build_harness: HarnessBuilder) -> None:
    subject = build_harness(httpx.Response(200, json=[]), attempts=6)
    (answer,) = ask(subject)
    assert (answer.status, answer.attempts) == ("error", 2)
    assert "ProtocolError" in str(answer.error)
    assert subject.journal.get(subject.client.key(solid_image())) is None
    assert ask(build_harness(ok_response()))[0].status == "ok"


@pytest.mark.parametrize("code", [413, 415, 451])
def test_rejected_images_are_not_retried(build_harness: HarnessBuilder, code: int) -> None:
    subject = build_harness(status_response(code, title="no"))
    (answer,) = ask(subject)
    assert (answer.status, answer.attempts, answer.calls) == ("error", 1, 0)
    assert str(code) in str(answer.error)


STOPS = [
    (401, AuthError),
    (403, AuthError),
    (402, QuotaExhausted),
    (400, BadRequest),
    (422, BadRequest),
    (307, BadRequest),
]


@pytest.mark.parametrize(("code", "kind"), STOPS)
def test_errors_that_stop_the_run_cost_one_request(
    build_harness: HarnessBuilder, code: int, kind: type[CloudError]
) -> None:
    subject = build_harness(status_response(code, {"location": "http://elsewhere.example.com"}))
    with pytest.raises(kind):
        ask(subject)
    assert len(subject.service.requests) == 1
    assert subject.journal.spent()[0] == 0


WAITS = [
    ("2", 2.5),
    ("0", 0.5),
    ("-5", 0.5),
    ("abc", 0.5),
    ("99999", None),
    ("Wed, 21 Oct 2026 07:28:10 GMT", 10.5),
]


@pytest.mark.parametrize(("value", "slept"), WAITS)
def test_retry_after_is_waited_out(
    build_harness: HarnessBuilder, value: str, slept: float | None
) -> None:
    hint = status_response(429, {"retry-after": value, "date": "Wed, 21 Oct 2026 07:28:00 GMT"})
    subject = build_harness(hint, ok_response())
    (answer,) = ask(subject)
    if slept is None:  # longer than the deadline
        assert answer.status == "error"
        assert "DeadlineExceeded" in str(answer.error)
        assert subject.governor.reserve(0).wait == pytest.approx(120, abs=1)
    else:
        assert answer.status == "ok"
        assert subject.time.slept[0] == pytest.approx(slept)


def test_a_throttled_call_slows_all_callers(build_harness: HarnessBuilder) -> None:
    subject = build_harness(
        status_response(429, {"retry-after": "3"}), ok_response(), in_flight=1, deadline=1e6
    )
    answers = ask(subject, *range(20))
    assert all(a.status == "ok" for a in answers)
    assert len(subject.service.requests) == 21
    assert subject.governor.stats().throttled == 1


def test_backoff_is_capped_and_jittered(build_harness: HarnessBuilder) -> None:
    subject = build_harness(status_response(500), attempts=9, deadline=1000.0)
    ask(subject)
    assert subject.time.slept == pytest.approx([0.5, 1, 2, 4, 8, 16, 20, 20])


def test_deadline_ends_a_stalled_call_which_stays_spent(build_harness: HarnessBuilder) -> None:
    async def stall(request: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError

    subject = build_harness(ok_response(), deadline=0.05)
    subject.service.handler = stall
    (answer,) = ask(subject)
    assert answer.status == "error"
    assert "DeadlineExceeded" in str(answer.error)
    assert (
        answer.calls,
        subject.journal.spent()[0],
        subject.governor.stats().calls,
    ) == (1, 1, 1)
    assert subject.governor.stats().in_flight == 0


def test_a_spent_quota_is_asked_for_once_where_another_cloud_may_answer(
    build_harness: HarnessBuilder,
) -> None:
    subject = build_harness(ok_response(), status_response(402), ok_response(), skip_over_budget=True)
    answers = [ask(subject, i)[0] for i in (0, 1, 2, 0)]
    assert [a.status for a in answers] == [
        "ok",
        "skipped_quota",
        "skipped_quota",
        "cached",
    ]
    assert [a.calls for a in answers] == [1, 0, 0, 0]
    assert len(subject.service.requests) == 2
    assert subject.governor.stats().in_flight == 0


class Endless(httpx.AsyncByteStream):
    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            yield b" " * 1000


def test_bodies_are_capped(build_harness: HarnessBuilder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "BODY_MAX", 10_000)
    subject = build_harness(ok_response())

    async def flood(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=Endless())

    subject.service.handler = flood
    (answer,) = ask(subject)
    assert answer.status == "error"
    assert "longer than" in str(answer.error)


@pytest.mark.parametrize("limit", [{"max_calls": 10}, {"max_usd": 0.1}])
def test_budget_is_exact_with_many_in_flight_and_after_reopening(
    build_harness: HarnessBuilder, limit: dict[str, Any]
) -> None:
    first = build_harness(
        ok_response(), in_flight=16, usd_per_call=0.01, skip_over_budget=True, **limit
    )
    states = [a.status for a in ask(first, *range(40))]
    assert (states.count("ok"), states.count("skipped_budget")) == (10, 30)
    assert len(first.service.requests) == 10
    second = build_harness(ok_response(), usd_per_call=0.01, **limit)
    with pytest.raises(BudgetExhausted, match="answers so far are kept"):
        ask(second, 99)
    assert second.service.requests == []


def test_a_budget_counts_attempts_of_a_killed_run(build_harness: HarnessBuilder) -> None:
    killed = build_harness(ok_response(), max_calls=2)
    killed.journal.attempt("some image", 0)
    subject = build_harness(ok_response(), max_calls=2, skip_over_budget=True)
    states = sorted(a.status for a in ask(subject, 1, 2, 3))
    assert states == ["ok", "skipped_budget", "skipped_budget"]


def test_a_day_s_calls_are_counted_over_runs(build_harness: HarnessBuilder) -> None:
    subject = build_harness(ok_response(), per_day=3)
    ask(subject, 1, 2)
    config = Cloud(url=URL, rate=1000.0, per_day=3)
    account = account_name(config, URL, ReferenceAdapter())
    later = build_harness(ok_response(), per_day=3)
    ages = [
        time.time() - start
        for start in later.journal.starts(account, time.time() - 86_400)
    ]
    assert len(ages) == 2
    later.client._governor = LocalGovernor(
        Governor(governor_limits(config), later.journal.spent(), later.time, ages)
    )
    assert ask(later, 3)[0].status == "ok"
    with pytest.raises(BudgetExhausted, match=r"cloud\.per_day=3"):
        ask(later, 4)
    assert len(later.journal.starts("another", 0)) == 0


def test_journalled_images_come_through_over_budget(build_harness: HarnessBuilder) -> None:
    ask(build_harness(ok_response(), max_calls=1), 1)
    assert ask(build_harness(ok_response(), max_calls=1), 1)[0].status == "cached"


def test_calls_under_way_are_limited(build_harness: HarnessBuilder) -> None:
    now = most = 0

    async def count(request: httpx.Request) -> httpx.Response:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.001)
        now -= 1
        return ok_response()

    subject = build_harness(ok_response(), in_flight=3, deadline=1e6)
    subject.service.handler = count
    ask(subject, *range(20))
    assert most == 3


def test_unreachable_from_the_start(build_harness: HarnessBuilder) -> None:
    subject = build_harness(httpx.ConnectError("refused"))
    with pytest.raises(CloudUnreachable, match=r"detector\.example\.com.*cloud\.url"):
        ask(subject)
    with pytest.raises(CloudUnreachable):
        asyncio.run(build_harness(httpx.ConnectError("refused")).client.check())


def test_a_service_that_dies_stops_the_run(build_harness: HarnessBuilder) -> None:
    subject = build_harness(ok_response(), httpx.ConnectError("refused"), in_flight=4)
    with pytest.raises(CloudUnreachable, match="breaker"):
        ask(subject, *range(60))
    assert len(subject.service.requests) < 60


HEALTH = [
    (200, None),
    (404, None),
    (500, None),
    (401, AuthError),
    (403, AuthError),
    (301, BadRequest),
]


@pytest.mark.parametrize(("code", "kind"), HEALTH)
def test_check(build_harness: HarnessBuilder, code: int, kind: type[CloudError] | None) -> None:
    subject = build_harness(status_response(code))
    if kind is None:
        asyncio.run(subject.client.check())
    else:
        with pytest.raises(kind):
            asyncio.run(subject.client.check())
    assert [str(r.url.path) for r in subject.service.requests] == ["/api/health"]
    assert subject.journal.spent() == (0, 0)


URLS = [
    "",
    "detector.example.com",
    "ftp://host",
    "https://user:pw@host",
    "https://host/?key=secret",
    "http://host",
]


@pytest.mark.parametrize("url", URLS)
def test_unusable_addresses(
    build_harness: HarnessBuilder, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("CLOUD_TOKEN", TOKEN)
    with pytest.raises(ConfigError) as caught:
        build_harness(ok_response(), url=url or "/", token_env="CLOUD_TOKEN")
    assert "secret" not in str(caught.value)
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize(
    "value", [None, "", "  ", "two\nlines-secret", "schlüssel-secret"]
)
def test_missing_or_unusable_token(
    build_harness: HarnessBuilder, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv("CLOUD_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("CLOUD_TOKEN", value)
    with pytest.raises(ConfigError, match="CLOUD_TOKEN") as caught:
        build_harness(ok_response(), token_env="CLOUD_TOKEN")
    assert "secret" not in str(caught.value)


ECHOES: list[Reply] = [
    ok_response(),
    status_response(401, title="bad", detail=f"token {TOKEN} is wrong"),
    status_response(500, detail=TOKEN),
    httpx.Response(200, content=f'{{"echo": "{TOKEN}"}}'.encode()),
    httpx.ConnectError(f"no {TOKEN}"),
    httpx.ReadError(TOKEN),
    httpx.LocalProtocolError(TOKEN),
]


@pytest.mark.parametrize("reply", ECHOES, ids=lambda r: type(r).__name__)
def test_the_token_is_sent_and_shown_nowhere(
    build_harness: HarnessBuilder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    reply: Reply,
) -> None:
    monkeypatch.setenv("CLOUD_TOKEN", TOKEN)
    caplog.set_level(logging.DEBUG)
    subject = build_harness(reply, token_env="CLOUD_TOKEN", attempts=2)
    shown = [repr(subject.client)]
    try:
        shown += [repr(a) for a in ask(subject)]
    except CloudError as error:
        shown += [repr(error), *traceback.format_exception(error)]
    assert subject.service.requests[0].headers["authorization"] == f"Bearer {TOKEN}"
    shown += [
        caplog.text,
        *(p.read_bytes().decode("latin-1") for p in tmp_path.rglob("*") if p.is_file()),
    ]
    assert not any(TOKEN in text for text in shown)
    assert TOKEN not in str(subject.service.requests[0].url)


def test_request_images_are_not_journalled(build_harness: HarnessBuilder, tmp_path: Path) -> None:
    ask(build_harness(ok_response()))
    stored = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert solid_image().data[:200] not in stored
    assert len(stored) < len(solid_image().data) + 1200


def test_a_local_server_is_the_same_on_another_port(build_harness: HarnessBuilder) -> None:
    subject = build_harness(ok_response())
    governor = LocalGovernor(subject.governor)
    addresses = ("http://127.0.0.1:1111", "http://127.0.0.1:2222")
    clients = [
        CloudClient(Cloud(serve="demo"), CLASSES, url, subject.journal, governor)
        for url in addresses
    ]
    assert (
        clients[0].key(solid_image())
        == clients[1].key(solid_image())
        != subject.client.key(solid_image())
    )


@pytest.mark.parametrize("serve", ["onnx", "checkpoint", "transformers"])
def test_other_weights_under_the_same_name_are_asked_anew(
    build_harness: HarnessBuilder, tmp_path: Path, serve: str
) -> None:
    subject, folder = build_harness(ok_response()), tmp_path / "model"
    governor = LocalGovernor(subject.governor)
    folder.mkdir()
    model = str(folder / "weights") if serve == "onnx" else str(folder)

    def key(weights: bytes) -> str:
        (folder / "weights").write_bytes(weights)
        config = (
            Cloud(serve=serve, onnx_models=(model,))
            if serve == "onnx"
            else Cloud(serve=serve, model=model)
        )  # type: ignore[arg-type]
        return CloudClient(
            config, CLASSES, "http://127.0.0.1:1", subject.journal, governor
        ).key(solid_image())

    keys = [key(b"first"), key(b"second"), key(b"first")]
    assert keys[0] == keys[2] != keys[1]


def body(**values: Any) -> httpx.Response:
    return httpx.Response(200, json=values)


def methods(subject: ClientHarness) -> list[str]:
    return [r.method for r in subject.service.requests]


ACCEPTED = body(task="t1")
RUNNING = body(wait=1.0)


@pytest.mark.parametrize("polls", [1, 2, 20])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_polled_until_answered(build_harness: HarnessBuilder, polls: int, asynchronous: bool) -> None:
    """Also from a service that only sometimes answers with a task."""
    subject = build_harness(
        ACCEPTED,
        *[RUNNING] * (polls - 1),
        ok_response(),
        adapter=TaskAdapter(asynchronous),
        deadline=1000.0,
        usd_per_call=0.01,
        max_calls=1,
    )
    (answer,) = ask(subject)
    assert (answer.status, answer.attempts, answer.calls, answer.cost_usd) == (
        "ok",
        1,
        1,
        0.01,
    )
    assert methods(subject) == ["POST"] + ["GET"] * polls
    assert {r.url.path for r in subject.service.requests[1:]} == {"/api/tasks/t1"}
    kept = subject.journal.contents()
    assert (kept.answers, kept.tasks, kept.quarantined) == (1, 1, not asynchronous)
    assert "idempotency-key" not in subject.service.requests[1].headers
    assert subject.journal.spent() == pytest.approx((1, 0.01))
    waits = subject.time.slept
    assert waits[:3] == pytest.approx([1.0, 1.5, 2.25][:polls])
    assert waits == sorted(waits)
    assert max(waits) <= POLL_CAP
    assert answer.latency_ms == pytest.approx(sum(waits) * 1000)
    assert (
        ask(build_harness(status_response(500), adapter=TaskAdapter(asynchronous)))[0].status == "cached"
    )


@pytest.mark.parametrize(
    ("asked", "slept"),
    [(3.0, 3.0), (0.0, 0.25), (-5.0, 0.25), (1e9, POLL_CAP), (float("nan"), 0.25)],
)
def test_a_poll_waits_as_long_as_asked_within_reason(
    build_harness: HarnessBuilder, asked: float, slept: float
) -> None:
    taken = httpx.Response(
        200, content=json.dumps({"task": "t1", "wait": asked}).encode()
    )
    subject = build_harness(taken, ok_response(), adapter=TaskAdapter())
    assert ask(subject)[0].status == "ok"
    assert subject.time.slept == [slept]


def test_a_task_that_never_ends_stays_on_record(build_harness: HarnessBuilder) -> None:
    subject = build_harness(ACCEPTED, RUNNING, adapter=TaskAdapter(), deadline=30.0)
    (answer,) = ask(subject)
    assert (answer.status, answer.calls) == ("error", 1)
    assert "DeadlineExceeded" in str(answer.error)
    assert "stays on record" in str(answer.error)
    assert methods(subject).count("POST") == 1
    assert sum(subject.time.slept) < 30
    assert subject.governor.stats().in_flight == 0
    later = build_harness(RUNNING, ok_response(), adapter=TaskAdapter())
    (answer,) = ask(later)
    assert (answer.status, answer.attempts, answer.calls) == ("ok", 0, 0)
    assert methods(later) == ["GET", "GET"]
    assert later.journal.spent()[0] == 1


class Killed(BaseException):
    pass


@pytest.mark.parametrize("asynchronous", [True, False])
def test_killed_between_the_task_and_its_first_poll(
    build_harness: HarnessBuilder, asynchronous: bool
) -> None:
    killed = build_harness(ACCEPTED, adapter=TaskAdapter(asynchronous))

    async def die(seconds: float) -> None:
        raise Killed

    killed.client._sleep = die
    with pytest.raises(Killed):
        ask(killed)
    assert methods(killed) == ["POST"]
    key = killed.client.key(solid_image())
    assert killed.journal.get(key) is None
    assert killed.journal.get(key + TASK) is not None
    later = build_harness(ok_response(), adapter=TaskAdapter(asynchronous))
    assert ask(later)[0].status == "ok"
    assert methods(later) == ["GET"]
    assert later.journal.spent()[0] == 1


@pytest.mark.parametrize(
    "gone", [status_response(404), status_response(410), body(error="busy"), body(error="paid")]
)
def test_a_lost_task_is_asked_for_anew(build_harness: HarnessBuilder, gone: httpx.Response) -> None:
    subject = build_harness(
        ACCEPTED, RUNNING, gone, body(task="t2"), ok_response(), adapter=TaskAdapter()
    )
    (answer,) = ask(subject)
    assert (answer.status, answer.attempts, answer.calls) == ("ok", 2, 2)
    assert methods(subject) == ["POST", "GET", "GET", "POST", "GET"]
    posts = [r for r in subject.service.requests if r.method == "POST"]
    assert posts[0].headers["idempotency-key"] != posts[1].headers["idempotency-key"]
    assert subject.service.requests[-1].url.path == "/api/tasks/t2"


def test_tasks_are_not_lost_for_ever(build_harness: HarnessBuilder) -> None:
    subject = build_harness(*[ACCEPTED, status_response(404)] * 20, adapter=TaskAdapter(), attempts=3)
    (answer,) = ask(subject)
    assert (answer.status, answer.attempts, answer.calls) == ("error", 3, 3)
    assert "TaskLost" in str(answer.error)


@pytest.mark.parametrize(
    "gone", [status_response(404), status_response(400), body(error="busy"), body(error="unknown")]
)
def test_a_task_of_an_earlier_run_that_is_lost(
    build_harness: HarnessBuilder, gone: httpx.Response
) -> None:
    ask(build_harness(ACCEPTED, RUNNING, adapter=TaskAdapter(), deadline=3.0))
    subject = build_harness(gone, body(task="t2"), ok_response(), adapter=TaskAdapter())
    (answer,) = ask(subject)
    assert (answer.status, answer.attempts, answer.calls) == ("ok", 1, 1)
    assert methods(subject) == ["GET", "POST", "GET"]
    assert subject.journal.spent()[0] == 2


def test_an_earlier_runs_task_and_the_call_after_it_share_the_deadline(
    build_harness: HarnessBuilder,
) -> None:
    ask(build_harness(ACCEPTED, RUNNING, adapter=TaskAdapter(), deadline=3.0))
    subject = build_harness(
        *[RUNNING] * 3,
        status_response(404),
        body(task="t2"),
        RUNNING,
        adapter=TaskAdapter(),
        deadline=10.0,
    )
    (answer,) = ask(subject)
    assert "DeadlineExceeded" in str(answer.error)
    assert methods(subject).count("POST") == 1
    assert sum(subject.time.slept) < 10


@pytest.mark.parametrize("age", [0.0, 2 * TASK_SECONDS])
def test_an_old_task_that_gives_no_result_is_given_up(build_harness: HarnessBuilder, age: float) -> None:
    ask(
        build_harness(
            ACCEPTED,
            RUNNING,
            adapter=TaskAdapter(),
            deadline=3.0,
            wall_clock=lambda: 1e9,
        )
    )
    strange = httpx.Response(200, json=[])
    subject = build_harness(
        strange,
        strange,
        ACCEPTED,
        ok_response(),
        adapter=TaskAdapter(),
        wall_clock=lambda: 1e9 + age,
    )
    (answer,) = ask(subject)
    assert answer.status == ("ok" if age else "error")
    assert methods(subject).count("POST") == bool(age)


BLIPS: list[Reply] = [
    status_response(500),
    status_response(503, {"retry-after": "2"}),
    status_response(429),
    body(error="throttled"),
    httpx.ReadTimeout("slow"),
    httpx.ConnectError("refused"),
    httpx.Response(200, content=b'{"wait'),
    httpx.Response(200, headers={"content-type": "text/html"}, content=b"<html>"),
]


@pytest.mark.parametrize("blip", BLIPS)
def test_what_fails_on_the_way_to_a_poll_costs_nothing(
    build_harness: HarnessBuilder, blip: Reply
) -> None:
    subject = build_harness(
        ACCEPTED, blip, RUNNING, blip, ok_response(), adapter=TaskAdapter(), max_calls=1
    )
    (answer,) = ask(subject)
    assert (answer.status, answer.attempts, answer.calls) == ("ok", 1, 1)
    assert methods(subject) == ["POST"] + ["GET"] * 4


@pytest.mark.parametrize("blip", BLIPS)
def test_polls_that_fail_for_ever_keep_the_task(build_harness: HarnessBuilder, blip: Reply) -> None:
    subject = build_harness(ACCEPTED, blip, adapter=TaskAdapter(), deadline=1000.0)
    (answer,) = ask(subject)
    assert (answer.status, answer.attempts, answer.calls) == ("error", 1, 1)
    later = build_harness(ok_response(), adapter=TaskAdapter())
    assert ask(later)[0].status == "ok"
    assert methods(later) == ["GET"]


def test_a_throttled_poll_slows_all_callers(build_harness: HarnessBuilder) -> None:
    subject = build_harness(
        ACCEPTED, status_response(429, {"retry-after": "7"}), ok_response(), adapter=TaskAdapter()
    )
    ask(subject)
    assert subject.time.slept == pytest.approx([1.0, 7.5])
    assert subject.governor.reserve(0).wait == pytest.approx(0, abs=0.1)


STOPPING_POLLS = [
    (status_response(401), AuthError, True),
    (body(error="auth"), AuthError, True),
    (status_response(402), QuotaExhausted, True),
    (body(error="quota"), QuotaExhausted, False),
    (body(error="unknown"), BadRequest, False),
]


@pytest.mark.parametrize(("reply", "kind", "kept"), STOPPING_POLLS)
def test_polls_that_stop_the_run(
    build_harness: HarnessBuilder, reply: httpx.Response, kind: type[CloudError], kept: bool
) -> None:
    """An error in the answer to a poll is the end of the task, but for a token that is
    wrong; the call stays spent."""
    subject = build_harness(ACCEPTED, reply, adapter=TaskAdapter())
    with pytest.raises(kind):
        ask(subject)
    assert methods(subject) == ["POST", "GET"]
    assert subject.journal.spent()[0] == 1
    assert (
        subject.journal.get(subject.client.key(solid_image()) + TASK) is not None
    ) == kept


def test_a_task_that_failed_for_the_image(build_harness: HarnessBuilder) -> None:
    subject = build_harness(ACCEPTED, body(error="rejected"), adapter=TaskAdapter())
    (answer,) = ask(subject)
    assert (answer.status, answer.calls) == ("error", 1)
    assert "ImageRejected" in str(answer.error)
    assert methods(subject) == ["POST", "GET"]


def test_a_service_of_tasks_that_answers_at_once(build_harness: HarnessBuilder) -> None:
    subject = build_harness(ok_response(), adapter=TaskAdapter())
    assert ask(subject)[0].status == "ok"
    key = subject.client.key(solid_image())
    assert subject.journal.get(key) is not None
    again = build_harness(status_response(500), adapter=TaskAdapter())
    assert ask(again)[0].status == "cached"
    assert again.service.requests == []


def test_an_unnamed_task_is_no_answer_and_is_not_posted_again_and_again(
    build_harness: HarnessBuilder,
) -> None:
    subject = build_harness(RUNNING, adapter=TaskAdapter())
    (answer,) = ask(subject)
    assert (answer.status, answer.attempts) == ("error", 2)
    assert "does not name" in str(answer.error)


@pytest.mark.parametrize("path", ["@evil.example.com/", "evil", "/tasks/\n"])
def test_a_poll_goes_nowhere_else(build_harness: HarnessBuilder, path: str) -> None:
    subject = build_harness(body(task="t1", at=path), ok_response(), adapter=TaskAdapter())
    (answer,) = ask(subject)
    assert "ProtocolError" in str(answer.error)
    assert methods(subject) == ["POST"]


def test_tasks_under_way_hold_their_places(build_harness: HarnessBuilder) -> None:
    under_way: set[str] = set()
    most = 0

    def serve(request: httpx.Request) -> httpx.Response:
        nonlocal most
        if request.method == "POST":
            under_way.add(request.headers["idempotency-key"])
            most = max(most, len(under_way))
            return body(task=request.headers["idempotency-key"])
        under_way.remove(request.url.path.rpartition("/")[2])
        return ok_response()

    subject = build_harness(serve, adapter=TaskAdapter(), in_flight=3, deadline=1e6)
    assert {a.status for a in ask(subject, *range(20))} == {"ok"}
    assert most == 3


def on_record(build_harness: HarnessBuilder, adapter: Any) -> tuple[Any, Any]:
    """What a new process finds for the image: its answer and its task."""
    subject = build_harness(ok_response(), adapter=adapter)
    key = subject.client.key(solid_image())
    return subject.journal.get(key), subject.journal.get(key + TASK)


@pytest.mark.parametrize(
    "adapter", [InBodyAdapter(), TaskAdapter()], ids=lambda a: type(a).__name__
)
@pytest.mark.parametrize("name", ["throttled", "busy", "paid"])
def test_errors_inside_answers_are_retried_and_never_journalled(
    build_harness: HarnessBuilder, adapter: Any, name: str
) -> None:
    subject = build_harness(body(error=name), adapter=adapter, attempts=3)
    (answer,) = ask(subject)
    assert (answer.status, answer.attempts, answer.calls) == (
        "error",
        3,
        3 * (name == "paid"),
    )
    assert len(subject.service.requests) == 3
    assert on_record(build_harness, adapter) == (None, None)
    assert ask(build_harness(ok_response(), adapter=adapter))[0].status == "ok"


def test_a_throttle_inside_an_answer_is_waited_out_by_all(build_harness: HarnessBuilder) -> None:
    subject = build_harness(body(error="throttled"), ok_response(), adapter=InBodyAdapter())
    (answer,) = ask(subject)
    assert (answer.status, answer.calls) == ("ok", 1)
    assert subject.time.slept[0] == pytest.approx(3.5)
    assert subject.governor.stats().throttled == 1


@pytest.mark.parametrize(
    "adapter", [InBodyAdapter(), TaskAdapter()], ids=lambda a: type(a).__name__
)
@pytest.mark.parametrize(
    ("name", "kind"),
    [("quota", QuotaExhausted), ("auth", AuthError), ("unknown", BadRequest)],
)
def test_errors_inside_answers_that_stop_the_run(
    build_harness: HarnessBuilder, adapter: Any, name: str, kind: type[CloudError]
) -> None:
    subject = build_harness(body(error=name), adapter=adapter)
    with pytest.raises(kind):
        ask(subject)
    assert len(subject.service.requests) == 1
    assert subject.journal.spent()[0] == 0
    assert on_record(build_harness, adapter) == (None, None)


def test_an_error_that_a_killed_run_left_as_an_answer_is_not_served(
    build_harness: HarnessBuilder,
) -> None:
    """Killed after the body was written and before it was understood."""
    killed = build_harness(body(error="throttled"), adapter=InBodyAdapter())
    killed.journal.quarantine = lambda *_: (_ for _ in ()).throw(Killed)  # type: ignore[assignment]
    with pytest.raises(Killed):
        ask(killed)
    subject = build_harness(ok_response(), adapter=InBodyAdapter())
    assert subject.journal.get(subject.client.key(solid_image())) is not None
    assert ask(subject)[0].status == "ok"
    assert len(subject.service.requests) == 1


def test_a_real_answer_is_durable_before_it_is_read(
    build_harness: HarnessBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = build_harness(ok_response())
    found: list[bool] = []
    decode = subject.client._adapter.decode

    def look(*arguments: Any) -> Any:
        found.append(
            build_harness(ok_response()).journal.get(subject.client.key(solid_image())) is not None
        )
        return decode(*arguments)

    monkeypatch.setattr(
        type(subject.client._adapter),
        "decode",
        lambda self, *arguments: look(*arguments),
    )
    ask(subject)
    assert found == [True]


@pytest.mark.parametrize("hint", [{}, {"retry-after": "1"}])
def test_a_storm_of_429_is_not_amplified(build_harness: HarnessBuilder, hint: dict[str, str]) -> None:
    callers = 32
    subject = build_harness(status_response(429, hint), in_flight=16, attempts=6, deadline=1e6)
    answers = ask(subject, *range(callers))
    assert {a.status for a in answers} == {"error"}
    assert len(subject.service.requests) <= callers + 0.1 * callers + 2 * 16
    assert any("retries are limited" in str(a.error) for a in answers)
    assert subject.journal.spent()[0] == 0
    assert subject.governor.stats().in_flight == 0


def test_a_wait_is_capped_whatever_an_adapter_says(build_harness: HarnessBuilder) -> None:
    subject = build_harness(
        body(error="throttled long"), ok_response(), adapter=InBodyAdapter(), deadline=1000.0
    )
    assert ask(subject)[0].status == "ok"
    assert subject.time.slept[0] == pytest.approx(120.5)


def test_without_a_health_page_the_token_is_checked_all_the_same(
    build_harness: HarnessBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOUD_TOKEN", TOKEN)
    subject = build_harness(ok_response(), adapter=TaskAdapter(), token_env="CLOUD_TOKEN")
    asyncio.run(subject.client.check())
    monkeypatch.delenv("CLOUD_TOKEN")
    with pytest.raises(ConfigError, match="CLOUD_TOKEN"):
        asyncio.run(subject.client.check())
    assert subject.service.requests == []


def test_an_image_that_can_not_be_sent_costs_no_request(build_harness: HarnessBuilder) -> None:
    subject = build_harness(ok_response(), adapter=InBodyAdapter({"min_side": 50}))
    (answer,) = ask(subject)
    assert (answer.status, answer.attempts) == ("error", 0)
    assert "at least 50 pixels" in str(answer.error)
    assert subject.service.requests == []
    assert subject.client.key(solid_image())


def test_an_encoding_that_fails_leaves_no_place_taken(
    build_harness: HarnessBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = build_harness(ok_response())

    def refuse(*_: Any) -> Any:
        raise BadRequest("this class name can't be asked for")

    monkeypatch.setattr(type(subject.client._adapter), "encode", refuse)
    with pytest.raises(BadRequest):
        ask(subject)
    assert subject.service.requests == []
    assert (subject.governor.stats().in_flight, subject.governor.stats().calls) == (
        0,
        0,
    )


def test_the_size_limit_is_part_of_the_question(build_harness: HarnessBuilder) -> None:
    keys = {
        build_harness(ok_response(), adapter=InBodyAdapter({"max_side": side})).client.key(solid_image())
        for side in (4096, 2048, 9999)
    }
    assert len(keys) == 2  # 9999 is more than cloud.max_side
    assert build_harness(ok_response(), max_side=2048).client.key(solid_image()) in keys


def test_a_smaller_image_is_sent_and_boxes_come_back_in_the_originals_frame(
    build_harness: HarnessBuilder,
) -> None:
    half = httpx.Response(
        200,
        json={"image": {"w": 30, "h": 20}, "detections": [detection_json(box=(1, 2, 30, 20))]},
    )
    subject = build_harness(half, adapter=InBodyAdapter({"max_side": 30}))
    assert subject.client.max_side == 30
    (answer,) = ask(subject)
    assert answer.raw is not None
    assert answer.raw.boxes[0].tolist() == [2, 4, 60, 40]
