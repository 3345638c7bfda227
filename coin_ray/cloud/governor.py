"""One governor for all workers: call rate, calls under way, calls per minute and day,
retries, budget and circuit breaker.

``Governor`` is a plain class without threads or sleeping: it says how long to wait, its
callers wait. One instance serves a whole run, behind an actor; ``LocalGovernor`` gives
it the same asynchronous face inside one process.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

LEASE_POLL = 0.05
"""Seconds after which a caller that found all places taken asks again."""
WINDOW = 50
WINDOW_MIN = 10
FAILURE_SHARE = 0.5
COOL_DOWN = 5.0
"""Seconds the breaker stays open the first time; doubles each time in a row."""
OPENS_MAX = 4
"""The breaker gives up when it opens this often in a row."""
USD_TOLERANCE = 1e-9
MINUTE, DAY = 60.0, 86_400.0
RETRY_SHARE = 0.1
"""Retries that each first call earns for all."""

Outcome = Literal["answered", "throttled", "failed", "unsent"]
Refusal = Literal["budget", "unreachable", "retries"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What all workers together may do.

    ``lease_seconds``: after this long a worker that never came back frees its place.
    ``retry_burst``: retries beyond a tenth of the calls.
    """

    rate: float
    in_flight: int
    max_calls: int | None = None
    max_usd: float | None = None
    burst: int = 1
    lease_seconds: float = 180.0
    per_minute: float | None = None
    per_day: int | None = None
    retry_burst: int = 20


@dataclass(frozen=True, slots=True)
class Grant:
    """Answer to ``reserve``: a lease to use after ``wait`` seconds; or no lease, ask
    again after ``wait``; or a refusal for good.
    """

    wait: float
    lease: int | None = None
    refusal: Refusal | None = None
    reason: str = ""
    breaker_open: bool = False
    """It is the breaker that makes the caller wait."""
    full: bool = False
    """It is the calls under way."""


@dataclass(frozen=True, slots=True)
class GovernorStats:
    calls: int
    usd: float
    in_flight: int
    answered: int
    throttled: int
    failed: int
    breaker: str
    opens: int


class AsyncGovernor(Protocol):
    """How a client sees the governor, wherever it lives."""

    async def reserve(self, usd: float, retry: bool = False) -> Grant: ...

    async def arrived(self, lease: int) -> None: ...

    async def settle(self, lease: int, outcome: Outcome, billed: bool) -> None: ...

    async def pause(self, seconds: float) -> None: ...

    async def stats(self) -> GovernorStats: ...


@dataclass(slots=True)
class _Lease:
    usd: float
    start: float
    expires: float
    retry: bool
    arrived: bool = False


