from __future__ import annotations

import asyncio
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coin_ray.cloud.governor import (
    COOL_DOWN,
    DAY,
    MINUTE,
    OPENS_MAX,
    RETRY_SHARE,
    WINDOW_MIN,
    Governor,
    Grant,
    Limits,
    LocalGovernor,
    Window,
)

from .conftest import FakeTime


def governor(
    time: FakeTime, spent: tuple[int, float] = (0, 0.0), **limits: float
) -> Governor:
    return Governor(Limits(**{"rate": 10.0, "in_flight": 100, **limits}), spent, time)  # type: ignore[arg-type]


def granted(grant: Grant) -> int:
    assert grant.lease is not None
    return grant.lease


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
    assert [subject.reserve(0).wait for _ in range(4)] == pytest.approx(
        [0, 0, 0.1, 0.2]
    )


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
    # a call under way may turn out not to be billed
    assert subject.reserve(0.1) == Grant(0.05)
    subject.settle(leases[0], "throttled", billed=False)
    leases.append(granted(subject.reserve(0.1)))
    for lease in leases[1:]:
        subject.settle(lease, "answered", billed=True)
    refused = subject.reserve(0.1)
    assert refused.refusal == "budget"
    assert "max_calls=5" in refused.reason
    assert subject.stats().usd == pytest.approx(0.5)
    assert (
        governor(FakeTime(), spent=(3, 0.3), max_usd=0.3).reserve(0.1).refusal
        == "budget"
    )
    assert (
        governor(FakeTime(), spent=(3, 0.3), max_usd=0.4).reserve(0.1).lease is not None
    )


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["reserve", "billed", "refunded"]), st.integers(0, 9)
        ),
        max_size=80,
    )
)
def test_budget_is_never_exceeded(steps: list[tuple[str, int]]) -> None:
    subject = governor(FakeTime(), max_calls=7, max_usd=0.65)
    open_leases: list[int] = []
    billed = 0
    for step, which in steps:
        if step == "reserve":
            lease = subject.reserve(0.1).lease
            open_leases += [lease] if lease is not None else []
        elif open_leases:
            subject.settle(
                open_leases.pop(which % len(open_leases)),
                "answered",
                billed=step == "billed",
            )
            billed += step == "billed"
        assert billed + len(open_leases) <= 6
        assert subject.stats().calls == billed + len(open_leases)


def call_all_day(
    subject: Governor, time: FakeTime, calls: int, pause: float = 0.0
) -> list[float]:
    """Starts of so many calls by a caller that asks again whenever it is told to."""
    starts: list[float] = []
    while len(starts) < calls:
        grant = subject.reserve(0)
        assert grant.refusal is None
        if grant.lease is None:
            time.now += grant.wait
            continue
        starts.append(time.now + grant.wait)
        subject.settle(grant.lease, "answered", billed=True)
        time.now += pause
    return starts


@pytest.mark.parametrize(
    ("per_minute", "calls", "seconds"),
    [(30, 30, 60), (1, 1, 60), (1.5, 1, 40), (0.5, 1, 120), (90.9, 90, 59.4)],
)
@pytest.mark.parametrize("pause", [0.0, 0.7])
def test_calls_of_a_minute(
    per_minute: float, calls: int, seconds: float, pause: float
) -> None:
    time = FakeTime()
    starts = call_all_day(
        governor(time, rate=100.0, per_minute=per_minute), time, 4 * calls, pause
    )
    for first, later in zip(starts, starts[calls:], strict=False):
        assert later - first >= seconds - 1e-3
    own_pace = calls * (pause + 0.01)
    # and no slower than that
    assert starts[-1] - starts[0] <= 3 * max(seconds, own_pace) + own_pace + 1


