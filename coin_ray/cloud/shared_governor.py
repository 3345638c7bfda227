"""One governor for the workers of several processes.

``SharedGovernor`` is the one that grants: it lives in one process and all workers ask
it. ``RemoteGovernor`` is a worker's side: it sends the requests of all its calls, and
what became of earlier ones, in groups, so that no call costs a round trip of its own.

The shared governor also sees to it that no two workers call a service about one image
at the same time, and that the first call to a service goes alone.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from coin_ray.cloud.governor import Governor, Grant, Outcome
from coin_ray.errors import CloudError

GROUP_SECONDS = 0.1
"""Least time between two groups of a worker, unless slots are scarce."""
WAIT_SECONDS = 0.5
"""Longest time that a group waits at the shared governor for a free slot."""
BLOCKED_SECONDS = 0.02
"""The same where another worker's call about the same image is what is waited for."""


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """A request of one call. ``key``: the journal's key of the answer, or empty."""

    key: str
    usd: float
    retry: bool


@dataclass(frozen=True, slots=True)
class CallReport:
    """What became of a call. ``outcome`` None: its answer has arrived and is being
    stored. ``error``: as JSON, one that stops the run.
    """

    lease: int
    outcome: Outcome | None = None
    billed: bool = True
    error: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """Reports and requests of one worker that are sent together. ``pause``: seconds that
    the service asked all workers to wait.
    """

    worker: str
    reports: tuple[CallReport, ...] = ()
    requests: tuple[LeaseRequest, ...] = ()
    pause: float = 0.0


Exchange = Callable[[Group], Awaitable[Sequence[Grant | None]]]
"""Sends a group to the shared governor; returns a grant for each request, or None for
one that is to be sent again."""


def error_as_json(error: CloudError) -> str:
    """Return the type and the message of an error that stops the run."""
    return json.dumps({"type": type(error).__name__, "message": str(error)})


@dataclass(slots=True)
class _Call:
    worker: str
    key: str


