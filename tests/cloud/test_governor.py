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
    CallWindow,
    Governor,
    Grant,
    Limits,
    LocalGovernor,
)

from .conftest import FakeTime


def _new_governor(
    time: FakeTime, spent: tuple[int, float] = (0, 0.0), **limits: float
) -> Governor:
    all_limits = {"rate": 10.0, "in_flight": 100, **limits}
    return Governor(Limits(**all_limits), spent, time)  # type: ignore[arg-type]


def _granted_lease(grant: Grant) -> int:
    assert grant.lease is not None
    return grant.lease


@given(st.lists(st.floats(0, 0.4), min_size=1, max_size=60), st.integers(1, 5))
def test_rate_is_never_exceeded_in_any_window(pauses: list[float], burst: int) -> None:
    time = FakeTime()
    governor = _new_governor(time, burst=burst)
    calls = []
    for pause in pauses:
        time.now += pause
        grant = governor.reserve(0)
        calls.append(time.now + grant.wait)
        governor.settle(_granted_lease(grant), "answered", billed=True)
    for i, first in enumerate(calls):
        for j in range(i, len(calls)):
            assert j - i + 1 <= burst + (calls[j] - first) * 10 + 1e-6


def test_waits_of_a_queue() -> None:
    governor = _new_governor(FakeTime(), burst=2)
    assert [governor.reserve(0).wait for _ in range(4)] == pytest.approx(
        [0, 0, 0.1, 0.2]
    )


def test_pause_holds_everybody() -> None:
    time = FakeTime()
    governor = _new_governor(time, burst=3)
    governor.pause(5)
    assert [governor.reserve(0).wait for _ in range(3)] == pytest.approx([5, 5.1, 5.2])
    time.now += 60
    assert governor.reserve(0).wait == 0


def test_places_are_limited_and_freed() -> None:
    governor = _new_governor(FakeTime(), in_flight=2)
    first, _ = governor.reserve(0), governor.reserve(0)
    full = governor.reserve(0)
    assert full.lease is None
    assert full.wait > 0
    assert full.refusal is None
    governor.settle(_granted_lease(first), "answered", billed=True)
    assert governor.reserve(0).lease is not None


def test_a_lost_worker_frees_its_place_but_not_its_money() -> None:
    time = FakeTime()
    governor = _new_governor(time, in_flight=1, lease_seconds=60, max_calls=2)
    lost = _granted_lease(governor.reserve(0))
    time.now += 61
    assert governor.reserve(0).lease is not None
    governor.settle(lost, "answered", billed=False)
    assert governor.stats().calls == 2


def test_budget_in_calls_and_money() -> None:
    governor = _new_governor(FakeTime(), spent=(3, 0.3), max_calls=5)
    leases = [_granted_lease(governor.reserve(0.1)) for _ in range(2)]
    # a call under way may turn out not to be billed
    assert governor.reserve(0.1) == Grant(0.05)
    governor.settle(leases[0], "throttled", billed=False)
    leases.append(_granted_lease(governor.reserve(0.1)))
    for lease in leases[1:]:
        governor.settle(lease, "answered", billed=True)
    refused = governor.reserve(0.1)
    assert refused.refusal == "budget"
    assert "max_calls=5" in refused.reason
    assert governor.stats().usd == pytest.approx(0.5)
    spent_up = _new_governor(FakeTime(), spent=(3, 0.3), max_usd=0.3)
    assert spent_up.reserve(0.1).refusal == "budget"
    one_left = _new_governor(FakeTime(), spent=(3, 0.3), max_usd=0.4)
    assert one_left.reserve(0.1).lease is not None


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["reserve", "billed", "refunded"]), st.integers(0, 9)
        ),
        max_size=80,
    )
)
def test_budget_is_never_exceeded(steps: list[tuple[str, int]]) -> None:
    governor = _new_governor(FakeTime(), max_calls=7, max_usd=0.65)
    open_leases: list[int] = []
    billed = 0
    for step, index in steps:
        if step == "reserve":
            new_lease = governor.reserve(0.1).lease
            open_leases += [new_lease] if new_lease is not None else []
        elif open_leases:
            lease = open_leases.pop(index % len(open_leases))
            governor.settle(lease, "answered", billed=step == "billed")
            billed += step == "billed"
        assert billed + len(open_leases) <= 6
        assert governor.stats().calls == billed + len(open_leases)


