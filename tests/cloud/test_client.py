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

from coin_ray.cloud.accounts import account_name, governor_limits
from coin_ray.cloud.adapters.reference import ReferenceAdapter
from coin_ray.cloud.answer import Answer
from coin_ray.cloud.client import CloudClient
from coin_ray.cloud.governor import Governor, LocalGovernor
from coin_ray.cloud.http import connections
from coin_ray.cloud.journal.keys import TASK
from coin_ray.cloud.task_polling import POLL_CAP, TASK_SECONDS
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
    HarnessBuilder,
    InBodyAdapter,
    ProcessKilled,
    Reply,
    TaskAdapter,
    detection_json,
    ok_response,
    solid_image,
    status_response,
)
from .emulator.openai_vlm import completion

TOKEN = "sk-live-0123456789abcdef"


def _detect(harness: ClientHarness, *seeds: int) -> list[Answer]:
    """Query about images at once: those of the seeds, or one."""
    images = [solid_image(seed) for seed in seeds or (0,)]

    async def run() -> list[Answer]:
        return list(await asyncio.gather(*map(harness.client.answer, images)))

    return asyncio.run(run())


def test_an_answer_and_its_request(build_harness: HarnessBuilder) -> None:
    harness = build_harness(ok_response(detection_json("dog", 0.4)))
    (answer,) = _detect(harness)
    assert (answer.status, answer.attempts, answer.calls) == ("ok", 1, 1)
    assert answer.raw is not None
    assert answer.raw.class_scores.argmax() == CLASSES.index("dog")
    (request,) = harness.service.requests
    assert str(request.url) == "https://detector.example.com/api/v1/detect"
    assert request.headers["idempotency-key"] == harness.client.key(solid_image())
    assert request.headers["user-agent"].startswith("coin_ray/")
    assert "authorization" not in request.headers
    assert json.loads(request.content)["classes"] == list(CLASSES)


def test_a_proved_empty(build_harness: HarnessBuilder) -> None:
    harness = build_harness(
        lambda _: httpx.Response(
            200, json={"image": {"w": 60, "h": 40}, "detections": []}
        )
    )
    assert _detect(harness)[0].status == "empty"
    (repeated,) = _detect(harness)
    assert (repeated.status, repeated.calls) == ("cached", 0)
    assert repeated.raw is not None
    assert len(repeated.raw) == 0


def test_nothing_is_paid_twice(build_harness: HarnessBuilder) -> None:
    first = build_harness(ok_response(), usd_per_call=0.01)
    answers = _detect(first, 1, 2, 3)
    assert sum(a.cost_usd for a in answers) == pytest.approx(0.03)
    second = build_harness(status_response(500), usd_per_call=0.01)
    assert [a.status for a in _detect(second, 1, 2, 3)] == ["cached"] * 3
    assert second.service.requests == []
    assert second.journal.spent() == pytest.approx((3, 0.03))


def test_the_same_image_at_once_is_one_call(build_harness: HarnessBuilder) -> None:
    harness = build_harness(ok_response())
    answers = _detect(harness, *[5] * 20)
    assert len(harness.service.requests) == 1
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
def test_retried_then_answered(
    build_harness: HarnessBuilder, reply: Reply, billed: bool
) -> None:
    harness = build_harness(reply, ok_response())
    (answer,) = _detect(harness)
    assert (answer.status, answer.attempts, answer.calls) == ("ok", 2, 1 + billed)
    assert harness.journal.spent()[0] == 1 + billed
    assert harness.governor.stats().calls == 1 + billed
    assert harness.governor.stats().in_flight == 0
    keys = {r.headers["idempotency-key"] for r in harness.service.requests}
    assert len(keys) == 1


@pytest.mark.parametrize(
    "reply", [status_response(500), status_response(429), httpx.ReadTimeout("slow")]
)
def test_attempts_run_out(build_harness: HarnessBuilder, reply: Reply) -> None:
    harness = build_harness(reply, attempts=4)
    (answer,) = _detect(harness)
    assert (answer.status, answer.attempts, answer.raw) == ("error", 4, None)
    assert len(harness.service.requests) == 4
    assert harness.time.slept == pytest.approx([0.5, 1.0, 2.0])


def test_malformed_answers_are_tried_twice_and_quarantined(
    build_harness: HarnessBuilder,
) -> None:
    harness = build_harness(httpx.Response(200, json=[]), attempts=6)
    (answer,) = _detect(harness)
    assert (answer.status, answer.attempts) == ("error", 2)
    assert "ProtocolError" in str(answer.error)
    assert harness.journal.get(harness.client.key(solid_image())) is None
    assert _detect(build_harness(ok_response()))[0].status == "ok"


@pytest.mark.parametrize("code", [413, 415, 451])
def test_rejected_images_are_not_retried(
    build_harness: HarnessBuilder, code: int
) -> None:
    harness = build_harness(status_response(code, title="no"))
    (answer,) = _detect(harness)
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
    harness = build_harness(
        status_response(code, {"location": "http://elsewhere.example.com"})
    )
    with pytest.raises(kind):
        _detect(harness)
    assert len(harness.service.requests) == 1
    assert harness.journal.spent()[0] == 0


WAITS = [
    ("2", 2.5),
    ("0", 0.5),
    ("-5", 0.5),
    ("abc", 0.5),
    ("Wed, 21 Oct 2026 07:28:10 GMT", 10.5),
]


