"""One governor for all workers: call rate, calls under way, calls per minute and day,
retries, budget and circuit breaker.

``Governor`` is a plain class without threads or sleeping: it returns how long to wait,
its callers wait. One instance serves a whole run; ``LocalGovernor`` gives it an
asynchronous interface inside one process, ``coin_ray.cloud.shared_governor`` one for
several processes.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from coin_ray.errors import CloudError

LEASE_POLL = 0.05
"""Seconds after which a caller that got no lease asks again."""
WINDOW = 50
WINDOW_MIN = 10
"""Calls whose failures the breaker counts, at most and at least."""
FAILURE_SHARE = 0.5
COOL_DOWN = 5.0
"""Seconds the breaker stays open the first time; doubles each time in a row."""
OPENS_MAX = 4
"""The breaker gives up when it opens this often in a row."""
USD_TOLERANCE = 1e-9
MINUTE, DAY = 60.0, 86_400.0
RETRY_SHARE = 0.1
"""Retries that each first call earns for all."""

Outcome = Literal["answered", "throttled", "failed", "unsent", "lost"]
"""``lost``: the process that called has ended, and nothing is known of the call."""
Refusal = Literal["budget", "unreachable", "retries", "stopped"]
"""``stopped``: another worker's call had an error that stops the run; it is the reason,
as JSON."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits for all workers together.

    ``rate``: calls per second; ``in_flight``: calls under way; ``lease_seconds``: after
    this long the lease of a worker that never came back expires; ``retry_burst``:
    retries beyond a tenth of the calls.
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
    """Result of ``reserve``: a lease to use after ``wait`` seconds; or no lease, ask
    again after ``wait``; or a refusal for good.
    """

    wait: float
    lease: int | None = None
    refusal: Refusal | None = None
    reason: str = ""
    breaker_open: bool = False
    """The caller has to wait because the breaker is open."""
    full: bool = False
    """The caller has to wait because too many calls are under way."""
    answered_elsewhere: bool = False
    """Another worker has called about the same image: the journal may have the answer."""


@dataclass(frozen=True, slots=True)
class GovernorStats:
    """Counts of calls and the state of the breaker."""

    calls: int
    usd: float
    in_flight: int
    answered: int
    throttled: int
    failed: int
    breaker: str
    opens: int


class AsyncGovernor(Protocol):
    """The interface of a governor for clients, in this process or another.

    ``key``: of the answer in the journal; ``error``: of a call, if it had one.
    """

    async def reserve(
        self, usd: float, retry: bool = False, key: str = ""
    ) -> Grant: ...

    async def arrived(self, lease: int) -> None: ...

    async def settle(
        self,
        lease: int,
        outcome: Outcome,
        billed: bool,
        error: CloudError | None = None,
    ) -> None: ...

    async def pause(self, seconds: float) -> None: ...


@dataclass(slots=True)
class _Lease:
    usd: float
    start: float
    expires: float
    is_retry: bool
    has_arrived: bool = False