class Governor:
    """Grants calls. From the journal, of earlier runs: ``spent``, calls and USD of the
    same budget; ``ages``, seconds ago of today's calls.
    """

    def __init__(
        self,
        limits: Limits,
        spent: tuple[int, float] = (0, 0.0),
        clock: Callable[[], float] = time.monotonic,
        ages: Iterable[float] = (),
    ) -> None:
        self.limits = limits
        self._clock = clock
        self._calls, self._usd = spent
        self._next_arrival = clock()
        self._leases: dict[int, _Lease] = {}
        self._under_way = 0
        self._granted = 0
        self._counts: dict[Outcome, int] = {
            "answered": 0,
            "throttled": 0,
            "failed": 0,
            "unsent": 0,
        }
        self._breaker = Breaker(clock)
        self._minute = Window.of_rate(limits.per_minute, MINUTE)
        self._day = Window(limits.per_day, DAY)
        for age in sorted(ages, reverse=True):
            self._day.add(clock() - age)
        self._retries = float(limits.retry_burst)

    @property
    def free(self) -> int:
        """Places for calls."""
        return max(0, self.limits.in_flight - self._under_way)

    def reserve(self, usd: float, retry: bool = False) -> Grant:
        """A place, a slot of the rate and ``usd`` of the budget, or the time after
        which to ask again.

        A spent budget is refused once no call is under way: until then one may turn out
        not to be billed. A ``retry`` is refused when retries exceed their share of the
        calls: repeating what a service in trouble refuses keeps it there.
        """
        self._forget_expired()
        if self._breaker.gave_up:
            return Grant(
                0,
                refusal="unreachable",
                reason=f"the breaker opened {OPENS_MAX} times in a row",
            )
        over_budget = self._over_budget(usd)
        if over_budget:
            return (
                Grant(LEASE_POLL)
                if self._leases
                else Grant(0, refusal="budget", reason=over_budget)
            )
        if retry and self._retries < 1:
            return Grant(
                0,
                refusal="retries",
                reason=(
                    f"retries are limited to {RETRY_SHARE:.0%} of the calls; a lower"
                    " cloud.rate may help"
                ),
            )
        if not self.free:
            return Grant(LEASE_POLL, full=True)
        breaker_wait = self._breaker.wait()
        wait = max(breaker_wait, self._minute.wait(self._clock()))
        if wait > 0:
            return Grant(wait, breaker_open=breaker_wait > 0)
        return self._grant(usd, retry)

    def arrived(self, lease: int) -> None:
        """The answer is here, the service can be asked something else; what it cost is
        settled once the answer is kept.
        """
        held = self._leases.get(lease)
        if held is not None and not held.arrived:
            held.arrived = True
            self._under_way -= 1

    def settle(self, lease: int, outcome: Outcome, billed: bool) -> None:
        """The call is over. ``billed`` false: the service surely did not count it, so
        the budget gets it back.
        """
        self.arrived(lease)
        held = self._leases.pop(lease, None)
        if held is None:
            return
        if not billed:
            self._calls -= 1
            self._usd -= held.usd
        if outcome == "unsent":
            self._minute.remove(held.start)
            self._day.remove(held.start)
            self._earn(held.retry, -1)
        self._counts[outcome] += 1
        self._breaker.record(lease, outcome)

    def pause(self, seconds: float) -> None:
        """Nobody calls for ``seconds``; afterwards the rate applies without a burst."""
        resume = self._clock() + seconds + (self.limits.burst - 1) / self.limits.rate
        self._next_arrival = max(self._next_arrival, resume)

    def stats(self) -> GovernorStats:
        counts, breaker = self._counts, self._breaker
        numbers = (
            self._calls,
            self._usd,
            self._under_way,
            counts["answered"],
            counts["throttled"],
            counts["failed"],
        )
        return GovernorStats(*numbers, breaker.state, breaker.opens)

    def _earn(self, retry: bool, count: int = 1) -> None:
        """A first call earns a part of a retry, a retry costs one; ``count`` -1 takes
        that back.
        """
        self._retries = min(
            self._retries + count * (-1.0 if retry else RETRY_SHARE),
            float(self.limits.retry_burst),
        )

    def _grant(self, usd: float, retry: bool) -> Grant:
        """GCRA: a call may arrive ``burst - 1`` intervals before its theoretical
        arrival time.
        """
        now, interval = self._clock(), 1 / self.limits.rate
        arrival = max(self._next_arrival, now)
        self._next_arrival = arrival + interval
        wait = max(0.0, arrival - (self.limits.burst - 1) * interval - now)
        self._granted += 1
        self._calls += 1
        self._usd += usd
        self._minute.add(now + wait)
        self._day.add(now + wait)
        self._earn(retry)
        self._under_way += 1
        self._leases[self._granted] = _Lease(
            usd, now + wait, now + wait + self.limits.lease_seconds, retry
        )
        self._breaker.granted(self._granted)
        return Grant(wait, self._granted)

    def _over_budget(self, usd: float) -> str:
        limits = self.limits
        if limits.max_calls is not None and self._calls + 1 > limits.max_calls:
            return (
                f"{self._calls} calls of cloud.max_calls={limits.max_calls} are spent"
            )
        if (
            limits.max_usd is not None
            and self._usd + usd > limits.max_usd + USD_TOLERANCE
        ):
            return f"{self._usd:.4f} of cloud.max_usd={limits.max_usd} USD are spent"
        wait = self._day.wait(self._clock())
        if wait > 0:
            return (
                f"cloud.per_day={limits.per_day} calls were made in 24 hours, the next"
                f" is due in {wait / 3600:.1f} hours"
            )
        return ""

    def _forget_expired(self) -> None:
        """A lost worker's call counts as billed and as failed."""
        now = self._clock()
        for lease in [key for key, held in self._leases.items() if held.expires <= now]:
            self.settle(lease, "failed", billed=True)