def _call_repeatedly(
    governor: Governor, time: FakeTime, calls: int, pause: float = 0.0
) -> list[float]:
    """Return the starts of so many calls by a caller that waits whenever it must."""
    starts: list[float] = []
    while len(starts) < calls:
        grant = governor.reserve(0)
        assert grant.refusal is None
        if grant.lease is None:
            time.now += grant.wait
            continue
        starts.append(time.now + grant.wait)
        governor.settle(grant.lease, "answered", billed=True)
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
    starts = _call_repeatedly(
        _new_governor(time, rate=100.0, per_minute=per_minute), time, 4 * calls, pause
    )
    for first, later in zip(starts, starts[calls:], strict=False):
        assert later - first >= seconds - 1e-3
    unlimited_seconds = calls * (pause + 0.01)
    # and no slower than that
    assert (
        starts[-1] - starts[0]
        <= 3 * max(seconds, unlimited_seconds) + unlimited_seconds + 1
    )


@given(st.lists(st.floats(0, 40), min_size=1, max_size=60), st.integers(1, 7))
def test_no_minute_holds_more_calls_than_allowed(
    pauses: list[float], limit: int
) -> None:
    time = FakeTime()
    governor = _new_governor(time, rate=1000.0, per_minute=limit, burst=3)
    starts: list[float] = []
    for pause in pauses:
        time.now += pause
        grant = governor.reserve(0)
        if grant.lease is not None:
            starts.append(time.now + grant.wait)
            # the service counts it all the same
            governor.settle(grant.lease, "throttled", billed=False)
    for i, first in enumerate(starts):
        assert sum(start < first + MINUTE - 1e-6 for start in starts[i:]) <= limit


def test_a_call_that_was_not_sent_is_not_counted() -> None:
    time = FakeTime()
    governor = _new_governor(time, rate=1e6, per_minute=2, per_day=2)
    governor.settle(_granted_lease(governor.reserve(0)), "unsent", billed=False)
    for _ in range(2):
        governor.settle(_granted_lease(governor.reserve(0)), "answered", billed=True)
    assert governor.reserve(0).lease is None


def test_calls_of_a_day() -> None:
    time = FakeTime()
    governor = _new_governor(time, per_day=3)
    first = time.now
    leases = [_granted_lease(governor.reserve(0)) for _ in range(3)]
    # one of those under way may not be sent after all
    assert governor.reserve(0).refusal is None
    for lease in leases:
        governor.settle(lease, "answered", billed=True)
    refused = governor.reserve(0)
    assert refused.refusal == "budget"
    assert "cloud.per_day=3" in refused.reason
    assert "24.0 hours" in refused.reason
    time.now = first + DAY + 0.01
    governor.settle(_granted_lease(governor.reserve(0)), "answered", billed=True)
    assert governor.reserve(0).refusal == "budget"


def test_calls_of_earlier_runs_count_for_the_day() -> None:
    time = FakeTime()
    governor = Governor(
        Limits(10.0, 100, per_day=3), (50, 0.0), time, ages=[60.0, DAY - 100, 7200.0]
    )
    refused = governor.reserve(0)
    assert (refused.refusal, refused.lease) == ("budget", None)
    assert "cloud.per_day=3" in refused.reason
    time.now += 99
    assert governor.reserve(0).refusal == "budget"
    time.now += 1
    governor.settle(_granted_lease(governor.reserve(0)), "answered", billed=True)
    assert governor.reserve(0).refusal == "budget"


def test_more_calls_than_the_day_allows_were_made_before() -> None:
    """The latest calls count if the limit was lowered, or another version did not count."""
    time = FakeTime()
    governor = Governor(
        Limits(10.0, 100, per_day=2), clock=time, ages=[1000.0, 10.0, 500.0, 100.0]
    )
    time.now += DAY - 101
    assert governor.reserve(0).refusal == "budget"
    time.now += 2
    assert governor.reserve(0).lease is not None