@pytest.mark.parametrize(("header", "seconds"), WAITS)
def test_retry_after_is_waited_out(
    build_harness: HarnessBuilder, header: str, seconds: float
) -> None:
    throttled = status_response(
        429, {"retry-after": header, "date": "Wed, 21 Oct 2026 07:28:00 GMT"}
    )
    harness = build_harness(throttled, ok_response())
    (answer,) = _detect(harness)
    assert answer.status == "ok"
    assert harness.time.slept[0] == pytest.approx(seconds)


@pytest.mark.parametrize("attempts", [1, 6])
@pytest.mark.parametrize(
    "reply",
    [
        status_response(429, {"retry-after": "100000"}, title="slow down"),
        status_response(503, {"retry-after": "100000"}, title="slow down"),
        httpx.Response(200, json={"error": "throttled long"}),
    ],
)
def test_a_wait_longer_than_the_deadline_ends_the_run(
    build_harness: HarnessBuilder, reply: httpx.Response, attempts: int
) -> None:
    harness = build_harness(
        reply, attempts=attempts, adapter=InBodyAdapter(), wall_clock=lambda: 1.8e9
    )
    with pytest.raises(QuotaExhausted, match=r"until .*longer than cloud\.deadline"):
        _detect(harness, *range(20))
    assert len(harness.service.requests) == 1
    assert harness.time.slept == []
    assert harness.governor.stats().in_flight == 0


def test_a_run_that_has_to_come_back_says_when(build_harness: HarnessBuilder) -> None:
    harness = build_harness(
        status_response(429, {"retry-after": "3600"}, title="slow down"),
        wall_clock=lambda: 1_800_000_000.0,
    )
    with pytest.raises(QuotaExhausted, match="slow down") as caught:
        _detect(harness)
    assert "2027-01-15 09:00 UTC" in str(caught.value)
    assert caught.value.exit_code == 5


def test_a_throttled_call_slows_all_callers(build_harness: HarnessBuilder) -> None:
    harness = build_harness(
        status_response(429, {"retry-after": "3"}),
        ok_response(),
        in_flight=1,
        deadline=1e6,
    )
    answers = _detect(harness, *range(20))
    assert all(a.status == "ok" for a in answers)
    assert len(harness.service.requests) == 21
    assert harness.governor.stats().throttled == 1


def test_backoff_is_capped_and_jittered(build_harness: HarnessBuilder) -> None:
    harness = build_harness(status_response(500), attempts=9, deadline=1000.0)
    _detect(harness)
    assert harness.time.slept == pytest.approx([0.5, 1, 2, 4, 8, 16, 20, 20])