class Window:
    """At most ``limit`` calls start in any ``seconds``; None: no limit."""

    def __init__(self, limit: int | None, seconds: float) -> None:
        self._seconds = seconds
        self._starts: deque[float] | None = (
            None if limit is None else deque(maxlen=limit)
        )

    @classmethod
    def of_rate(cls, limit: float | None, seconds: float) -> Window:
        """``limit`` need not be whole: 1.5 in 60 seconds is 1 in 40."""
        if limit is None:
            return cls(None, seconds)
        whole = max(1, int(limit))
        return cls(whole, seconds * whole / limit)

    def wait(self, now: float) -> float:
        """Seconds until another call may start; 0 = now."""
        starts = self._starts
        if starts is None or len(starts) < (starts.maxlen or 0):
            return 0.0
        return max(0.0, starts[0] + self._seconds - now)

    def add(self, start: float) -> None:
        if self._starts is not None:
            self._starts.append(start)

    def remove(self, start: float) -> None:
        """The call was not made after all."""
        if self._starts is not None and start in self._starts:
            self._starts.remove(start)


class Breaker:
    """Opens when half of the last calls failed, lets one probe through after a pause,
    gives up after several failed probes.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failures: deque[bool] = deque(maxlen=WINDOW)
        self._closed_at = 0.0
        self._probe: int | None = None
        self.opens = 0
        """How often in a row it opened without a good call in between."""
        self.state: Literal["closed", "open", "half-open"] = "closed"

    @property
    def gave_up(self) -> bool:
        return self.opens >= OPENS_MAX

    def wait(self) -> float:
        """Seconds until the next call may be tried; 0 = now."""
        if self.state == "closed":
            return 0.0
        if self.state == "open":
            return max(0.0, self._closed_at - self._clock())
        return LEASE_POLL

    def granted(self, lease: int) -> None:
        if self.state == "open":
            self.state, self._probe = "half-open", lease

    def record(self, lease: int, outcome: Outcome) -> None:
        """Only ``failed`` counts against the service; a throttled call shows that it
        lives.
        """
        if self.state != "closed":
            self._record_probe(lease, outcome)
            return
        if outcome != "unsent":
            self._failures.append(outcome == "failed")
        if len(self._failures) >= WINDOW_MIN and sum(
            self._failures
        ) >= FAILURE_SHARE * len(self._failures):
            self._open()

    def _record_probe(self, lease: int, outcome: Outcome) -> None:
        """Calls that were under way when the breaker opened say nothing new."""
        if lease != self._probe:
            return
        if outcome == "failed":
            self._open()
            return
        self.state, self._probe = (
            ("open", None) if outcome == "unsent" else ("closed", None)
        )
        self.opens = self.opens if outcome == "unsent" else 0

    def _open(self) -> None:
        self.opens += 1
        self.state, self._probe = "open", None
        self._closed_at = self._clock() + COOL_DOWN * 2 ** (self.opens - 1)
        self._failures.clear()


class LocalGovernor:
    """A governor in this process, with the asynchronous face that clients use. A place
    that comes free wakes the caller that waits longest.
    """

    def __init__(self, governor: Governor) -> None:
        self.governor = governor
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def reserve(self, usd: float, retry: bool = False) -> Grant:
        while (grant := self.governor.reserve(usd, retry)).full:
            await self._place()
        if grant.lease is None:  # it takes no place, so the next one's turn has come
            self._call_next()
        return grant

    async def _place(self) -> None:
        freed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(freed)
        try:
            await freed
        except asyncio.CancelledError:
            self._call_next()  # this one may have been called already
            raise

    def _call_next(self) -> None:
        for _ in range(self.governor.free):
            while self._waiting:
                freed = self._waiting.popleft()
                if not freed.done():
                    freed.set_result(None)
                    break

    async def arrived(self, lease: int) -> None:
        self.governor.arrived(lease)
        self._call_next()

    async def settle(self, lease: int, outcome: Outcome, billed: bool) -> None:
        self.governor.settle(lease, outcome, billed)
        self._call_next()

    async def pause(self, seconds: float) -> None:
        self.governor.pause(seconds)

    async def stats(self) -> GovernorStats:
        return self.governor.stats()