def test_a_window_without_a_limit() -> None:
    window = CallWindow(None, 60)
    window.add(1.0)
    window.remove(1.0)
    assert window.wait(1.0) == 0


@given(st.lists(st.booleans(), max_size=300), st.integers(0, 20))
def test_retries_are_a_share_of_the_calls(kinds: list[bool], burst: int) -> None:
    governor = _new_governor(FakeTime(), rate=1e6, retry_burst=burst)
    calls = retries = 0
    for retry in kinds:
        grant = governor.reserve(0, retry)
        if grant.lease is None:
            assert retry
            assert grant.refusal == "retries"
            assert retries + 1 > burst - 1 + RETRY_SHARE * calls - 1e-6 or burst == 0
            continue
        governor.settle(grant.lease, "throttled", billed=False)
        calls, retries = calls + (not retry), retries + retry
        assert retries <= burst + RETRY_SHARE * calls + 1e-6


def test_a_long_good_time_does_not_save_up_retries() -> None:
    governor = _new_governor(FakeTime(), rate=1e6, retry_burst=5)
    for retry in [False] * 1000 + [True] * 5:
        governor.settle(
            _granted_lease(governor.reserve(0, retry)), "answered", billed=True
        )
    assert governor.reserve(0, retry=True).refusal == "retries"
    assert governor.reserve(0).refusal is None


def test_a_retry_that_was_not_sent_is_given_back() -> None:
    governor = _new_governor(FakeTime(), rate=1e6, retry_burst=1)
    for _ in range(3):
        governor.settle(
            _granted_lease(governor.reserve(0, retry=True)), "unsent", billed=False
        )
    _granted_lease(governor.reserve(0, retry=True))
    assert governor.reserve(0, retry=True).refusal == "retries"


def _fail_calls(governor: Governor, count: int) -> None:
    for _ in range(count):
        lease = governor.reserve(0).lease
        if lease is not None:
            governor.settle(lease, "failed", billed=False)


def test_breaker_opens_probes_and_closes() -> None:
    time = FakeTime()
    governor = _new_governor(time, rate=1e6)
    _fail_calls(governor, WINDOW_MIN - 1)
    assert governor.stats().breaker == "closed"
    _fail_calls(governor, 1)
    assert governor.stats().breaker == "open"
    assert governor.reserve(0) == Grant(COOL_DOWN, breaker_open=True)
    time.now += COOL_DOWN
    probe = _granted_lease(governor.reserve(0))
    assert governor.reserve(0).lease is None
    governor.settle(probe, "answered", billed=True)
    assert governor.stats().breaker == "closed"
    assert governor.stats().opens == 0


def test_breaker_gives_up_after_several_opens() -> None:
    time = FakeTime()
    governor = _new_governor(time, rate=1e6)
    _fail_calls(governor, WINDOW_MIN)
    for opens in range(1, OPENS_MAX):
        assert governor.reserve(0).wait == pytest.approx(COOL_DOWN * 2 ** (opens - 1))
        time.now += COOL_DOWN * 2 ** (opens - 1)
        _fail_calls(governor, 1)
    assert governor.reserve(0).refusal == "unreachable"


def test_breaker_survives_a_cancelled_probe() -> None:
    time = FakeTime()
    governor = _new_governor(time, rate=1e6)
    _fail_calls(governor, WINDOW_MIN)
    time.now += COOL_DOWN
    governor.settle(_granted_lease(governor.reserve(0)), "unsent", billed=False)
    assert governor.reserve(0).lease is not None


def test_throttling_and_rare_failures_do_not_open_the_breaker() -> None:
    governor = _new_governor(FakeTime(), rate=1e6)
    for i in range(200):
        lease = _granted_lease(governor.reserve(0))
        governor.settle(lease, "failed" if i % 3 == 2 else "throttled", billed=False)
    assert governor.stats().breaker == "closed"


