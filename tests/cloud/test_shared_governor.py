"""One governor for the workers of several processes: here coroutines, with a governor
between them that takes its time."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from coin_ray.cloud import shared_governor
from coin_ray.cloud.governor import Governor, Grant, Limits, Outcome
from coin_ray.cloud.shared_governor import Group, RemoteGovernor, SharedGovernor
from coin_ray.errors import AuthError

WORKERS = 3


class _Service:
    """Counts the calls of all workers."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.calls = 0
        self.in_flight = 0
        self.most_in_flight = 0
        self.keys_in_flight: set[str] = set()
        self.starts: list[float] = []

    async def call(self, key: str) -> None:
        assert key not in self.keys_in_flight, "two calls about one image at a time"
        self.starts.append(asyncio.get_running_loop().time())
        self.calls += 1
        self.in_flight += 1
        self.keys_in_flight.add(key)
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        await asyncio.sleep(self.random.uniform(0, 0.004))
        self.in_flight -= 1
        self.keys_in_flight.remove(key)


class _Workers:
    """Workers of one shared governor. ``groups``: all that they have sent."""

    def __init__(self, governor: Governor, count: int = WORKERS) -> None:
        self.shared = SharedGovernor(governor)
        self.groups: list[Group] = []
        self.remote = [
            RemoteGovernor(self._exchange, f"worker {n}") for n in range(count)
        ]

    async def _exchange(self, group: Group) -> list[Grant | None]:
        self.groups.append(group)
        await asyncio.sleep(0.001)
        grants = await self.shared.exchange(group)
        await asyncio.sleep(0.001)
        return grants


def _run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 30))


async def _lease(governor: RemoteGovernor, key: str, usd: float = 0.0) -> Grant:
    """Return the first answer that is a lease, a refusal or a hint."""
    while True:
        grant = await governor.reserve(usd, key=key)
        if grant.lease is None and not grant.refusal and not grant.answered_elsewhere:
            await asyncio.sleep(grant.wait)
            continue
        await asyncio.sleep(grant.wait)
        return grant


async def _call(
    governor: RemoteGovernor, service: _Service, key: str, outcome: Outcome = "answered"
) -> str:
    """Make one call as a client does; return the refusal, if there was one."""
    grant = await _lease(governor, key)
    if grant.lease is None:
        return grant.refusal or "answered elsewhere"
    await service.call(key)
    await governor.arrived(grant.lease)
    await governor.settle(grant.lease, outcome, billed=True)
    return ""


async def _call_all(workers: _Workers, service: _Service, count: int) -> list[str]:
    calls: list[Awaitable[str]] = [
        _call(workers.remote[number % WORKERS], service, f"key {number}")
        for number in range(count)
    ]
    return await asyncio.gather(*calls)


@pytest.fixture(autouse=True)
def _quick_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_governor, "GROUP_SECONDS", 0.01)


def test_calls_in_flight_are_limited_over_all_workers() -> None:
    service = _Service()

    async def main() -> None:
        workers = _Workers(Governor(Limits(1e6, 5, burst=10_000)))
        assert not any(await _call_all(workers, service, 150))
        await asyncio.sleep(0.05)
        assert workers.shared.governor.free_slots == 5

    _run(main)
    assert service.calls == 150
    assert service.most_in_flight == 5


@pytest.mark.parametrize("limits", [{"max_calls": 40}, {"per_day": 40}])
def test_the_budget_is_spent_to_the_last_call_and_never_exceeded(
    limits: dict[str, int],
) -> None:
    service = _Service()

    async def main() -> None:
        governor = Governor(Limits(1e6, 8, burst=10_000, **limits))
        refusals = await _call_all(_Workers(governor), service, 90)
        assert refusals.count("budget") == 50

    _run(main)
    assert service.calls == 40


def test_the_rate_holds_over_all_workers() -> None:
    service = _Service()

    async def main() -> None:
        workers = _Workers(Governor(Limits(100.0, 50, burst=5)))
        await _call_all(workers, service, 60)

    _run(main)
    for start in service.starts:
        in_window = sum(start <= other < start + 0.2 for other in service.starts)
        assert in_window <= 0.2 * 100 + 5 + 2  # timers of asyncio are a little late