@given(st.lists(st.floats(0, 40), min_size=1, max_size=60), st.integers(1, 7))
def test_no_minute_holds_more_calls_than_allowed(
    pauses: list[float], limit: int
) -> None:
    time = FakeTime()
    subject = governor(time, rate=1000.0, per_minute=limit, burst=3)
    starts: list[float] = []
    for pause in pauses:
        time.now += pause
        grant = subject.reserve(0)
        if grant.lease is not None:
            starts.append(time.now + grant.wait)
            # the service counts it all the same
            subject.settle(grant.lease, "throttled", billed=False)
    for i, first in enumerate(starts):
        assert sum(start < first + MINUTE - 1e-6 for start in starts[i:]) <= limit


def test_a_call_that_was_not_sent_is_not_counted() -> None:
    time = FakeTime()
    subject = governor(time, rate=1e6, per_minute=2, per_day=2)
    subject.settle(granted(subject.reserve(0)), "unsent", billed=False)
    for _ in range(2):
        subject.settle(granted(subject.reserve(0)), "answered", billed=True)
    assert subject.reserve(0).lease is None


def test_calls_of_a_day() -> None:
    time = FakeTime()
    subject = governor(time, per_day=3)
    first = time.now
    leases = [granted(subject.reserve(0)) for _ in range(3)]
    # one of those under way may not be sent after all
    assert subject.reserve(0).refusal is None
    for lease in leases:
        subject.settle(lease, "answered", billed=True)
    refused = subject.reserve(0)
    assert refused.refusal == "budget"
    assert "cloud.per_day=3" in refused.reason
    assert "24.0 hours" in refused.reason
    time.now = first + DAY + 0.01
    subject.settle(granted(subject.reserve(0)), "answered", billed=True)
    assert subject.reserve(0).refusal == "budget"


def test_calls_of_earlier_runs_count_for_the_day() -> None:
    time = FakeTime()
    subject = Governor(
        Limits(10.0, 100, per_day=3), (50, 0.0), time, ages=[60.0, DAY - 100, 7200.0]
    )
    refused = subject.reserve(0)
    assert (refused.refusal, refused.lease) == ("budget", None)
    assert "cloud.per_day=3" in refused.reason
    time.now += 99
    assert subject.reserve(0).refusal == "budget"
    time.now += 1
    subject.settle(granted(subject.reserve(0)), "answered", billed=True)
    assert subject.reserve(0).refusal == "budget"


def test_more_calls_than_the_day_allows_were_made_before() -> None:
    """The limit was lowered, or another version did not count: the latest calls are
    those that matter."""
    time = FakeTime()
    subject = Governor(
        Limits(10.0, 100, per_day=2), clock=time, ages=[1000.0, 10.0, 500.0, 100.0]
    )
    time.now += DAY - 101
    assert subject.reserve(0).refusal == "budget"
    time.now += 2
    assert subject.reserve(0).lease is not None


def test_a_window_without_a_limit() -> None:
    window = Window(None, 60)
    window.add(1.0)
    window.remove(1.0)
    assert window.wait(1.0) == 0


@given(st.lists(st.booleans(), max_size=300), st.integers(0, 20))
def test_retries_are_a_share_of_the_calls(kinds: list[bool], burst: int) -> None:
    subject = governor(FakeTime(), rate=1e6, retry_burst=burst)
    calls = retries = 0
    for retry in kinds:
        grant = subject.reserve(0, retry)
        if grant.lease is None:
            assert retry
            assert grant.refusal == "retries"
            assert retries + 1 > burst - 1 + RETRY_SHARE * calls - 1e-6 or burst == 0
            continue
        subject.settle(grant.lease, "throttled", billed=False)
        calls, retries = calls + (not retry), retries + retry
        assert retries <= burst + RETRY_SHARE * calls + 1e-6


def test_a_long_good_time_does_not_save_up_retries() -> None:
    subject = governor(FakeTime(), rate=1e6, retry_burst=5)
    for retry in [False] * 1000 + [True] * 5:
        subject.settle(granted(subject.reserve(0, retry)), "answered", billed=True)
    assert subject.reserve(0, retry=True).refusal == "retries"
    assert subject.reserve(0).refusal is None