def test_everything_that_crosses_processes_can_be_pickled() -> None:
    governor = _new_governor(FakeTime())
    for message in (governor.limits, governor.reserve(0), governor.stats()):
        assert pickle.loads(pickle.dumps(message)) == message


def test_an_answer_that_has_arrived_frees_its_place_once_and_is_settled_later() -> None:
    governor = _new_governor(FakeTime(), in_flight=2, max_calls=3)
    first, _ = _granted_lease(governor.reserve(0)), _granted_lease(governor.reserve(0))
    assert governor.reserve(0).full
    governor.arrived(first)
    governor.arrived(first)
    assert governor.stats().in_flight == 1
    third = _granted_lease(governor.reserve(0))
    governor.settle(first, "answered", billed=False)
    assert governor.stats().in_flight == 2
    assert governor.stats().calls == 2  # the first was given back
    assert governor.reserve(0).full
    governor.settle(third, "answered", billed=True)
    assert governor.reserve(0).lease is not None


async def _start_callers(
    governor: LocalGovernor, count: int, finished: list[int]
) -> list[asyncio.Task[Grant]]:
    """Start callers in this order; each appends its number once its wait is over."""

    async def call(number: int) -> Grant:
        grant = await governor.reserve(0)
        finished.append(number)
        return grant

    callers = [asyncio.create_task(call(number)) for number in range(count)]
    await asyncio.sleep(0)
    return callers


def test_free_places_go_to_the_callers_that_wait_longest() -> None:
    async def run() -> None:
        governor = LocalGovernor(_new_governor(FakeTime(), in_flight=2, burst=9))
        finished: list[int] = []
        leases = [_granted_lease(await governor.reserve(0)) for _ in range(2)]
        callers = await _start_callers(governor, 3, finished)
        assert finished == []
        await governor.arrived(leases[0])
        assert _granted_lease(await callers[0])
        assert finished == [0]
        await governor.settle(leases[0], "answered", True)  # no second place
        await asyncio.sleep(0.01)
        assert finished == [0]
        await governor.settle(leases[1], "answered", True)
        assert _granted_lease(await callers[1])
        callers[2].cancel()

    asyncio.run(asyncio.wait_for(run(), 10))


def test_a_caller_that_gives_up_passes_its_turn_on() -> None:
    async def run() -> None:
        governor = LocalGovernor(_new_governor(FakeTime(), in_flight=1, burst=9))
        finished: list[int] = []
        leases = _granted_lease(await governor.reserve(0))
        callers = await _start_callers(governor, 2, finished)
        await governor.arrived(leases)
        callers[0].cancel()  # called, but not yet awake
        assert _granted_lease(await callers[1])
        assert finished == [1]

    asyncio.run(asyncio.wait_for(run(), 10))


def test_everybody_hears_that_the_budget_is_spent() -> None:
    async def run() -> None:
        governor = LocalGovernor(
            _new_governor(FakeTime(), in_flight=1, burst=9, max_calls=2)
        )
        finished: list[int] = []
        leases = _granted_lease(await governor.reserve(0))
        callers = await _start_callers(governor, 20, finished)
        assert finished == []
        await governor.settle(leases, "answered", True)
        await governor.settle(_granted_lease(await callers[0]), "answered", True)
        assert [(await caller).refusal for caller in callers[1:]] == ["budget"] * 19

    asyncio.run(asyncio.wait_for(run(), 10))


def test_everybody_hears_that_the_breaker_is_open() -> None:
    async def run() -> None:
        time = FakeTime()
        finished: list[int] = []
        inner = _new_governor(time, rate=1e6, in_flight=WINDOW_MIN)
        governor = LocalGovernor(inner)
        leases = [_granted_lease(inner.reserve(0)) for _ in range(WINDOW_MIN)]
        callers = await _start_callers(governor, 30, finished)
        for lease in leases:
            await governor.settle(lease, "failed", False)
        assert inner.stats().breaker == "open"
        assert [(await caller).breaker_open for caller in callers] == [True] * 30

    asyncio.run(asyncio.wait_for(run(), 10))