def test_a_call_costs_no_round_trip_of_its_own() -> None:
    service = _Service()
    sent: list[Group] = []

    async def main() -> None:
        workers = _Workers(Governor(Limits(1e6, 1000, burst=10_000)))
        await _call(workers.remote[0], service, "first")
        await _call_all(workers, service, 600)
        sent.extend(workers.groups)

    _run(main)
    assert service.calls == 601
    assert len(sent) < 100


def test_the_first_call_goes_alone_and_its_error_stops_all_workers() -> None:
    service = _Service()

    async def main() -> None:
        workers = _Workers(Governor(Limits(1e6, 50, burst=100)))
        first, *others = workers.remote
        grant = await _lease(first, "a")
        assert grant.lease is not None
        waiting = [asyncio.create_task(_call(w, service, "b")) for w in others]
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in waiting), "the service has not answered"
        await first.settle(grant.lease, "answered", False, AuthError("no such key"))
        assert await asyncio.gather(*waiting) == ["stopped", "stopped"]
        last = await _lease(first, "c")
        assert json.loads(last.reason) == {
            "type": "AuthError",
            "message": "no such key",
        }

    _run(main)
    assert service.calls == 0


def test_a_failed_first_call_lets_the_others_go() -> None:
    service = _Service()

    async def main() -> None:
        workers = _Workers(Governor(Limits(1e6, 50, burst=100)))
        await _call(workers.remote[0], service, "a", "failed")
        assert await _call(workers.remote[1], service, "b") == ""

    _run(main)


def test_an_image_is_called_about_by_one_worker_and_the_others_hear_of_it() -> None:
    service = _Service()

    async def main() -> None:
        workers = _Workers(Governor(Limits(1e6, 50, burst=100)))
        await _call(workers.remote[0], service, "warm")
        results = await asyncio.gather(
            *(_call(worker, service, "same") for worker in workers.remote)
        )
        assert sorted(results) == ["", "answered elsewhere", "answered elsewhere"]
        # they have looked now: the journal has no answer that can be used
        repeated = await asyncio.gather(
            *(_call(worker, service, "same") for worker in workers.remote[:2])
        )
        assert sorted(repeated) == ["", "answered elsewhere"]

    _run(main)
    assert service.calls == 3


def test_a_worker_that_ended_holds_no_slot_and_its_calls_stay_spent() -> None:
    async def main() -> None:
        workers = _Workers(Governor(Limits(1e6, 1, max_calls=3, burst=100)))
        ended, other, _ = workers.remote
        await _call(ended, _Service(), "a")
        await _lease(ended, "b")
        waiting = asyncio.create_task(_lease(ended, "x"))
        await asyncio.sleep(0.05)
        workers.shared.end_worker("worker 0")
        assert workers.shared.governor.free_slots == 1
        last = await _lease(other, "c")
        assert last.lease is not None
        await other.settle(last.lease, "answered", billed=True)
        assert (await _lease(other, "d")).refusal == "budget"
        assert not waiting.done()
        waiting.cancel()

    _run(main)


def test_pauses_and_the_breaker_are_shared() -> None:
    service = _Service()

    async def main() -> None:
        workers = _Workers(Governor(Limits(1e6, 50, burst=100)))
        first, second, _ = workers.remote
        await _call(first, service, "warm")
        await first.pause(0.3)
        await asyncio.sleep(0.05)
        started = asyncio.get_running_loop().time()
        await _call(second, service, "a")
        assert service.starts[-1] - started >= 0.2
        for number in range(8):
            await _call(first, service, f"failing {number}", "failed")
        await asyncio.sleep(0.05)
        grant = await second.reserve(0.0, key="b")
        assert grant.breaker_open

    _run(main)


def test_a_cancelled_call_gives_its_lease_back() -> None:
    async def main() -> None:
        governor = Governor(Limits(1e6, 1, max_calls=2, burst=100))
        workers = _Workers(governor)
        first, second, _ = workers.remote
        grant = await _lease(first, "a")
        assert grant.lease is not None
        waiting = asyncio.create_task(_lease(second, "b"))
        await asyncio.sleep(0.05)
        waiting.cancel()
        await first.settle(grant.lease, "answered", billed=True)
        await asyncio.sleep(0.1)
        assert governor.free_slots == 1
        assert governor.stats().calls == 1

    _run(main)
