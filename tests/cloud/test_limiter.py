from __future__ import annotations

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coin_ray.cloud.limiter import COOL_DOWN, OPENS_MAX, WINDOW_MIN, Governor, Grant, Limits

from .conftest import FakeTime


def governor(time: FakeTime, spent: tuple[int, float] = (0, 0.0), **limits: float) -> Governor:
    return Governor(Limits(**{"rate": 10.0, "in_flight": 100, **limits}), spent, time)  # type: ignore[arg-type]


def granted(grant: Grant) -> int:
    assert grant.lease is not None
    return grant.lease


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 0.4), min_size=1, max_size=60), st.integers(1, 5))
def test_rate_is_never_exceeded_in_any_window(pauses: list[float], burst: int) -> None:
    time = FakeTime()
    subject = governor(time, burst=burst)
    calls = []
    for pause in pauses:
        time.now += pause
        grant = subject.reserve(0)
        calls.append(time.now + grant.wait)
        subject.settle(granted(grant), "answered", billed=True)
    for i, first in enumerate(calls):
        for j in range(i, len(calls)):
            assert j - i + 1 <= burst + (calls[j] - first) * 10 + 1e-6


def test_waits_of_a_queue() -> None:
    subject = governor(FakeTime(), burst=2)
    assert [subject.reserve(0).wait for _ in range(4)] == pytest.approx([0, 0, 0.1, 0.2])


def test_pause_holds_everybody() -> None:
    time = FakeTime()
    subject = governor(time, burst=3)
    subject.pause(5)
    assert [subject.reserve(0).wait for _ in range(3)] == pytest.approx([5, 5.1, 5.2])
    time.now += 60
    assert subject.reserve(0).wait == 0


def test_places_are_limited_and_freed() -> None:
    subject = governor(FakeTime(), in_flight=2)
    first, _ = subject.reserve(0), subject.reserve(0)
    full = subject.reserve(0)
    assert full.lease is None
    assert full.wait > 0
    assert full.refusal is None
    subject.settle(granted(first), "answered", billed=True)
    assert subject.reserve(0).lease is not None


def test_a_lost_worker_frees_its_place_but_not_its_money() -> None:
    time = FakeTime()
    subject = governor(time, in_flight=1, lease_seconds=60, max_calls=2)
    lost = granted(subject.reserve(0))
    time.now += 61
    assert subject.reserve(0).lease is not None
    subject.settle(lost, "answered", billed=False)
    assert subject.stats().calls == 2


def test_budget_in_calls_and_money() -> None:
    subject = governor(FakeTime(), spent=(3, 0.3), max_calls=5)
    leases = [granted(subject.reserve(0.1)) for _ in range(2)]
    assert subject.reserve(0.1) == Grant(0.05)  # a call under way may turn out not to be billed
    subject.settle(leases[0], "throttled", billed=False)
    leases.append(granted(subject.reserve(0.1)))
    for lease in leases[1:]:
        subject.settle(lease, "answered", billed=True)
    refused = subject.reserve(0.1)
    assert refused.refusal == "budget"
    assert "max_calls=5" in refused.reason
    assert subject.stats().usd == pytest.approx(0.5)
    assert governor(FakeTime(), spent=(3, 0.3), max_usd=0.3).reserve(0.1).refusal == "budget"
    assert governor(FakeTime(), spent=(3, 0.3), max_usd=0.4).reserve(0.1).lease is not None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["reserve", "billed", "refunded"]), st.integers(0, 9)), max_size=80))
def test_budget_is_never_exceeded(steps: list[tuple[str, int]]) -> None:
    subject = governor(FakeTime(), max_calls=7, max_usd=0.65)
    open_leases: list[int] = []
    billed = 0
    for step, which in steps:
        if step == "reserve":
            lease = subject.reserve(0.1).lease
            open_leases += [lease] if lease is not None else []
        elif open_leases:
            subject.settle(open_leases.pop(which % len(open_leases)), "answered", billed=step == "billed")
            billed += step == "billed"
        assert billed + len(open_leases) <= 6
        assert subject.stats().calls == billed + len(open_leases)


def fail(subject: Governor, count: int) -> None:
    for _ in range(count):
        lease = subject.reserve(0).lease
        if lease is not None:
            subject.settle(lease, "failed", billed=False)


def test_breaker_opens_probes_and_closes() -> None:
    time = FakeTime()
    subject = governor(time, rate=1e6)
    fail(subject, WINDOW_MIN - 1)
    assert subject.stats().breaker == "closed"
    fail(subject, 1)
    assert subject.stats().breaker == "open"
    assert subject.reserve(0) == Grant(COOL_DOWN)
    time.now += COOL_DOWN
    probe = granted(subject.reserve(0))
    assert subject.reserve(0).lease is None
    subject.settle(probe, "answered", billed=True)
    assert subject.stats().breaker == "closed"
    assert subject.stats().opens == 0


def test_breaker_gives_up_after_several_opens() -> None:
    time = FakeTime()
    subject = governor(time, rate=1e6)
    fail(subject, WINDOW_MIN)
    for opens in range(1, OPENS_MAX):
        assert subject.reserve(0).wait == pytest.approx(COOL_DOWN * 2 ** (opens - 1))
        time.now += COOL_DOWN * 2 ** (opens - 1)
        fail(subject, 1)
    assert subject.reserve(0).refusal == "unreachable"


def test_breaker_survives_a_cancelled_probe() -> None:
    time = FakeTime()
    subject = governor(time, rate=1e6)
    fail(subject, WINDOW_MIN)
    time.now += COOL_DOWN
    subject.settle(granted(subject.reserve(0)), "unsent", billed=False)
    assert subject.reserve(0).lease is not None


def test_throttling_and_rare_failures_do_not_open_the_breaker() -> None:
    subject = governor(FakeTime(), rate=1e6)
    for i in range(200):
        lease = granted(subject.reserve(0))
        subject.settle(lease, "failed" if i % 3 == 2 else "throttled", billed=False)
    assert subject.stats().breaker == "closed"


def test_everything_that_crosses_processes_can_be_pickled() -> None:
    subject = governor(FakeTime())
    for value in (subject.limits, subject.reserve(0), subject.stats()):
        assert pickle.loads(pickle.dumps(value)) == value