@dataclass(slots=True)
class _Calls:
    """Calls under way by lease, and who knows about which key."""

    by_lease: dict[int, _Call] = field(default_factory=dict)
    worker_of_key: dict[str, str] = field(default_factory=dict)
    """The worker that calls about a key now."""
    informed_workers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Workers that know of all calls about a key: they have looked into the journal
    since the last one, or made it."""


class SharedGovernor:
    """Grants the calls of all workers to one service. Use inside one event loop."""

    def __init__(self, governor: Governor) -> None:
        self.governor = governor
        self._calls = _Calls()
        self._has_answered = False
        """Until the service has answered, calls are made one at a time."""
        self._stop_error = ""
        self._ended_workers: set[str] = set()
        self._turn = asyncio.Lock()
        """Groups that wait for a free slot are served in their order."""
        self._changed = asyncio.Event()

    async def exchange(self, group: Group) -> list[Grant | None]:
        """Note what became of calls, and grant further ones. Waits until at least one
        of the requests has an answer, but not for long.
        """
        for report in group.reports:
            self._note(report)
        if group.pause:
            self.governor.pause(group.pause)
        if not group.requests:
            return []
        async with self._turn:
            return await self._grant_some(group)

    def end_worker(self, worker: str) -> None:
        """Free the slots of a worker whose process has ended. Its calls stay spent."""
        self._ended_workers.add(worker)
        for lease, call in list(self._calls.by_lease.items()):
            if call.worker == worker:
                self._end_call(lease, "lost", billed=True)

    async def _grant_some(self, group: Group) -> list[Grant | None]:
        give_up_at = time.monotonic() + WAIT_SECONDS
        while True:
            self._changed.clear()
            grants: list[Grant | None] = [None] * len(group.requests)
            if group.worker in self._ended_workers:
                return grants
            is_full = False
            for number, request in enumerate(group.requests):
                grant = self._grant(group.worker, request)
                is_full |= grant is not None and grant.full
                if is_full:
                    break
                grants[number] = grant
            seconds = give_up_at - time.monotonic()
            if any(grant is not None for grant in grants) or seconds <= 0:
                return grants
            if not is_full:
                seconds = min(seconds, BLOCKED_SECONDS)
            try:
                async with asyncio.timeout(seconds):
                    await self._changed.wait()
            except TimeoutError:
                return grants

    def _grant(self, worker: str, request: LeaseRequest) -> Grant | None:
        """Answer one request; None if it must wait for another call."""
        if self._stop_error:
            return Grant(0, refusal="stopped", reason=self._stop_error)
        calls = self._calls
        if calls.worker_of_key.get(request.key, worker) != worker:
            return None
        informed = calls.informed_workers.get(request.key)
        if request.key and informed is not None and worker not in informed:
            calls.informed_workers[request.key] = (*informed, worker)
            return Grant(0, answered_elsewhere=True)
        if not self._has_answered and calls.by_lease:
            return None
        grant = self.governor.reserve(request.usd, request.retry)
        if grant.lease is not None:
            calls.by_lease[grant.lease] = _Call(worker, request.key)
            if request.key:
                calls.worker_of_key[request.key] = worker
                calls.informed_workers[request.key] = (worker,)
        return grant

    def _note(self, report: CallReport) -> None:
        if report.outcome is None:
            self._has_answered = True
            self.governor.arrived(report.lease)
            self._changed.set()
            return
        if report.error:
            self._stop_error = self._stop_error or report.error
        elif report.outcome != "unsent":
            self._has_answered = True
        self._end_call(report.lease, report.outcome, report.billed)

    def _end_call(self, lease: int, outcome: Outcome, billed: bool) -> None:
        self.governor.settle(lease, outcome, billed)
        call = self._calls.by_lease.pop(lease, None)
        if call is not None and call.key:
            self._calls.worker_of_key.pop(call.key, None)
        self._changed.set()


class RemoteGovernor:
    """A worker's side of a ``SharedGovernor`` (an ``AsyncGovernor``). ``worker``: a name
    that no other process has, before or after.
    """

    def __init__(self, exchange: Exchange, worker: str) -> None:
        self._exchange = exchange
        self._worker = worker
        self._reports: list[CallReport] = []
        self._pause = 0.0
        self._waiting: list[tuple[LeaseRequest, asyncio.Future[Grant]]] = []
        self._requesting: asyncio.Task[None] | None = None
        self._reporting: asyncio.Task[None] | None = None
        self._is_scarce = False
        """Whether a request had to wait for another call: slots are freed at once."""
        self._last_group = 0.0

    async def reserve(self, usd: float, retry: bool = False, key: str = "") -> Grant:
        granted: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
        self._waiting.append((LeaseRequest(key, usd, retry), granted))
        if self._requesting is None or self._requesting.done():
            self._requesting = asyncio.create_task(self._send_requests())
        try:
            return await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled() and not granted.exception():
                self._return_lease(granted.result())
            raise

    async def arrived(self, lease: int) -> None:
        self._report(CallReport(lease), at_once=self._is_scarce)

    async def settle(
        self,
        lease: int,
        outcome: Outcome,
        billed: bool,
        error: CloudError | None = None,
    ) -> None:
        stop_error = ""
        if error is not None and error.stops_run:
            stop_error = error_as_json(error)
        report = CallReport(lease, outcome, billed, stop_error)
        self._report(report, at_once=self._is_scarce or outcome != "answered")

    async def pause(self, seconds: float) -> None:
        self._pause = max(self._pause, seconds)
        self._start_reporting(at_once=True)

    async def flush(self) -> None:
        """Send all reports now."""
        if self._reports or self._pause:
            await self._exchange(self._new_group())

    def _return_lease(self, grant: Grant) -> None:
        if grant.lease is not None:
            self._report(CallReport(grant.lease, "unsent", billed=False), at_once=True)

    def _report(self, report: CallReport, *, at_once: bool) -> None:
        self._reports.append(report)
        self._start_reporting(at_once=at_once)

    def _start_reporting(self, *, at_once: bool) -> None:
        if at_once and self._reporting is not None:
            self._reporting.cancel()  # it only waits for further reports
            self._reporting = None
        if self._reporting is None:
            seconds = 0.0 if at_once else GROUP_SECONDS
            self._reporting = asyncio.create_task(self._send_reports(seconds))

    def _new_group(self, requests: Sequence[LeaseRequest] = ()) -> Group:
        """Return all reports and these requests."""
        group = Group(self._worker, tuple(self._reports), tuple(requests), self._pause)
        self._reports, self._pause = [], 0.0
        return group

    async def _send_reports(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self._reporting = None
        await self.flush()

    async def _send_requests(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            if not self._is_scarce:
                await asyncio.sleep(self._last_group + GROUP_SECONDS - loop.time())
            waiting, self._waiting = self._waiting, []
            group = self._new_group([request for request, _ in waiting])
            try:
                grants = await self._exchange(group)
            except Exception as error:
                for _, granted in waiting:
                    if not granted.done():
                        granted.set_exception(error)
                continue
            self._last_group = loop.time()
            self._is_scarce = None in grants
            again = []
            for (request, granted), grant in zip(waiting, grants, strict=True):
                if granted.done():  # cancelled meanwhile
                    self._return_lease(grant or Grant(0))
                elif grant is None:
                    again.append((request, granted))
                else:
                    granted.set_result(grant)
            self._waiting[:0] = again