def test_deadline_ends_a_stalled_call_which_stays_spent(
    build_harness: HarnessBuilder,
) -> None:
    async def stall(request: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError

    harness = build_harness(ok_response(), deadline=0.05)
    harness.service.handler = stall
    (answer,) = _detect(harness)
    assert answer.status == "error"
    assert "DeadlineExceeded" in str(answer.error)
    assert answer.calls == 1
    assert harness.journal.spent()[0] == 1
    assert harness.governor.stats().calls == 1
    assert harness.governor.stats().in_flight == 0


def test_a_spent_quota_is_asked_for_once_where_another_cloud_may_answer(
    build_harness: HarnessBuilder,
) -> None:
    harness = build_harness(
        ok_response(), status_response(402), ok_response(), skip_over_budget=True
    )
    answers = [_detect(harness, i)[0] for i in (0, 1, 2, 0)]
    assert [a.status for a in answers] == [
        "ok",
        "skipped_quota",
        "skipped_quota",
        "cached",
    ]
    assert [a.calls for a in answers] == [1, 0, 0, 0]
    assert len(harness.service.requests) == 2
    assert harness.governor.stats().in_flight == 0


class _EndlessBody(httpx.AsyncByteStream):
    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            yield b" " * 1000


def test_bodies_are_capped(
    build_harness: HarnessBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "BODY_MAX", 10_000)
    harness = build_harness(ok_response())

    async def flood(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=_EndlessBody())

    harness.service.handler = flood
    (answer,) = _detect(harness)
    assert answer.status == "error"
    assert "longer than" in str(answer.error)


@pytest.mark.parametrize("limit", [{"max_calls": 10}, {"max_usd": 0.1}])
def test_budget_is_exact_with_many_in_flight_and_after_reopening(
    build_harness: HarnessBuilder, limit: dict[str, Any]
) -> None:
    first = build_harness(
        ok_response(), in_flight=16, usd_per_call=0.01, skip_over_budget=True, **limit
    )
    states = [a.status for a in _detect(first, *range(40))]
    assert (states.count("ok"), states.count("skipped_budget")) == (10, 30)
    assert len(first.service.requests) == 10
    second = build_harness(ok_response(), usd_per_call=0.01, **limit)
    with pytest.raises(BudgetExhausted, match="answers that could be read are kept"):
        _detect(second, 99)
    assert second.service.requests == []


def test_a_budget_counts_attempts_of_a_killed_run(
    build_harness: HarnessBuilder,
) -> None:
    killed_run = build_harness(ok_response(), max_calls=2)
    killed_run.journal.attempt("some image", 0)
    harness = build_harness(ok_response(), max_calls=2, skip_over_budget=True)
    states = sorted(a.status for a in _detect(harness, 1, 2, 3))
    assert states == ["ok", "skipped_budget", "skipped_budget"]


def test_a_day_s_calls_are_counted_over_runs(build_harness: HarnessBuilder) -> None:
    harness = build_harness(ok_response(), per_day=3)
    _detect(harness, 1, 2)
    config = Cloud(url=URL, rate=1000.0, per_day=3)
    account = account_name(config, URL, ReferenceAdapter())
    next_run = build_harness(ok_response(), per_day=3)
    now = time.time()
    ages = [
        now - start for start in next_run.journal.call_starts(account, now - 86_400)
    ]
    assert len(ages) == 2
    next_run.client._admission.governor = LocalGovernor(
        Governor(governor_limits(config), next_run.journal.spent(), next_run.time, ages)
    )
    assert _detect(next_run, 3)[0].status == "ok"
    with pytest.raises(BudgetExhausted, match=r"cloud\.per_day=3"):
        _detect(next_run, 4)
    assert len(next_run.journal.call_starts("another", 0)) == 0


def test_journalled_images_come_through_over_budget(
    build_harness: HarnessBuilder,
) -> None:
    _detect(build_harness(ok_response(), max_calls=1), 1)
    assert _detect(build_harness(ok_response(), max_calls=1), 1)[0].status == "cached"


def test_calls_under_way_are_limited(build_harness: HarnessBuilder) -> None:
    in_flight = in_flight_max = 0

    async def handle(request: httpx.Request) -> httpx.Response:
        nonlocal in_flight, in_flight_max
        in_flight += 1
        in_flight_max = max(in_flight_max, in_flight)
        await asyncio.sleep(0.001)
        in_flight -= 1
        return ok_response()

    harness = build_harness(ok_response(), in_flight=3, deadline=1e6)
    harness.service.handler = handle
    _detect(harness, *range(20))
    assert in_flight_max == 3


def test_unreachable_from_the_start(build_harness: HarnessBuilder) -> None:
    harness = build_harness(httpx.ConnectError("refused"))
    with pytest.raises(CloudUnreachable, match=r"detector\.example\.com.*cloud\.url"):
        _detect(harness)
    with pytest.raises(CloudUnreachable):
        asyncio.run(build_harness(httpx.ConnectError("refused")).client.check())


def test_a_service_that_dies_stops_the_run(build_harness: HarnessBuilder) -> None:
    harness = build_harness(ok_response(), httpx.ConnectError("refused"), in_flight=4)
    with pytest.raises(CloudUnreachable, match="breaker"):
        _detect(harness, *range(60))
    assert len(harness.service.requests) < 60


HEALTH = [
    (200, None),
    (404, None),
    (500, None),
    (401, AuthError),
    (403, AuthError),
    (301, BadRequest),
]


@pytest.mark.parametrize(("code", "kind"), HEALTH)
def test_check(
    build_harness: HarnessBuilder, code: int, kind: type[CloudError] | None
) -> None:
    harness = build_harness(status_response(code))
    if kind is None:
        asyncio.run(harness.client.check())
    else:
        with pytest.raises(kind):
            asyncio.run(harness.client.check())
    assert [str(r.url.path) for r in harness.service.requests] == ["/api/health"]
    assert harness.journal.spent() == (0, 0)


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
    "token", [None, "", "  ", "two\nlines-secret", "schlüssel-secret"]
)
def test_missing_or_unusable_token(
    build_harness: HarnessBuilder, monkeypatch: pytest.MonkeyPatch, token: str | None
) -> None:
    monkeypatch.delenv("CLOUD_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("CLOUD_TOKEN", token)
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
    harness = build_harness(reply, token_env="CLOUD_TOKEN", attempts=2)
    texts = [repr(harness.client)]
    try:
        texts += [repr(a) for a in _detect(harness)]
    except CloudError as error:
        texts += [repr(error), *traceback.format_exception(error)]
    assert harness.service.requests[0].headers["authorization"] == f"Bearer {TOKEN}"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    texts += [caplog.text, *(file.read_bytes().decode("latin-1") for file in files)]
    assert not any(TOKEN in text for text in texts)
    assert TOKEN not in str(harness.service.requests[0].url)


def test_request_images_are_not_journalled(
    build_harness: HarnessBuilder, tmp_path: Path
) -> None:
    _detect(build_harness(ok_response()))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    stored = b"".join(file.read_bytes() for file in files)
    assert solid_image().data[:200] not in stored
    assert len(stored) < len(solid_image().data) + 1200


def test_a_local_server_is_the_same_on_another_port(
    build_harness: HarnessBuilder,
) -> None:
    harness = build_harness(ok_response())
    governor = LocalGovernor(harness.governor)
    addresses = ("http://127.0.0.1:1111", "http://127.0.0.1:2222")
    clients = [
        CloudClient(Cloud(serve="demo"), CLASSES, url, harness.journal, governor)
        for url in addresses
    ]
    first_key, second_key = (client.key(solid_image()) for client in clients)
    assert first_key == second_key != harness.client.key(solid_image())


@pytest.mark.parametrize("serve", ["onnx", "checkpoint", "transformers"])
def test_other_weights_under_the_same_name_are_asked_anew(
    build_harness: HarnessBuilder, tmp_path: Path, serve: str
) -> None:
    harness = build_harness(ok_response())
    governor = LocalGovernor(harness.governor)
    folder = tmp_path / "model"
    folder.mkdir()
    settings: dict[str, Any] = {"model": str(folder)}
    if serve == "onnx":
        settings = {"onnx_models": (str(folder / "weights"),)}

    def key(weights: bytes) -> str:
        (folder / "weights").write_bytes(weights)
        config = Cloud(serve=serve, **settings)  # type: ignore[arg-type]
        url = "http://127.0.0.1:1"
        client = CloudClient(config, CLASSES, url, harness.journal, governor)
        return client.key(solid_image())

    keys = [key(b"first"), key(b"second"), key(b"first")]
    assert keys[0] == keys[2] != keys[1]


def _json_response(**fields: Any) -> httpx.Response:
    return httpx.Response(200, json=fields)


def _methods(harness: ClientHarness) -> list[str]:
    return [r.method for r in harness.service.requests]


ACCEPTED = _json_response(task="t1")
RUNNING = _json_response(wait=1.0)


@pytest.mark.parametrize("polls", [1, 2, 20])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_polled_until_answered(
    build_harness: HarnessBuilder, polls: int, asynchronous: bool
) -> None:
    """Check this also for a service that only sometimes answers with a task."""
    harness = build_harness(
        ACCEPTED,
        *[RUNNING] * (polls - 1),
        ok_response(),
        adapter=TaskAdapter(asynchronous),
        deadline=1000.0,
        usd_per_call=0.01,
        max_calls=1,
    )
    (answer,) = _detect(harness)
    assert (answer.status, answer.attempts, answer.calls) == ("ok", 1, 1)
    assert answer.cost_usd == 0.01
    assert _methods(harness) == ["POST"] + ["GET"] * polls
    assert {r.url.path for r in harness.service.requests[1:]} == {"/api/tasks/t1"}
    counts = harness.journal.contents()
    assert (counts.answers, counts.tasks, counts.quarantined) == (
        1,
        1,
        not asynchronous,
    )
    assert "idempotency-key" not in harness.service.requests[1].headers
    assert harness.journal.spent() == pytest.approx((1, 0.01))
    waits = harness.time.slept
    assert waits[:3] == pytest.approx([1.0, 1.5, 2.25][:polls])
    assert waits == sorted(waits)
    assert max(waits) <= POLL_CAP
    assert answer.latency_ms == pytest.approx(sum(waits) * 1000)
    assert (
        _detect(build_harness(status_response(500), adapter=TaskAdapter(asynchronous)))[
            0
        ].status
        == "cached"
    )


@pytest.mark.parametrize(
    ("wait", "expected"),
    [(3.0, 3.0), (0.0, 0.25), (-5.0, 0.25), (1e9, POLL_CAP), (float("nan"), 0.25)],
)
def test_a_poll_waits_as_long_as_asked_within_reason(
    build_harness: HarnessBuilder, wait: float, expected: float
) -> None:
    accepted = httpx.Response(
        200, content=json.dumps({"task": "t1", "wait": wait}).encode()
    )
    harness = build_harness(accepted, ok_response(), adapter=TaskAdapter())
    assert _detect(harness)[0].status == "ok"
    assert harness.time.slept == [expected]


def test_a_task_that_never_ends_stays_on_record(build_harness: HarnessBuilder) -> None:
    harness = build_harness(ACCEPTED, RUNNING, adapter=TaskAdapter(), deadline=30.0)
    (answer,) = _detect(harness)
    assert (answer.status, answer.calls) == ("error", 1)
    assert "DeadlineExceeded" in str(answer.error)
    assert "stays on record" in str(answer.error)
    assert _methods(harness).count("POST") == 1
    assert sum(harness.time.slept) < 30
    assert harness.governor.stats().in_flight == 0
    next_run = build_harness(RUNNING, ok_response(), adapter=TaskAdapter())
    (answer,) = _detect(next_run)
    assert (answer.status, answer.attempts, answer.calls) == ("ok", 0, 0)
    assert _methods(next_run) == ["GET", "GET"]
    assert next_run.journal.spent()[0] == 1


@pytest.mark.parametrize("asynchronous", [True, False])
def test_killed_between_the_task_and_its_first_poll(
    build_harness: HarnessBuilder, asynchronous: bool
) -> None:
    killed_run = build_harness(ACCEPTED, adapter=TaskAdapter(asynchronous))

    async def die(seconds: float) -> None:
        raise ProcessKilled

    killed_run.client._timing.sleep = die
    with pytest.raises(ProcessKilled):
        _detect(killed_run)
    assert _methods(killed_run) == ["POST"]
    key = killed_run.client.key(solid_image())
    assert killed_run.journal.get(key) is None
    assert killed_run.journal.get(key + TASK) is not None
    next_run = build_harness(ok_response(), adapter=TaskAdapter(asynchronous))
    assert _detect(next_run)[0].status == "ok"
    assert _methods(next_run) == ["GET"]
    assert next_run.journal.spent()[0] == 1


@pytest.mark.parametrize(
    "lost_reply",
    [
        status_response(404),
        status_response(410),
        _json_response(error="busy"),
        _json_response(error="paid"),
    ],
)
def test_a_lost_task_is_asked_for_anew(
    build_harness: HarnessBuilder, lost_reply: httpx.Response
) -> None:
    harness = build_harness(
        ACCEPTED,
        RUNNING,
        lost_reply,
        _json_response(task="t2"),
        ok_response(),
        adapter=TaskAdapter(),
    )
    (answer,) = _detect(harness)
    assert (answer.status, answer.attempts, answer.calls) == ("ok", 2, 2)
    assert _methods(harness) == ["POST", "GET", "GET", "POST", "GET"]
    posts = [r for r in harness.service.requests if r.method == "POST"]
    assert posts[0].headers["idempotency-key"] != posts[1].headers["idempotency-key"]
    assert harness.service.requests[-1].url.path == "/api/tasks/t2"


def test_tasks_are_not_lost_for_ever(build_harness: HarnessBuilder) -> None:
    harness = build_harness(
        *[ACCEPTED, status_response(404)] * 20, adapter=TaskAdapter(), attempts=3
    )
    (answer,) = _detect(harness)
    assert (answer.status, answer.attempts, answer.calls) == ("error", 3, 3)
    assert "TaskLost" in str(answer.error)


@pytest.mark.parametrize(
    "lost_reply",
    [
        status_response(404),
        status_response(400),
        _json_response(error="busy"),
        _json_response(error="unknown"),
    ],
)
def test_a_task_of_an_earlier_run_that_is_lost(
    build_harness: HarnessBuilder, lost_reply: httpx.Response
) -> None:
    _detect(build_harness(ACCEPTED, RUNNING, adapter=TaskAdapter(), deadline=3.0))
    harness = build_harness(
        lost_reply, _json_response(task="t2"), ok_response(), adapter=TaskAdapter()
    )
    (answer,) = _detect(harness)
    assert (answer.status, answer.attempts, answer.calls) == ("ok", 1, 1)
    assert _methods(harness) == ["GET", "POST", "GET"]
    assert harness.journal.spent()[0] == 2


def test_an_earlier_runs_task_and_the_call_after_it_share_the_deadline(
    build_harness: HarnessBuilder,
) -> None:
    _detect(build_harness(ACCEPTED, RUNNING, adapter=TaskAdapter(), deadline=3.0))
    harness = build_harness(
        *[RUNNING] * 3,
        status_response(404),
        _json_response(task="t2"),
        RUNNING,
        adapter=TaskAdapter(),
        deadline=10.0,
    )
    (answer,) = _detect(harness)
    assert "DeadlineExceeded" in str(answer.error)
    assert _methods(harness).count("POST") == 1
    assert sum(harness.time.slept) < 10


@pytest.mark.parametrize("age", [0.0, 2 * TASK_SECONDS])
def test_an_old_task_that_gives_no_result_is_given_up(
    build_harness: HarnessBuilder, age: float
) -> None:
    _detect(
        build_harness(
            ACCEPTED,
            RUNNING,
            adapter=TaskAdapter(),
            deadline=3.0,
            wall_clock=lambda: 1e9,
        )
    )
    strange = httpx.Response(200, json=[])
    harness = build_harness(
        strange,
        strange,
        ACCEPTED,
        ok_response(),
        adapter=TaskAdapter(),
        wall_clock=lambda: 1e9 + age,
    )
    (answer,) = _detect(harness)
    assert answer.status == ("ok" if age else "error")
    assert _methods(harness).count("POST") == bool(age)


BLIPS: list[Reply] = [
    status_response(500),
    status_response(503, {"retry-after": "2"}),
    status_response(429),
    _json_response(error="throttled"),
    httpx.ReadTimeout("slow"),
    httpx.ConnectError("refused"),
    httpx.Response(200, content=b'{"wait'),
    httpx.Response(200, headers={"content-type": "text/html"}, content=b"<html>"),
]


@pytest.mark.parametrize("failure", BLIPS)
def test_what_fails_on_the_way_to_a_poll_costs_nothing(
    build_harness: HarnessBuilder, failure: Reply
) -> None:
    harness = build_harness(
        ACCEPTED,
        failure,
        RUNNING,
        failure,
        ok_response(),
        adapter=TaskAdapter(),
        max_calls=1,
    )
    (answer,) = _detect(harness)
    assert (answer.status, answer.attempts, answer.calls) == ("ok", 1, 1)
    assert _methods(harness) == ["POST"] + ["GET"] * 4


@pytest.mark.parametrize("failure", BLIPS)
def test_polls_that_fail_for_ever_keep_the_task(
    build_harness: HarnessBuilder, failure: Reply
) -> None:
    harness = build_harness(ACCEPTED, failure, adapter=TaskAdapter(), deadline=1000.0)
    (answer,) = _detect(harness)
    assert (answer.status, answer.attempts, answer.calls) == ("error", 1, 1)
    next_run = build_harness(ok_response(), adapter=TaskAdapter())
    assert _detect(next_run)[0].status == "ok"
    assert _methods(next_run) == ["GET"]


def test_a_throttled_poll_slows_all_callers(build_harness: HarnessBuilder) -> None:
    harness = build_harness(
        ACCEPTED,
        status_response(429, {"retry-after": "7"}),
        ok_response(),
        adapter=TaskAdapter(),
    )
    _detect(harness)
    assert harness.time.slept == pytest.approx([1.0, 7.5])
    assert harness.governor.reserve(0).wait == pytest.approx(0, abs=0.1)


STOPPING_POLLS = [
    (status_response(401), AuthError, True),
    (_json_response(error="auth"), AuthError, True),
    (status_response(402), QuotaExhausted, True),
    (_json_response(error="quota"), QuotaExhausted, False),
    (_json_response(error="unknown"), BadRequest, False),
]


@pytest.mark.parametrize(("reply", "kind", "task_kept"), STOPPING_POLLS)
def test_polls_that_stop_the_run(
    build_harness: HarnessBuilder,
    reply: httpx.Response,
    kind: type[CloudError],
    task_kept: bool,
) -> None:
    """An error in the response to a poll ends the task, unless the token is wrong; the
    call stays spent.
    """
    harness = build_harness(ACCEPTED, reply, adapter=TaskAdapter())
    with pytest.raises(kind):
        _detect(harness)
    assert _methods(harness) == ["POST", "GET"]
    assert harness.journal.spent()[0] == 1
    assert (
        harness.journal.get(harness.client.key(solid_image()) + TASK) is not None
    ) == task_kept


def test_a_task_that_failed_for_the_image(build_harness: HarnessBuilder) -> None:
    harness = build_harness(
        ACCEPTED, _json_response(error="rejected"), adapter=TaskAdapter()
    )
    (answer,) = _detect(harness)
    assert (answer.status, answer.calls) == ("error", 1)
    assert "ImageRejected" in str(answer.error)
    assert _methods(harness) == ["POST", "GET"]


def test_a_service_of_tasks_that_answers_at_once(build_harness: HarnessBuilder) -> None:
    harness = build_harness(ok_response(), adapter=TaskAdapter())
    assert _detect(harness)[0].status == "ok"
    key = harness.client.key(solid_image())
    assert harness.journal.get(key) is not None
    repeated = build_harness(status_response(500), adapter=TaskAdapter())
    assert _detect(repeated)[0].status == "cached"
    assert repeated.service.requests == []


def test_an_unnamed_task_is_no_answer_and_is_not_posted_again_and_again(
    build_harness: HarnessBuilder,
) -> None:
    harness = build_harness(RUNNING, adapter=TaskAdapter())
    (answer,) = _detect(harness)
    assert (answer.status, answer.attempts) == ("error", 2)
    assert "does not name" in str(answer.error)


@pytest.mark.parametrize("path", ["@evil.example.com/", "evil", "/tasks/\n"])
def test_a_poll_goes_nowhere_else(build_harness: HarnessBuilder, path: str) -> None:
    harness = build_harness(
        _json_response(task="t1", at=path), ok_response(), adapter=TaskAdapter()
    )
    (answer,) = _detect(harness)
    assert "ProtocolError" in str(answer.error)
    assert _methods(harness) == ["POST"]


def test_tasks_under_way_hold_their_places(build_harness: HarnessBuilder) -> None:
    in_flight: set[str] = set()
    in_flight_max = 0

    def handle(request: httpx.Request) -> httpx.Response:
        nonlocal in_flight_max
        if request.method == "POST":
            in_flight.add(request.headers["idempotency-key"])
            in_flight_max = max(in_flight_max, len(in_flight))
            return _json_response(task=request.headers["idempotency-key"])
        in_flight.remove(request.url.path.rpartition("/")[2])
        return ok_response()

    harness = build_harness(handle, adapter=TaskAdapter(), in_flight=3, deadline=1e6)
    assert {a.status for a in _detect(harness, *range(20))} == {"ok"}
    assert in_flight_max == 3


def _journal_records(build_harness: HarnessBuilder, adapter: Any) -> tuple[Any, Any]:
    """Return what a new process reads for the image: its response and its task."""
    harness = build_harness(ok_response(), adapter=adapter)
    key = harness.client.key(solid_image())
    return harness.journal.get(key), harness.journal.get(key + TASK)


@pytest.mark.parametrize(
    "adapter", [InBodyAdapter(), TaskAdapter()], ids=lambda a: type(a).__name__
)
@pytest.mark.parametrize("name", ["throttled", "busy", "paid"])
def test_errors_inside_answers_are_retried_and_never_journalled(
    build_harness: HarnessBuilder, adapter: Any, name: str
) -> None:
    harness = build_harness(_json_response(error=name), adapter=adapter, attempts=3)
    (answer,) = _detect(harness)
    assert (answer.status, answer.attempts) == ("error", 3)
    assert answer.calls == (3 if name == "paid" else 0)
    assert len(harness.service.requests) == 3
    assert _journal_records(build_harness, adapter) == (None, None)
    assert _detect(build_harness(ok_response(), adapter=adapter))[0].status == "ok"


def test_a_throttle_inside_an_answer_is_waited_out_by_all(
    build_harness: HarnessBuilder,
) -> None:
    harness = build_harness(
        _json_response(error="throttled"), ok_response(), adapter=InBodyAdapter()
    )
    (answer,) = _detect(harness)
    assert (answer.status, answer.calls) == ("ok", 1)
    assert harness.time.slept[0] == pytest.approx(3.5)
    assert harness.governor.stats().throttled == 1


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
    harness = build_harness(_json_response(error=name), adapter=adapter)
    with pytest.raises(kind):
        _detect(harness)
    assert len(harness.service.requests) == 1
    assert harness.journal.spent()[0] == 0
    assert _journal_records(build_harness, adapter) == (None, None)


def test_an_error_that_a_killed_run_left_as_an_answer_is_not_served(
    build_harness: HarnessBuilder,
) -> None:
    """Kill the process after the body was written and before it was decoded."""
    killed_run = build_harness(
        _json_response(error="throttled"), adapter=InBodyAdapter()
    )

    def die(*_: Any) -> None:
        raise ProcessKilled

    killed_run.journal.quarantine = die  # type: ignore[assignment]
    with pytest.raises(ProcessKilled):
        _detect(killed_run)
    harness = build_harness(ok_response(), adapter=InBodyAdapter())
    assert harness.journal.get(harness.client.key(solid_image())) is not None
    assert _detect(harness)[0].status == "ok"
    assert len(harness.service.requests) == 1


def test_a_real_answer_is_durable_before_it_is_read(
    build_harness: HarnessBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = build_harness(ok_response())
    recorded: list[bool] = []
    decode = harness.client._adapter.decode

    def decode_after_check(*arguments: Any) -> Any:
        recorded.append(
            build_harness(ok_response()).journal.get(harness.client.key(solid_image()))
            is not None
        )
        return decode(*arguments)

    monkeypatch.setattr(
        type(harness.client._adapter),
        "decode",
        lambda self, *arguments: decode_after_check(*arguments),
    )
    _detect(harness)
    assert recorded == [True]


@pytest.mark.parametrize("headers", [{}, {"retry-after": "1"}])
def test_a_storm_of_429_is_not_amplified(
    build_harness: HarnessBuilder, headers: dict[str, str]
) -> None:
    callers = 32
    harness = build_harness(
        status_response(429, headers), in_flight=16, attempts=6, deadline=1e6
    )
    answers = _detect(harness, *range(callers))
    assert {a.status for a in answers} == {"error"}
    assert len(harness.service.requests) <= callers + 0.1 * callers + 2 * 16
    assert any("retries are limited" in str(a.error) for a in answers)
    assert harness.journal.spent()[0] == 0
    assert harness.governor.stats().in_flight == 0


def test_a_wait_within_the_deadline_is_waited_out(
    build_harness: HarnessBuilder,
) -> None:
    harness = build_harness(
        status_response(429, {"retry-after": "500"}), ok_response(), deadline=1000.0
    )
    assert _detect(harness)[0].status == "ok"
    assert harness.time.slept[0] == pytest.approx(500.5)


WRONG_KEYS = [(401, AuthError), (402, QuotaExhausted), (400, BadRequest)]


@pytest.mark.parametrize(("code", "kind"), WRONG_KEYS)
def test_errors_that_stop_the_run_cost_one_request_with_many_calls_waiting(
    build_harness: HarnessBuilder, code: int, kind: type[CloudError]
) -> None:
    harness = build_harness(status_response(code, title="no such key"), in_flight=16)

    async def run() -> list[Answer | BaseException]:
        images = [solid_image(seed) for seed in range(40)]
        return await asyncio.gather(
            *map(harness.client.answer, images), return_exceptions=True
        )

    outcomes = asyncio.run(run())
    assert {type(outcome) for outcome in outcomes} == {kind}
    assert all("no such key" in str(outcome) for outcome in outcomes)
    assert len(harness.service.requests) == 1
    assert harness.governor.stats().in_flight == 0


def test_all_calls_go_once_the_first_has_an_answer(
    build_harness: HarnessBuilder,
) -> None:
    harness = build_harness(in_flight=8)
    under_way, most = 0, 0

    async def serve(_: httpx.Request) -> httpx.Response:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        if len(harness.service.requests) == 1:
            await asyncio.sleep(0.01)
            assert len(harness.service.requests) == 1
        await asyncio.sleep(0.01)
        under_way -= 1
        return ok_response()

    harness.service.handler = serve
    assert {answer.status for answer in _detect(harness, *range(30))} == {"ok"}
    assert most == 8


def test_a_first_call_that_fails_for_its_image_lets_the_others_go(
    build_harness: HarnessBuilder,
) -> None:
    harness = build_harness(status_response(413), ok_response())
    statuses = sorted(answer.status for answer in _detect(harness, *range(10)))
    assert statuses == ["error"] + ["ok"] * 9


def test_an_answer_cut_short_by_the_deadline_keeps_what_the_service_said(
    build_harness: HarnessBuilder,
) -> None:
    harness = build_harness(
        status_response(500, title="the model crashed"), deadline=0.2
    )
    harness.client._timing.sleep = asyncio.sleep
    harness.client._timing.uniform = lambda low, high: 0.0
    harness.governor.pause(0.0)
    (answer,) = _detect(harness)
    assert answer.status == "error"
    assert "the model crashed" in str(answer.error)


def test_a_row_that_the_breaker_stops_keeps_what_the_service_said(
    build_harness: HarnessBuilder,
) -> None:
    harness = build_harness(status_response(500, title="the model crashed"), attempts=9)
    with pytest.raises(CloudUnreachable, match="the model crashed"):
        _detect(harness, *range(60))


UNUSABLE: list[tuple[list[list[float]], str]] = [
    ([[0.1, 0.1, 0.6, 0.7]], "all coordinates lie within"),
    ([[1, 2, 640, 480]], "far outside"),
    ([[5, 5, 5.2, 30]], "thinner than a pixel"),
    ([[61, 5, 70, 30], [5, 5, 5, 5]], "1 outside the image"),
]


@pytest.mark.parametrize(("boxes", "reason"), UNUSABLE)
def test_an_answer_of_unusable_boxes_is_an_error_that_is_paid_once(
    build_harness: HarnessBuilder, boxes: list[list[float]], reason: str
) -> None:
    reply = ok_response(*(detection_json(box=box) for box in boxes))
    harness = build_harness(reply)
    (answer,) = _detect(harness)
    assert (answer.status, answer.calls, answer.raw) == ("error", 1, None)
    assert reason in str(answer.error)
    again = build_harness(reply)
    (answer,) = _detect(again)
    assert (answer.status, answer.calls) == ("error", 0)
    assert again.service.requests == []


def test_a_label_map_reads_a_paid_answer_of_other_names(
    build_harness: HarnessBuilder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", TOKEN)
    text = json.dumps([{"bbox_2d": [100, 100, 600, 700], "label": "Auto"}])
    reply = httpx.Response(200, json=completion(text))
    settings = {"service": "openai-vlm", "coordinates": "xyxy_1000"}
    (answer,) = _detect(build_harness(reply, **settings))
    assert answer.status == "error"
    assert "'Auto'" in str(answer.error)
    label_map = tmp_path / "map.yaml"
    label_map.write_text("service: openai-vlm\nmap: {Auto: car}\n")
    mapped = build_harness(reply, **settings, label_map=str(label_map))
    (answer,) = _detect(mapped)
    assert answer.status == "cached"
    assert mapped.service.requests == []


def test_whole_percent_of_a_model_stops_the_run(
    build_harness: HarnessBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", TOKEN)
    boxes = [[20, 30, 60, 70], [40, 10, 90, 100]]
    text = json.dumps([{"bbox_2d": box, "label": "car"} for box in boxes])
    reply = httpx.Response(200, json=completion(text))
    harness = build_harness(reply, service="openai-vlm", coordinates="xyxy_1000")
    with pytest.raises(BadRequest, match=r"upper left 10%.*cloud\.coordinates"):
        _detect(harness, *range(40))


def _refusing_server(*fields: str) -> Callable[[httpx.Request], httpx.Response]:
    """Return a model that refuses these fields of a request."""

    def reply(request: httpx.Request) -> httpx.Response:
        sent = json.loads(request.content)
        for name in fields:
            if name in sent:
                error = {
                    "message": f"Unsupported parameter: '{name}' is not supported.",
                    "param": name,
                    "code": "unsupported_parameter",
                }
                return httpx.Response(400, json={"error": error})
        return httpx.Response(200, json=completion("[]"))

    return reply


@pytest.mark.parametrize(
    ("fields", "sent"),
    [
        (["temperature", "response_format"], {"max_tokens": 4096}),
        (
            ["max_tokens", "response_format"],
            {"temperature": 0, "max_completion_tokens": 4096},
        ),
        (
            ["temperature", "max_tokens", "response_format"],
            {"max_completion_tokens": 4096},
        ),
    ],
)
def test_refused_fields_are_learned_once(
    build_harness: HarnessBuilder,
    monkeypatch: pytest.MonkeyPatch,
    fields: list[str],
    sent: dict[str, int],
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", TOKEN)
    harness = build_harness(
        _refusing_server(*fields),
        service="openai-vlm",
        coordinates="xyxy_1000",
        max_tokens=4096,
    )
    answers = _detect(harness, *range(20))
    assert {(a.status, a.calls, a.attempts) for a in answers} == {("empty", 1, 1)}
    assert len(harness.service.requests) == 20 + len(fields)
    body = json.loads(harness.service.requests[-1].content)
    assert {key: body[key] for key in body if key != "messages"} == sent
    assert harness.journal.spent()[0] == 20


def test_a_field_that_stays_refused_stops_the_run(
    build_harness: HarnessBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", TOKEN)
    harness = build_harness(
        _refusing_server("temperature", "max_tokens", "max_completion_tokens"),
        service="openai-vlm",
        coordinates="xyxy_1000",
        max_tokens=4096,
    )
    with pytest.raises(BadRequest, match=r"cloud\.max_tokens"):
        _detect(harness, *range(20))
    assert len(harness.service.requests) == 3


def test_without_a_health_page_the_token_is_checked_all_the_same(
    build_harness: HarnessBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOUD_TOKEN", TOKEN)
    harness = build_harness(
        ok_response(), adapter=TaskAdapter(), token_env="CLOUD_TOKEN"
    )
    asyncio.run(harness.client.check())
    monkeypatch.delenv("CLOUD_TOKEN")
    with pytest.raises(ConfigError, match="CLOUD_TOKEN"):
        asyncio.run(harness.client.check())
    assert harness.service.requests == []


def test_an_image_that_can_not_be_sent_costs_no_request(
    build_harness: HarnessBuilder,
) -> None:
    harness = build_harness(ok_response(), adapter=InBodyAdapter({"min_side": 50}))
    (answer,) = _detect(harness)
    assert (answer.status, answer.attempts) == ("error", 0)
    assert "at least 50 pixels" in str(answer.error)
    assert harness.service.requests == []
    assert harness.client.key(solid_image())


def test_an_encoding_that_fails_leaves_no_place_taken(
    build_harness: HarnessBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = build_harness(ok_response())

    def refuse(*_: Any) -> Any:
        raise BadRequest("this class name can't be asked for")

    monkeypatch.setattr(type(harness.client._adapter), "encode", refuse)
    with pytest.raises(BadRequest):
        _detect(harness)
    assert harness.service.requests == []
    stats = harness.governor.stats()
    assert (stats.in_flight, stats.calls) == (0, 0)


def test_the_size_limit_is_part_of_the_question(build_harness: HarnessBuilder) -> None:
    keys = {
        build_harness(
            ok_response(), adapter=InBodyAdapter({"max_side": side})
        ).client.key(solid_image())
        for side in (4096, 2048, 9999)
    }
    assert len(keys) == 2  # 9999 is more than cloud.max_side
    assert build_harness(ok_response(), max_side=2048).client.key(solid_image()) in keys


def test_a_smaller_image_is_sent_and_boxes_come_back_in_the_originals_frame(
    build_harness: HarnessBuilder,
) -> None:
    half = httpx.Response(
        200,
        json={
            "image": {"w": 30, "h": 20},
            "detections": [detection_json(box=(1, 2, 30, 20))],
        },
    )
    harness = build_harness(half, adapter=InBodyAdapter({"max_side": 30}))
    assert harness.client.max_side == 30
    (answer,) = _detect(harness)
    assert answer.raw is not None
    assert answer.raw.boxes[0].tolist() == [2, 4, 60, 40]