def test_a_retry_that_was_not_sent_is_given_back() -> None:
    subject = governor(FakeTime(), rate=1e6, retry_burst=1)
    for _ in range(3):
        subject.settle(granted(subject.reserve(0, retry=True)), "unsent", billed=False)
    granted(subject.reserve(0, retry=True))
    assert subject.reserve(0, retry=True).refusal == "retries"


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
    assert subject.reserve(0) == Grant(COOL_DOWN, breaker_open=True)
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


def test_an_answer_that_has_arrived_frees_its_place_once_and_is_settled_later() -> None:
    subject = governor(FakeTime(), in_flight=2, max_calls=3)
    first, _ = granted(subject.reserve(0)), granted(subject.reserve(0))
    assert subject.reserve(0).full
    subject.arrived(first)
    subject.arrived(first)
    assert subject.stats().in_flight == 1
    third = granted(subject.reserve(0))
    subject.settle(first, "answered", billed=False)
    assert subject.stats().in_flight == 2
    assert subject.stats().calls == 2  # the first was given back
    assert subject.reserve(0).full
    subject.settle(third, "answered", billed=True)
    assert subject.reserve(0).lease is not None


async def waiting(
    subject: LocalGovernor, count: int, done: list[int]
) -> list[asyncio.Task[Grant]]:
    """Callers in this order, that note when their wait is over."""

    async def call(number: int) -> Grant:
        grant = await subject.reserve(0)
        done.append(number)
        return grant

    callers = [asyncio.create_task(call(number)) for number in range(count)]
    await asyncio.sleep(0)
    return callers


def test_free_places_go_to_the_callers_that_wait_longest() -> None:
    async def run() -> None:
        subject, done = (
            LocalGovernor(governor(FakeTime(), in_flight=2, burst=9)),
            list[int](),
        )
        held = [granted(await subject.reserve(0)) for _ in range(2)]
        callers = await waiting(subject, 3, done)
        assert done == []
        await subject.arrived(held[0])
        assert granted(await callers[0])
        assert done == [0]
        await subject.settle(held[0], "answered", True)  # no second place
        await asyncio.sleep(0.01)
        assert done == [0]
        await subject.settle(held[1], "answered", True)
        assert granted(await callers[1])
        callers[2].cancel()

    asyncio.run(asyncio.wait_for(run(), 10))


def test_a_caller_that_gives_up_passes_its_turn_on() -> None:
    async def run() -> None:
        subject, done = (
            LocalGovernor(governor(FakeTime(), in_flight=1, burst=9)),
            list[int](),
        )
        held = granted(await subject.reserve(0))
        callers = await waiting(subject, 2, done)
        await subject.arrived(held)
        callers[0].cancel()  # called, but not yet awake
        assert granted(await callers[1])
        assert done == [1]

    asyncio.run(asyncio.wait_for(run(), 10))


def test_everybody_hears_that_the_budget_is_spent() -> None:
    async def run() -> None:
        subject, done = (
            LocalGovernor(governor(FakeTime(), in_flight=1, burst=9, max_calls=2)),
            list[int](),
        )
        held = granted(await subject.reserve(0))
        callers = await waiting(subject, 20, done)
        assert done == []
        await subject.settle(held, "answered", True)
        await subject.settle(granted(await callers[0]), "answered", True)
        assert [(await caller).refusal for caller in callers[1:]] == ["budget"] * 19

    asyncio.run(asyncio.wait_for(run(), 10))


def test_everybody_hears_that_the_breaker_is_open() -> None:
    async def run() -> None:
        time, done = FakeTime(), list[int]()
        inner = governor(time, rate=1e6, in_flight=WINDOW_MIN)
        subject = LocalGovernor(inner)
        held = [granted(inner.reserve(0)) for _ in range(WINDOW_MIN)]
        callers = await waiting(subject, 30, done)
        for lease in held:
            await subject.settle(lease, "failed", False)
        assert inner.stats().breaker == "open"
        assert [(await caller).breaker_open for caller in callers] == [True] * 30

    asyncio.run(asyncio.wait_for(run(), 10))