class Governor:
    """Grants calls. Both from the journal of earlier runs: ``spent``, calls and USD of
    the same budget; ``ages``, how many seconds ago today's calls were made.
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
        self._in_flight = 0
        self._granted = 0
        self._counts: dict[Outcome, int] = {
            "answered": 0,
            "throttled": 0,
            "failed": 0,
            "unsent": 0,
            "lost": 0,
        }
        self._breaker = CircuitBreaker(clock)
        self._minute = CallWindow.with_rate(limits.per_minute, MINUTE)
        self._day = CallWindow(limits.per_day, DAY)
        for age in sorted(ages, reverse=True):
            self._day.add(clock() - age)
        self._retries = float(limits.retry_burst)

    @property
    def free_slots(self) -> int:
        """Return how many more calls may be under way."""
        return max(0, self.limits.in_flight - self._in_flight)

    def reserve(self, usd: float, retry: bool = False) -> Grant:
        """Reserve a slot for a call, its time by the rate, and ``usd`` of the budget,
        or return the time after which to ask again.

        A spent budget is refused once no call is under way: until then one may turn out
        not to be billed. A ``retry`` is refused when retries exceed their share of the
        calls: repeating what a service in trouble refuses keeps it in trouble.
        """
        self._expire_leases()
        if self._breaker.gave_up:
            reason = f"the breaker opened {OPENS_MAX} times in a row"
            return Grant(0, refusal="unreachable", reason=reason)
        over_budget = self._over_budget(usd)
        if over_budget and self._leases:
            return Grant(LEASE_POLL)
        if over_budget:
            return Grant(0, refusal="budget", reason=over_budget)
        if retry and self._retries < 1:
            reason = (
                f"retries are limited to {RETRY_SHARE:.0%} of the calls; a lower"
                " cloud.rate may help"
            )
            return Grant(0, refusal="retries", reason=reason)
        if not self.free_slots:
            return Grant(LEASE_POLL, full=True)
        breaker_wait = self._breaker.wait()
        wait = max(breaker_wait, self._minute.wait(self._clock()))
        if wait > 0:
            return Grant(wait, breaker_open=breaker_wait > 0)
        return self._grant(usd, retry)

    def arrived(self, lease: int) -> None:
        """Free the call's slot, as its answer has arrived; its cost is settled once the
        answer is stored.
        """
        held = self._leases.get(lease)
        if held is not None and not held.has_arrived:
            held.has_arrived = True
            self._in_flight -= 1

    def settle(self, lease: int, outcome: Outcome, billed: bool) -> None:
        """End the call. Not ``billed``: the service certainly did not count it, so its
        cost goes back to the budget.
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
            self._add_retries(held.is_retry, -1)
        self._counts[outcome] += 1
        self._breaker.record(lease, outcome)

    def pause(self, seconds: float) -> None:
        """Grant no call for ``seconds``; afterwards the rate applies without a burst."""
        resume = self._clock() + seconds + (self.limits.burst - 1) / self.limits.rate
        self._next_arrival = max(self._next_arrival, resume)

    def stats(self) -> GovernorStats:
        """Return the counts so far."""
        return GovernorStats(
            calls=self._calls,
            usd=self._usd,
            in_flight=self._in_flight,
            answered=self._counts["answered"],
            throttled=self._counts["throttled"],
            failed=self._counts["failed"],
            breaker=self._breaker.state,
            opens=self._breaker.opens,
        )

    def _add_retries(self, is_retry: bool, count: int = 1) -> None:
        """Count a call: a first call earns a part of a retry, a retry costs one;
        ``count`` -1 reverses that.
        """
        earned = -1.0 if is_retry else RETRY_SHARE
        self._retries = min(
            self._retries + count * earned, float(self.limits.retry_burst)
        )

    def _grant(self, usd: float, is_retry: bool) -> Grant:
        """Grant a call by GCRA: it may arrive ``burst - 1`` intervals before its
        theoretical arrival time.
        """
        now = self._clock()
        interval = 1 / self.limits.rate
        arrival = max(self._next_arrival, now)
        self._next_arrival = arrival + interval
        wait = max(0.0, arrival - (self.limits.burst - 1) * interval - now)
        start = now + wait
        self._granted += 1
        self._calls += 1
        self._usd += usd
        self._minute.add(start)
        self._day.add(start)
        self._add_retries(is_retry)
        self._in_flight += 1
        expires = start + self.limits.lease_seconds
        self._leases[self._granted] = _Lease(usd, start, expires, is_retry)
        self._breaker.granted(self._granted)
        return Grant(wait, self._granted)

    def _over_budget(self, usd: float) -> str:
        """Return which limit another call would exceed; empty if none."""
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

    def _expire_leases(self) -> None:
        """Settle the calls of lost workers as billed and failed."""
        now = self._clock()
        expired = [lease for lease, held in self._leases.items() if held.expires <= now]
        for lease in expired:
            self.settle(lease, "failed", billed=True)


class CallWindow:
    """Allows at most ``limit`` calls to start in any ``seconds``; None: no limit."""

    def __init__(self, limit: int | None, seconds: float) -> None:
        self._seconds = seconds
        self._starts: deque[float] | None = None
        if limit is not None:
            self._starts = deque(maxlen=limit)

    @classmethod
    def with_rate(cls, limit: float | None, seconds: float) -> CallWindow:
        """Return a window whose ``limit`` need not be whole: 1.5 in 60 seconds is 1 in
        40.
        """
        if limit is None:
            return cls(None, seconds)
        whole = max(1, int(limit))
        return cls(whole, seconds * whole / limit)

    def wait(self, now: float) -> float:
        """Return the seconds until another call may start; 0 = now."""
        starts = self._starts
        if starts is None or len(starts) < (starts.maxlen or 0):
            return 0.0
        return max(0.0, starts[0] + self._seconds - now)

    def add(self, start: float) -> None:
        """Count a call."""
        if self._starts is not None:
            self._starts.append(start)

    def remove(self, start: float) -> None:
        """Remove a call that was not made after all."""
        if self._starts is not None and start in self._starts:
            self._starts.remove(start)


class CircuitBreaker:
    """Opens when half of the last calls failed, lets one probe through after a pause,
    gives up after several failed probes.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failures: deque[bool] = deque(maxlen=WINDOW)
        self._closes_at = 0.0
        self._probe: int | None = None
        self.opens = 0
        """How often in a row it opened without a good call in between."""
        self.state: Literal["closed", "open", "half-open"] = "closed"

    @property
    def gave_up(self) -> bool:
        """Return whether it opened too often in a row."""
        return self.opens >= OPENS_MAX

    def wait(self) -> float:
        """Return the seconds until the next call may be tried; 0 = now."""
        if self.state == "closed":
            return 0.0
        if self.state == "open":
            return max(0.0, self._closes_at - self._clock())
        return LEASE_POLL

    def granted(self, lease: int) -> None:
        """Make the first call after the pause the probe."""
        if self.state == "open":
            self.state = "half-open"
            self._probe = lease

    def record(self, lease: int, outcome: Outcome) -> None:
        """Count a call. Only ``failed`` counts against the service; a throttled call
        shows that it works.
        """
        if self.state != "closed":
            self._record_probe(lease, outcome)
            return
        if outcome not in ("unsent", "lost"):
            self._failures.append(outcome == "failed")
        count = len(self._failures)
        if count >= WINDOW_MIN and sum(self._failures) >= FAILURE_SHARE * count:
            self._open()

    def _record_probe(self, lease: int, outcome: Outcome) -> None:
        """Close the breaker or open it again by the outcome of the probe; calls that
        were under way when it opened are ignored.
        """
        if lease != self._probe:
            return
        if outcome == "failed":
            self._open()
            return
        self._probe = None
        if outcome in ("unsent", "lost"):
            self.state = "open"
        else:
            self.state = "closed"
            self.opens = 0

    def _open(self) -> None:
        self.opens += 1
        self.state = "open"
        self._probe = None
        self._closes_at = self._clock() + COOL_DOWN * 2 ** (self.opens - 1)
        self._failures.clear()


class LocalGovernor:
    """A governor in this process with the asynchronous interface that clients use. A
    slot that becomes free wakes the caller that has waited longest.
    """

    def __init__(self, governor: Governor) -> None:
        self.governor = governor
        self._waiters: deque[asyncio.Future[None]] = deque()

    async def reserve(self, usd: float, retry: bool = False, key: str = "") -> Grant:
        while (grant := self.governor.reserve(usd, retry)).full:
            await self._wait_for_slot()
        if grant.lease is None:  # it takes no slot, which the next waiter can have
            self._wake_waiters()
        return grant

    async def _wait_for_slot(self) -> None:
        slot_is_free: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(slot_is_free)
        try:
            await slot_is_free
        except asyncio.CancelledError:
            self._wake_waiters()  # this one may have been woken already
            raise

    def _wake_waiters(self) -> None:
        """Wake as many callers as there are free slots."""
        for _ in range(self.governor.free_slots):
            while self._waiters:
                slot_is_free = self._waiters.popleft()
                if not slot_is_free.done():
                    slot_is_free.set_result(None)
                    break

    async def arrived(self, lease: int) -> None:
        self.governor.arrived(lease)
        self._wake_waiters()

    async def settle(
        self,
        lease: int,
        outcome: Outcome,
        billed: bool,
        error: CloudError | None = None,
    ) -> None:
        self.governor.settle(lease, outcome, billed)
        self._wake_waiters()

    async def pause(self, seconds: float) -> None:
        self.governor.pause(seconds)
